// Launches recurrence.cu for both frameworks: a C interface, and XLA FFI handlers if the compiler
// finds jaxlib's headers. The CUDA driver is loaded at run time, so that this file compiles and loads
// without a driver.
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "call.h"
#include "driver.h"

namespace {

#define FUNCTIONS(with)                                                                   \
  with(cuDriverGetVersion)                                                                \
  with(cuCtxGetCurrent) with(cuCtxSetCurrent) with(cuStreamGetCtx) with(cuModuleLoadData) \
  with(cuModuleGetFunction) with(cuFuncSetAttribute) with(cuLaunchKernelEx) with(cuGetErrorName)

struct Driver {
#define DECLARED(name) decltype(::name) *name = nullptr;
  FUNCTIONS(DECLARED)
  bool is_loaded = false;

  void load() {
    void *const library = dlopen("libcuda.so.1", RTLD_NOW);
    is_loaded = library;
#define LOAD(name) is_loaded = is_loaded && (name = (decltype(name))dlsym(library, #name));
    FUNCTIONS(LOAD)
  }
};

// Each call searches for the driver until it is found, because it may be loaded later.
const Driver &driver() {
  static std::mutex mutex;
  static Driver driver;
  std::lock_guard<std::mutex> lock(mutex);
  if (!driver.is_loaded) driver.load();
  return driver;
}

// A compiled kernel and its functions in the contexts that have loaded it. It is never unloaded.
struct Instance {
  std::string image;
  unsigned cluster, threads, shared_bytes;
  std::map<CUcontext, CUfunction> functions;
};

std::mutex mutex;
std::map<std::string, Instance> instances;

enum { NO_DRIVER = -1, NO_INSTANCE = -2 };

CUresult load(Instance &instance, CUfunction &function) {
  const Driver &cuda = driver();
  const int bytes = (int)instance.shared_bytes;
  CUmodule module;
  if (CUresult e = cuda.cuModuleLoadData(&module, instance.image.data())) return e;
  if (CUresult e = cuda.cuModuleGetFunction(&function, module, "gru")) return e;
  if (CUresult e = cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes))
    return e;
  if (instance.cluster <= 8) return 0;
  return cuda.cuFuncSetAttribute(function, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1);
}

// Launches the kernel in the current context.
int launch_here(CUcontext context, const std::string &key, const Call &call, CUstream stream) {
  CUfunction function = nullptr;
  Instance *instance;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto at = instances.find(key);
    if (at == instances.end()) return NO_INSTANCE;
    instance = &at->second;
    CUfunction &known = instance->functions[context];
    if (!known) {
      if (CUresult e = load(*instance, function)) return e;
      known = function;
    }
    function = known;
  }
  CUlaunchAttribute cluster = {};
  cluster.id = CLUSTER_DIMENSION;
  cluster.value.clusterDim = {instance->cluster, 1, 1};
  CUlaunchConfig config = {};
  config.gridDimX = (unsigned)(call.directions * ((call.batch + 7) / 8)) * instance->cluster;
  config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
  config.blockDimX = instance->threads;
  config.sharedMemBytes = instance->shared_bytes;
  config.hStream = stream;
  config.attrs = &cluster;
  config.numAttrs = instance->cluster > 1;
  void *arguments[] = {const_cast<Call *>(&call)};
  return driver().cuLaunchKernelEx(&config, function, arguments, nullptr);
}

int launch(const std::string &key, const Call &call, CUstream stream) {
  if (!driver().is_loaded) return NO_DRIVER;
  if (!call.batch) return 0;
  CUcontext before = nullptr;
  if (CUresult e = driver().cuCtxGetCurrent(&before)) return e;
  CUcontext own = before;
  if (stream) {  // the calling thread may have another context, or none
    if (CUresult e = driver().cuStreamGetCtx(stream, &own)) return e;
    if (CUresult e = driver().cuCtxSetCurrent(own)) return e;
  }
  const int status = launch_here(own, key, call, stream);
  if (stream && before) driver().cuCtxSetCurrent(before);
  return status;
}

std::string described(int status) {
  if (status == NO_DRIVER) return "there is no CUDA driver";
  if (status == NO_INSTANCE) return "the kernel has not been compiled in this process";
  const char *name = nullptr;
  driver().cuGetErrorName(status, &name);
  return name ? name : "CUDA error " + std::to_string(status);
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// The newest version of CUDA that the driver supports, such as 13000; 0 without a driver.
API int gru_cuda_driver() {
  int version = 0;
  return driver().is_loaded && !driver().cuDriverGetVersion(&version) ? version : 0;
}

// Registers a kernel by a key. A key always identifies the same kernel.
API void gru_cuda_add(const char *key, const char *image, int64_t size, int cluster, int threads,
                      int shared_bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  instances.try_emplace(key, Instance{std::string(image, (size_t)size), (unsigned)cluster,
                                      (unsigned)threads, (unsigned)shared_bytes, {}});
}

// Launches a kernel in the context of the stream, or in the current one. Returns 0 or an error code
// for gru_cuda_error.
API int gru_cuda_launch(const char *key, const Call *call, void *stream) {
  return launch(key, *call, (CUstream)stream);
}

API const char *gru_cuda_error(int status) {
  thread_local std::string text;
  text = described(status);
  return text.c_str();
}

//   gru_cuda_xla_forward:  projections, weight_hh, bias_hh, h0, h_reset, tokens, lengths, resets ->
//                          outputs, h_last, saved
//   gru_cuda_xla_backward: weight_hh, d_outputs, d_h_last, saved, lengths, resets -> d_a, d_q, d_h0,
//                          d_h_reset
// with the layouts of call.h; an empty vector replaces an absent array. The sizes of all arrays are
// validated here.
#if __has_include("xla/ffi/api/ffi.h")
#include "../xla_arrays.h"

namespace {

ffi::Error execute(void *stream, ffi::RemainingArgs args, ffi::RemainingRets results, bool backward,
                   std::string_view key, int64_t size, int64_t T, ffi::Span<const int64_t> reverse,
                   bool reset_after) {
  if (args.size() != (backward ? 6 : 8) || results.size() != (backward ? 4 : 3) ||
      reverse.size() < 1 || reverse.size() > 2)
    return ffi::Error::InvalidArgument("GRU: wrong number of arrays");
  auto arg = [&](size_t i) { return *args.get<ffi::AnyBuffer>(i); };
  auto result = [&](size_t i) { return **results.get<ffi::AnyBuffer>(i); };
  auto rank = [](const ffi::AnyBuffer &buffer) { return buffer.dimensions().size(); };
  auto floats = [](const ffi::AnyBuffer &buffer) {
    return buffer.element_count() ? (float *)buffer.untyped_data() : nullptr;
  };
  const auto states = backward ? arg(2) : arg(3), saved = backward ? arg(3) : result(2);
  const auto lengths = arg(backward ? 4 : 6), resets = arg(backward ? 5 : 7);
  const auto outputs = backward ? arg(1) : result(0);
  if (rank(states) != 3 || rank(saved) != 2)
    return ffi::Error::InvalidArgument("GRU: an array has the wrong number of dimensions");
  const int64_t R = (int64_t)reverse.size(), B = states.dimensions()[1],
                H = states.dimensions()[2], all = T * B * H * (reset_after ? 5 : 4);
  const bool has_resets = rank(resets) == 2, sequences = outputs.dimensions()[0] != 0;
  const Sizes of_states = {R, B, H}, of_reset = has_resets ? of_states : Sizes{0};
  Call call = {};
  std::vector<Expected> arrays = {
      {"weight_hh", arg(backward ? 0 : 1), {R, 3, size, size}, ffi::F32},
      {"outputs", outputs, {sequences ? T : 0, B, R * H}, ffi::F32},
      {"lengths", lengths, {B}, ffi::S32},
      {"resets", resets, has_resets ? Sizes{T, B} : Sizes{0}, ffi::PRED}};
  if (backward) {
    arrays.insert(arrays.end(), {{"d_h_last", states, of_states, ffi::F32},
                                 {"saved", saved, {R, all}, ffi::F32},
                                 {"d_a", result(0), {R, T, B, 3 * H}, ffi::F32},
                                 {"d_q", result(1), {R, T, reset_after ? B : 0, H}, ffi::F32},
                                 {"d_h0", result(2), of_states, ffi::F32},
                                 {"d_h_reset", result(3), of_reset, ffi::F32}});
    call.d_outputs = floats(outputs), call.d_h_last = floats(states), call.saved = floats(saved);
    call.d_a = floats(result(0)), call.d_q = floats(result(1));
    call.d_h0 = floats(result(2)), call.d_h_reset = floats(result(3));
  } else {
    const auto a = arg(0), tokens = arg(5);
    const bool has_tokens = rank(tokens) == 2, saves = saved.dimensions()[1] != 0;
    if (rank(a) != 3) return ffi::Error::InvalidArgument("GRU: projections: wrong dimensions");
    call.distinct = (int)(has_tokens ? a.dimensions()[1] : T * B);
    arrays.insert(arrays.end(), {{"projections", a, {R, call.distinct, 3 * H}, ffi::F32},
                                 {"bias_hh", arg(2), {R, 3 * H}, ffi::F32},
                                 {"h0", states, of_states, ffi::F32},
                                 {"h_reset", arg(4), of_reset, ffi::F32},
                                 {"tokens", tokens, has_tokens ? Sizes{T, B} : Sizes{0}, ffi::S32},
                                 {"h_last", result(1), of_states, ffi::F32},
                                 {"saved", saved, {R, saves ? all : 0}, ffi::F32}});
    call.projections = floats(a), call.bias_hh = floats(arg(2)), call.h0 = floats(states);
    call.h_reset = floats(arg(4)), call.outputs = floats(outputs), call.saved = floats(saved);
    call.tokens = has_tokens ? (const int *)tokens.untyped_data() : nullptr;
    call.h_last = floats(result(1));
  }
  if (ffi::Error error = check(arrays); error.failure()) return error;
  call.weight_hh = floats(arg(backward ? 0 : 1));
  call.lengths = (const int *)lengths.untyped_data();
  call.resets = has_resets ? (const unsigned char *)resets.untyped_data() : nullptr;
  call.steps = (int)T, call.batch = (int)B, call.hidden = (int)H, call.directions = (int)R;
  for (int i = 0; i < R; ++i) call.reverse[i] = reverse[i] != 0;
  if (const int status = launch(std::string(key), call, (CUstream)stream))
    return ffi::Error::Internal("GRU on the GPU: " + described(status));
  return ffi::Error::Success();
}

template <bool Backward>
ffi::Error on_device(void *stream, ffi::RemainingArgs args, ffi::RemainingRets results,
                     std::string_view key, int64_t size, int64_t T, ffi::Span<const int64_t> reverse,
                     bool reset_after) {
  return execute(stream, args, results, Backward, key, size, T, reverse, reset_after);
}

// For a rehearsal, whose driver runs kernels on the CPU: device memory is host memory.
template <bool Backward>
ffi::Error on_host(ffi::RemainingArgs args, ffi::RemainingRets results, std::string_view key,
                   int64_t size, int64_t T, ffi::Span<const int64_t> reverse, bool reset_after) {
  return execute((void *)1, args, results, Backward, key, size, T, reverse, reset_after);
}

template <class Binding>
auto described_by(Binding binding) {
  return std::move(binding)
      .RemainingArgs()
      .RemainingRets()
      .template Attr<std::string_view>("key")
      .template Attr<int64_t>("size")
      .template Attr<int64_t>("steps")
      .template Attr<ffi::Span<const int64_t>>("reverse")
      .template Attr<bool>("reset_after");
}

}  // namespace

#define HANDLER(name, function, binding)   \
  API XLA_FFI_Error *name(XLA_FFI_CallFrame *); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, described_by(binding))
HANDLER(gru_cuda_xla_forward, on_device<false>, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void *>>());
HANDLER(gru_cuda_xla_backward, on_device<true>, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void *>>());
HANDLER(gru_cuda_xla_forward_host, on_host<false>, ffi::Ffi::Bind());
HANDLER(gru_cuda_xla_backward_host, on_host<true>, ffi::Ffi::Bind());
#endif
