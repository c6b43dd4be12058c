// gru_forward for Python's tensors with DLPack's exchange API, such as PyTorch's: reading the
// properties of ten tensors in Python takes as long as a short text. Python's functions are looked
// up in the process, so the build needs no headers of Python, and other programs can load the
// library.
#include <dlfcn.h>
#include <stddef.h>

#include <initializer_list>

#include "gru.h"

namespace {

// DLTensor and DLPackExchangeAPI of dlpack.h, version 1.
struct Tensor {
  void *data;
  int32_t device_type, device, dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
};

struct Exchange {
  uint32_t major, minor;
  void *older, *allocate, *take, *give;
  int (*read)(void *object, Tensor *);  // not 0: it has raised an error in Python
};

enum { cpu = 1 };
enum Code { integer = 0, floating = 2, boolean = 6 };

struct Python {
  void *(*item)(void *list, ptrdiff_t);
  void *none, (*clear_error)(), *(*release)(), (*acquire)(void *);
  Python()
      : item((decltype(item))dlsym(RTLD_DEFAULT, "PyList_GetItem")),
        none(dlsym(RTLD_DEFAULT, "_Py_NoneStruct")),
        clear_error((decltype(clear_error))dlsym(RTLD_DEFAULT, "PyErr_Clear")),
        release((decltype(release))dlsym(RTLD_DEFAULT, "PyEval_SaveThread")),
        acquire((decltype(acquire))dlsym(RTLD_DEFAULT, "PyEval_RestoreThread")) {}
};

const Python python;

struct List {
  const Exchange &exchange;
  void *objects;
  bool readable = true;  // whether all tensors so far were readable

  // The description of a tensor; for None, one without dimensions.
  Tensor read(int i) {
    Tensor tensor = {};
    void *const object = python.item(objects, i);
    if (object != python.none && exchange.read(object, &tensor)) {
      python.clear_error();
      tensor = {};
    }
    return tensor;
  }

  // The address of a dense tensor in the CPU's memory that is not empty.
  char *place(const Tensor &tensor, Code code, int bits, std::initializer_list<int64_t> shape) {
    bool fits = tensor.data && tensor.device_type == cpu && tensor.code == code &&
                tensor.bits == bits && tensor.lanes == 1 && tensor.dimensions == (int)shape.size();
    int64_t distance = 1;
    for (int k = (int)shape.size(); fits && k--; distance *= tensor.shape[k])
      fits = tensor.shape[k] == shape.begin()[k] &&
             (tensor.shape[k] == 1 || !tensor.strides || tensor.strides[k] == distance);
    readable = readable && fits;
    return (char *)tensor.data + tensor.offset;
  }
  char *place(int i, Code code, int bits, std::initializer_list<int64_t> shape) {
    return place(read(i), code, bits, shape);
  }
  char *place_if_any(int i, Code code, int bits, std::initializer_list<int64_t> shape) {
    return python.item(objects, i) == python.none ? nullptr : place(i, code, bits, shape);
  }
};

}  // namespace

enum { GRU_UNREADABLE = -1 };

extern "C" {

// A layer of a stack of `layers`. objects: a list of x, tokens, lengths, resets, h0, h_reset,
// outputs and h_last, and of weight_ih, weight_hh, bias_ih and bias_hh of each direction, as in
// gru.h, except the states, which belong to all layers: [layers * directions, B, H]. x, h_last and
// the weights are not None. Returns GRU_UNREADABLE without computing if a tensor is empty or not as
// expected. spinning: whether OpenMP's threads spin after their work. The caller holds Python's
// lock, which is released during the computation.
GRU_API int gru_tensors_forward(const Exchange *exchange, void *objects, int layer, int layers,
                                int directions, int reset_after, int nn_order, int threads,
                                int spinning, int bfloat16) {
  if (exchange->major != 1 || !python.item) return GRU_UNREADABLE;
  List list = {*exchange, objects};
  const Tensor x = list.read(0), tokens = list.read(1), recurrent = list.read(9);  // a weight_hh
  const bool distinct = python.item(objects, 1) != python.none;
  const Tensor &steps = distinct ? tokens : x;
  if (recurrent.dimensions != 2 || steps.dimensions < 2 || x.dimensions != (distinct ? 2 : 3) ||
      (x.bits != 32 && (x.bits != 64 || bfloat16)))
    return GRU_UNREADABLE;
  const int64_t T = steps.shape[0], B = steps.shape[1], D = x.shape[x.dimensions - 1];
  const int64_t H = recurrent.shape[1], R = directions;
  gru_problem problem = {};
  problem.steps = T, problem.batch = B, problem.inputs = D, problem.hidden = H;
  problem.distinct = distinct ? x.shape[0] : T * B;
  problem.x = distinct ? list.place(x, floating, x.bits, {x.shape[0], D})
                       : list.place(x, floating, x.bits, {T, B, D});
  if (distinct) problem.tokens = (int32_t *)list.place(tokens, integer, 32, {T, B});
  problem.lengths = (int32_t *)list.place_if_any(2, integer, 32, {B});
  problem.resets = (uint8_t *)list.place_if_any(3, boolean, 8, {T, B});
  problem.is_double = x.bits == 64;
  problem.reset_after = reset_after;
  problem.nn_order = nn_order;
  problem.directions = directions;
  problem.threads = threads;
  problem.openmp = spinning ? GRU_WHILE_SPINNING : GRU_NEVER;
  problem.bfloat16 = bfloat16;
  char *const h0 = list.place_if_any(4, floating, x.bits, {layers * R, B, H});
  char *const h_reset = list.place_if_any(5, floating, x.bits, {layers * R, B, H});
  char *const outputs = list.place_if_any(6, floating, x.bits, {T, B, R * H});
  char *const h_last = list.place(7, floating, x.bits, {layers * R, B, H});
  gru_direction each[2] = {};
  for (int i = 0; i < directions; ++i) {
    gru_direction &d = each[i];
    const int64_t row = H * x.bits / 8, state = (layer * R + i) * B * row;
    d.reverse = i;
    d.ld_outputs = R * H;
    d.weight_ih = list.place(8 + 4 * i, floating, x.bits, {3 * H, D});
    d.weight_hh = list.place(i ? list.read(13) : recurrent, floating, x.bits, {3 * H, H});
    d.bias_ih = list.place(10 + 4 * i, floating, x.bits, {3 * H});
    d.bias_hh = list.place(11 + 4 * i, floating, x.bits, {3 * H});
    d.h0 = h0 ? h0 + state : nullptr;
    d.h_reset = h_reset ? h_reset + state : nullptr;
    d.outputs = outputs ? outputs + i * row : nullptr;
    d.h_last = h_last + state;
  }
  if (!list.readable) return GRU_UNREADABLE;
  void *const thread = python.release();
  const int status = gru_forward(&problem, each);
  python.acquire(thread);
  return status;
}

}  // extern "C"
