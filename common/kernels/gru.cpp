// The GRU layer of gru.h. First the input's share of the pre-activations, x W' + b, for all inputs.
// Then the recurrence: each item of work, some rows of the batch in one direction, goes through all
// its time steps in one thread that never waits for another; the recurrent weights stay in that
// core's cache. Backward, the recurrence comes first. The order in which numbers are added up depends
// on the sizes alone, so results do not depend on the threads.
//
// Plain flags will do: c++ -O3 -std=c++17 -fPIC -shared -pthread gru.cpp -o libgru.so. Whole
// vectors are the compiler's own (GCC's and Clang's vector extensions); instruction_set.h is
// compiled once for each instruction set, and the processor is asked which to use.
#include "gru.h"

#include <string.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "pool.h"

namespace {

// Rows of an item, at most. More rows read the weights from the cache less often; fewer give more
// items to share out. Items are a power of two, so that they come out even on 2, 4, 8 ... cores. An
// item of fewer than min_rows takes nearly as long as one of twice as many.
constexpr int64_t max_rows = 16, min_rows = 4;

// Rows, over several steps, that the weights' gradient is computed from at once. With fewer, reading
// and writing the gradient takes more of the time; with more, its rounding errors grow.
constexpr int64_t chunk_rows = 128;

// The same for the inputs of the input product; and panels of the columns of its result. Together,
// and with the weights, they are what a core multiplies without waking another.
constexpr int64_t input_rows = 96, input_panels = 4;

// The gradient of the inputs' weights is a sum over all live rows: how many of its rows, and bytes of
// each, are added up at once. With fewer, memory is read more often; with more, the sums leave the
// second cache.
constexpr int64_t gradient_rows = 192, gradient_bytes = 640;

// Elements to be copied or added up, and multiplications, that are worth waking another thread for.
constexpr int64_t worth_sharing = 1 << 19, worth_multiplying = 1 << 21;

// And that are worth asking whether OpenMP's threads spin: that takes a microsecond.
constexpr int64_t worth_asking = 1 << 24;

// Units of a step, at least, that are worth a turn of their own: to wait for the others takes time.
constexpr int64_t worth_a_turn = 64;

struct Item {
  int direction;
  int64_t first, rows;                       // first: how many rows the items before it have
  const int32_t *row;                        // [rows] into the batch, longest first
  const int32_t *active;                     // [steps] rows, from the first, that have this step
  int32_t *slot;                             // [distinct] row of d_projections below, or -1
  void *d_projections, *d_weights, *d_bias;  // this item's share, padded
};

// What is computed of a step, for units [from, to): z and r, or n and the state, or both. Where the
// reset comes first, n takes r of all units, and so waits for a turn of its own.
struct Turn {
  int64_t step;
  bool gates, candidates;
  int64_t from, to;
};

// The turns of all of an item's steps: whoever comes takes the next, and waits for all of the step
// before to be done. On a busy machine, where that takes long, one thread goes on alone.
struct Turns {
  alignas(64) std::atomic<int64_t> taken{0};
  alignas(64) std::atomic<int64_t> done{0};
  std::atomic<bool> busy{false};
};

// A part of a product: rows [from, to), panels [first, last).
struct Part {
  int direction;
  int64_t from, to, first, last;
};

struct Call {
  const gru_problem *problem;
  const gru_direction *directions;
  const Item *items;  // directions * blocks of them
  int64_t blocks, chunk;
  // Distances in memory, padded to vectors: of the states' rows, the gates of a row, the rows of
  // gates, the rows of the weights' gradient, the rows of inputs.
  int64_t state_stride, gate_stride, gates_stride, weight_stride, input_stride;
  // The live rows of x, those that some step reads, are what the input product is of. Of each, which
  // row of x it is, and of each row of x, which of them; NULL where all are.
  int64_t live;
  const int64_t *live_rows, *place;
  void *packed[2], *packed_inputs[2];
  void *projections[2];  // [live, 3 gates]; backward: their gradient
  void *inputs;          // backward: the live rows in panels

  // The first row of a gate's weights, and whether they are negated.
  int64_t rows_of(int64_t gate) const {
    return (problem->nn_order && gate < 2 ? 1 - gate : gate) * problem->hidden;
  }
  int sign_of(int64_t gate) const { return problem->nn_order && gate == 0 ? -1 : 1; }

  int64_t row(int64_t i) const { return live_rows ? live_rows[i] : i; }
  template <class T>
  const T *input(int64_t i) const {
    return (const T *)problem->x + row(i) * problem->inputs;
  }
  // How many panels of two vectors of width V that many columns have.
  static int64_t panels(int64_t columns, int64_t V) { return (columns + 2 * V - 1) / (2 * V); }
};

// Whether a direction starts anew before step t in the item's row i, which has that step.
inline bool resets_at(const gru_problem &p, const gru_direction &d, const Item &item, int64_t t,
                      int64_t i) {
  const int64_t begin = t + (d.reverse ? 1 : 0);  // backward, it is the step after this that begins
  return begin < p.steps && i < item.active[begin] && p.resets[begin * p.batch + item.row[i]];
}

// An element of the state that it starts anew from.
template <class T>
T reset_state(const gru_direction &d, int64_t at) {
  return d.h_reset ? ((const T *)d.h_reset)[at] : T(0);
}

// Hands out aligned pieces of memory; from nowhere, it measures how much is needed.
struct Arena {
  uintptr_t at = 0;
  template <class T>
  T *take(int64_t count) {
    const uintptr_t piece = at;
    at += (count * sizeof(T) + 63) / 64 * 64;
    return (T *)piece;
  }
};

// What products multiply: numbers, or two bfloat16 numbers that follow one another in the sum, the
// first in the lower half.
struct __attribute__((may_alias)) Pair {
  uint32_t bits;
};

template <class E>
constexpr int64_t numbers = 1;
template <>
constexpr int64_t numbers<Pair> = 2;

// What the elements are of, and what their products are added up in.
template <class E>
using Number = std::conditional_t<std::is_same_v<E, Pair>, float, E>;

// Elements that a sum over n numbers has.
template <class E>
constexpr int64_t depth(int64_t n) {
  return (n + numbers<E> - 1) / numbers<E>;
}

// What a thread works in.
template <class T>
struct Scratch {
  T *h, *after, *z, *r, *operand, *tile, *gates, *states, *operands, *inputs, *sums;
  T *factor;                 // a product's left factor in pairs
  const T **source, **next;  // the projections of this step and the next
  Scratch(Arena &arena, const Call &call, int64_t rows, int64_t width, bool backward)
      : h(arena.take<T>(rows * call.state_stride)),
        after(arena.take<T>(backward ? 0 : rows * call.state_stride)),
        z(arena.take<T>(rows * call.state_stride)),
        r(arena.take<T>(backward ? 0 : rows * call.state_stride)),
        operand(arena.take<T>(backward ? 0 : rows * call.state_stride)),
        tile(arena.take<T>(rows * 2 * width)),
        gates(arena.take<T>(backward ? call.chunk * call.gates_stride : 0)),
        states(arena.take<T>(backward ? call.chunk * call.state_stride : 0)),
        operands(arena.take<T>(backward ? call.chunk * call.state_stride : 0)),
        inputs(arena.take<T>((backward ? gradient_rows : input_rows * call.input_stride) + width)),
        sums(arena.take<T>(backward ? gradient_rows * gradient_bytes / sizeof(T) : 0)),
        factor(arena.take<T>(
            call.problem->bfloat16 ? call.problem->directions * input_rows * call.gates_stride : 0)),
        source(arena.take<const T *>(rows)),
        next(arena.take<const T *>(rows)) {}

  T *state(int64_t step) const { return step % 2 ? after : h; }  // that the step begins from
};

template <class T>
struct Kernels {
  int64_t width;
  void (*pack_input_weights)(const Call &, int direction, bool backward);
  void (*pack_weights)(const Call &, int direction, bool backward);
  void (*project)(const Call &, const Scratch<T> &, const Part &);
  void (*forward)(const Call &, const Item &, const Scratch<T> &shared, const Scratch<T> &own,
                  const Turn &);
  void (*backward)(const Call &, const Item &, const Scratch<T> &);
  void (*reduce_weights)(const Call &, int direction, int64_t from, int64_t to);
  void (*reduce_projections)(const Call &, int direction, int64_t from, int64_t to);
  void (*pack_inputs)(const Call &, int64_t from, int64_t to);
  void (*input_weight_gradient)(const Call &, const Scratch<T> &, const Part &);
  void (*input_gradient)(const Call &, const Scratch<T> &, const Part &);
  uint64_t (*fingerprint)(const void *, int64_t);
};

#if defined(__x86_64__) || defined(__i386__)
#define INSTRUCTION_SET avx512
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define VECTOR_BYTES 64
#define TILE_ROWS 12
#include "instruction_set.h"
#define INSTRUCTION_SET avx512bf16
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")))
#define VECTOR_BYTES 64
#define TILE_ROWS 12
#define BFLOAT16_INSTRUCTION
#include "instruction_set.h"
#define INSTRUCTION_SET avx2
#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#include "instruction_set.h"
#endif

#define INSTRUCTION_SET baseline
#define TARGET
#define VECTOR_BYTES 16
#ifdef __aarch64__
#define TILE_ROWS 12
#else
#define TILE_ROWS 6
#endif
#include "instruction_set.h"

struct InstructionSet {
  const char *name;
  bool (*supported)();
  Kernels<float> of_float;
  Kernels<double> of_double;
  Kernels<float> of_pairs;
  template <class T>
  const Kernels<T> &of(bool bfloat16) const {
    if constexpr (std::is_same_v<T, double>)
      return of_double;
    else
      return bfloat16 ? of_pairs : of_float;
  }
};

#if defined(__x86_64__) || defined(__i386__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("fma");
}
#endif

const InstructionSet instruction_sets[] = {
// best first
#if defined(__x86_64__) || defined(__i386__)
    {"avx512bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); },
     avx512::kernels<float>, avx512::kernels<double>, avx512bf16::kernels<Pair>},
    {"avx512", has_avx512, avx512::kernels<float>, avx512::kernels<double>, avx512::kernels<Pair>},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::kernels<float>, avx2::kernels<double>, avx2::kernels<Pair>},
#endif
    {"baseline", [] { return true; }, baseline::kernels<float>, baseline::kernels<double>,
     baseline::kernels<Pair>},
};

const InstructionSet *find_instruction_set(const char *name) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#endif
  for (const InstructionSet &set : instruction_sets)
    if ((!name || !strcmp(name, set.name)) && set.supported()) return &set;
  return nullptr;
}

std::atomic<const InstructionSet *> chosen{nullptr};

const InstructionSet &instruction_set() {
  if (!chosen) chosen = find_instruction_set(nullptr);
  return *chosen;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of a power of two bytes apart compete for the same few places of a cache: an odd number of
// vectors apart, they do not.
int64_t odd_stride(int64_t n, int64_t width) { return (n / width | 1) * width + n % width; }

// The rows by length, longest first, dealt into items like cards, so that every item has its share
// of the long ones, and the rows of an item that are still running are always its first.
struct Deal {
  std::vector<int32_t> row, active, slots;  // what the items point into
  std::vector<int64_t> distinct;            // tokens of each block: rows of its d_projections
  std::vector<Item> items;                  // [directions, blocks]
  std::vector<int64_t> live_rows, place;    // see Call; empty where all rows of x are live

  Deal(const gru_problem &p, int64_t blocks, bool backward)
      : active(blocks * p.steps),
        slots(backward && p.tokens ? blocks * p.distinct : 0, -1),
        distinct(blocks),
        items(p.directions * blocks) {
    std::vector<int32_t> order(p.batch);
    std::iota(order.begin(), order.end(), 0);
    if (p.lengths)
      std::stable_sort(order.begin(), order.end(),
                       [&](int a, int b) { return p.lengths[a] > p.lengths[b]; });
    row.reserve(p.batch);
    for (int64_t block = 0; block < blocks; ++block) {
      Item item = {};
      item.first = (int64_t)row.size();
      item.row = row.data() + row.size();
      for (int64_t b = block; b < p.batch; b += blocks, ++item.rows) row.push_back(order[b]);
      if (!slots.empty()) item.slot = slots.data() + block * p.distinct;
      int32_t *const running = active.data() + block * p.steps;
      int64_t still = item.rows;
      for (int64_t t = 0; t < p.steps; ++t) {
        while (still && p.lengths && p.lengths[item.row[still - 1]] <= t) --still;
        running[t] = (int32_t)still;
        for (int64_t i = 0; item.slot && i < still; ++i)
          item.slot[p.tokens[t * p.batch + item.row[i]]] = 0;
      }
      item.active = running;
      for (int64_t k = 0; item.slot && k < p.distinct; ++k)
        if (!item.slot[k]) item.slot[k] = (int32_t)distinct[block]++;
      for (int direction = 0; direction < p.directions; ++direction) {
        item.direction = direction;
        items[direction * blocks + block] = item;
      }
    }
    find_live(p, blocks);
  }

 private:
  void find_live(const gru_problem &p, int64_t blocks) {
    bool ragged = p.tokens;
    for (int64_t b = 0; b < p.batch && !ragged && p.lengths; ++b) ragged = p.lengths[b] < p.steps;
    if (!ragged) return;
    place.assign(p.distinct, 0);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t t = 0; t < p.steps; ++t)
        for (int64_t i = 0; i < items[block].active[t]; ++i) {
          const int64_t at = t * p.batch + items[block].row[i];
          place[p.tokens ? p.tokens[at] : at] = 1;
        }
    for (int64_t row = 0; row < p.distinct; ++row)
      if (place[row]) {
        place[row] = (int64_t)live_rows.size();
        live_rows.push_back(row);
      }
  }
};

// Cuts a product of so many rows, panels and directions into parts of at most so many rows and
// panels, and, where these are not enough, of fewer panels: how many a part has makes no difference to
// the sums, but how many rows does.
std::vector<Part> cut(int directions, int64_t rows, int64_t panels, int64_t most_rows,
                      int64_t most_panels, int64_t enough = 1) {
  const int64_t down = (rows + most_rows - 1) / most_rows, stacks = directions * down;
  const int64_t fewest = (panels + most_panels - 1) / most_panels;
  const int64_t across =
      std::min(panels, std::max(fewest, stacks ? (enough + stacks - 1) / stacks : 0));
  std::vector<Part> parts;
  parts.reserve(directions * down * across);
  for (int direction = 0; direction < directions; ++direction)
    for (int64_t i = 0; i < down; ++i)
      for (int64_t j = 0; j < across; ++j)
        parts.push_back({direction, rows * i / down, rows * (i + 1) / down, panels * j / across,
                         panels * (j + 1) / across});
  return parts;
}

// Calls visit(array, first element, elements) for the weights of a direction that belong to a piece.
// There are two pieces of about the same size, for two threads.
template <class Visit>
void visit_piece(const gru_problem &p, int piece, const Visit &visit) {
  const int64_t gate = p.hidden * p.inputs;
  if (piece == 0) return visit(&gru_direction::weight_ih, 0, 2 * gate);
  visit(&gru_direction::weight_ih, 2 * gate, gate);
  visit(&gru_direction::weight_hh, 0, 3 * p.hidden * p.hidden);
  visit(&gru_direction::bias_ih, 0, 3 * p.hidden);
  visit(&gru_direction::bias_hh, 0, 3 * p.hidden);
}

template <class T>
uint64_t fingerprint(const Kernels<T> &kernels, const gru_problem &p, const gru_direction &d,
                     int piece) {
  uint64_t result = 0;
  visit_piece(p, piece, [&](auto array, int64_t first, int64_t count) {
    result = result * 0x9E3779B97F4A7C15u +
             kernels.fingerprint((const T *)(d.*array) + first, count * (sizeof(T) / 4));
  });
  return result;
}

template <class T>
void copy_piece(const gru_problem &p, const gru_direction &from, const gru_direction &to, int piece) {
  visit_piece(p, piece, [&](auto array, int64_t first, int64_t count) {
    if (count) memcpy((T *)(to.*array) + first, (const T *)(from.*array) + first, count * sizeof(T));
  });
}

// A problem whose lengths, tokens and resets are copies of the caller's. Another thread may write to
// the caller's arrays during the call (a data loader that reuses one buffer, a NumPy array that XLA
// reads in place), so every index is read once, here, and the copy is validated.
struct OwnIndices {
  gru_problem problem;
  int status = GRU_OK;

  explicit OwnIndices(const gru_problem &given) : problem(given) {
    const int64_t B = given.batch, cells = given.steps * B;
    memory.reset(new char[(B + cells) * sizeof(int32_t) + cells]);
    char *at = memory.get();
    copy(problem.lengths, B, at);
    copy(problem.tokens, cells, at);
    copy(problem.resets, cells, at);
    if (!in_range(problem.lengths, B, given.steps)) status = GRU_BAD_LENGTH;
    else if (!in_range(problem.tokens, cells, given.distinct - 1)) status = GRU_BAD_TOKEN;
  }

 private:
  std::unique_ptr<char[]> memory;

  template <class Index>
  static void copy(const Index *&array, int64_t count, char *&at) {
    if (!array) return;
    array = (const Index *)memcpy(at, array, count * sizeof(Index));
    at += count * sizeof(Index);
  }

  static bool in_range(const int32_t *array, int64_t count, int64_t limit) {
    int32_t lowest = 0, highest = -1;
    for (int64_t i = 0; array && i < count; ++i) {
      lowest = std::min(lowest, array[i]);
      highest = std::max(highest, array[i]);
    }
    return lowest == 0 && highest <= limit;
  }
};

template <class T>
int execute(const gru_problem &p, const gru_direction *directions, bool backward) {
  const Kernels<T> &kernels = instruction_set().of<T>(p.bfloat16);
  const int64_t steps = p.steps, B = p.batch, D = p.inputs, H = p.hidden, V = kernels.width;
  Call call = {};
  call.problem = &p;
  call.directions = directions;
  call.blocks = 1;
  while (call.blocks * max_rows < B || (call.blocks < 2 && B >= 2 * min_rows)) call.blocks *= 2;
  const int64_t blocks = call.blocks, rows = (B + blocks - 1) / blocks;
  call.chunk = std::max(rows, chunk_rows);
  call.gate_stride = round_up(H, V);
  call.weight_stride = round_up(H, 2 * V);
  call.state_stride = odd_stride(call.weight_stride, V);
  call.gates_stride = odd_stride(round_up(3 * call.gate_stride, 2 * V), V);
  call.input_stride = odd_stride(round_up(D, V), V);
  const int64_t columns = 3 * call.gate_stride;
  // Where there are no inputs, there is a panel of none: their weights have no gradient, b has.
  const int64_t panels = Call::panels(columns, V);
  const int64_t panels_of_x = std::max<int64_t>(Call::panels(D, V), 1);
  const int threads = std::max(1, std::min(p.threads, count_cores()));
  auto sharing = [&](int64_t work, int64_t worth) { return work > worth ? threads : 1; };

  Pool &pool = Pool::lock(threads);
  std::lock_guard<std::mutex> lock(pool.in_use, std::adopt_lock);
  const int64_t most = p.directions * 3 * H * (p.distinct * D + steps * B * H);
  const bool seen = p.openmp == GRU_WHILE_SPINNING && sharing(most, worth_asking) > 1 &&
                    pool.openmp_spins();
  pool.openmp = p.openmp == GRU_ALWAYS || seen ? find_openmp() : nullptr;
  pool.team = p.threads;
  Deal deal(p, blocks, backward);
  std::vector<Item> &items = deal.items;
  call.items = items.data();
  call.live = deal.place.empty() ? p.distinct : (int64_t)deal.live_rows.size();
  if (!deal.place.empty()) call.live_rows = deal.live_rows.data(), call.place = deal.place.data();

  const int64_t of_input = backward ? p.d_x ? panels_of_x * columns : 0 : panels * (D + 1);
  const int64_t packed = 3 * H * call.weight_stride + of_input * 2 * V;
  bool inference = !backward;
  for (int i = 0; i < p.directions; ++i) inference = inference && !directions[i].saved;
  std::vector<Packed *> kept;
  for (int i = 0; inference && i < p.directions; ++i) {
    const gru_direction &d = directions[i];
    kept.push_back(&pool.find({(int64_t)d.weight_ih, (int64_t)d.weight_hh, H, D, i, p.is_double,
                               p.bfloat16, p.reset_after, p.nn_order, V}));
    call.packed[i] = kept[i]->memory.reserve(packed * sizeof(T));
  }
  std::vector<Scratch<T>> scratch;
  auto lay_out = [&](Arena arena) {
    scratch.clear();
    for (int direction = 0; direction < p.directions; ++direction) {
      if (!inference) call.packed[direction] = arena.take<T>(packed);
      call.packed_inputs[direction] = (T *)call.packed[direction] + 3 * H * call.weight_stride;
      call.projections[direction] = arena.take<T>(call.live * call.gates_stride);
    }
    call.inputs = arena.take<T>(backward ? panels_of_x * call.live * 2 * V : 0);
    for (int thread = 0; thread < threads; ++thread)
      scratch.emplace_back(arena, call, rows, V, backward);
    for (size_t i = 0; backward && i < items.size(); ++i) {
      items[i].d_weights = arena.take<T>(3 * call.gate_stride * call.weight_stride);
      items[i].d_bias = arena.take<T>(3 * call.gate_stride);
      items[i].d_projections = arena.take<T>(deal.distinct[i % blocks] * 3 * call.gate_stride);
    }
    return arena.at;
  };
  const size_t bytes = lay_out(Arena{});
  lay_out(Arena{(uintptr_t)pool.memory.reserve(bytes)});

  for (int direction = 0; !backward && direction < p.directions; ++direction)
    if (directions[direction].saved)
      want_huge_pages(directions[direction].saved,
                      gru_saved_size(steps, B, H, p.reset_after) * sizeof(T));
  std::atomic<bool> packed_before[2] = {};
  for (int i = 0; inference && i < p.directions; ++i) packed_before[i] = kept[i]->filled;
  auto pack = [&] {
    bool complete = true;
    for (int i = 0; i < p.directions; ++i) complete = complete && packed_before[i];
    if (complete) return;
    const int packing = sharing(p.directions * 3 * H * (H + D), worth_sharing);
    gru_direction sources[2] = {};
    std::copy_n(directions, p.directions, sources);
    // Another thread may write to the weights meanwhile. What an inference keeps is therefore packed
    // from a copy, and the fingerprint is that of the copy: it can stand for no other weights.
    if (inference) {
      const size_t size = (3 * H * (D + H + 2) * sizeof(T) + 4 * 64) * p.directions;
      Arena arena{(uintptr_t)pool.copies.reserve(size)};
      for (gru_direction &copy : sources) {
        copy.weight_ih = arena.take<T>(3 * H * D);
        copy.weight_hh = arena.take<T>(3 * H * H);
        copy.bias_ih = arena.take<T>(3 * H);
        copy.bias_hh = arena.take<T>(3 * H);
      }
      pool.run(2 * p.directions, packing, [&](int64_t i, int) {
        const int direction = (int)i / 2, piece = (int)i % 2;
        if (packed_before[direction]) return;
        copy_piece<T>(p, directions[direction], sources[direction], piece);
        kept[direction]->fingerprint[piece] = fingerprint(kernels, p, sources[direction], piece);
      });
    }
    Call from = call;
    from.directions = sources;
    pool.run(2 * p.directions, packing, [&](int64_t i, int) {
      const int direction = (int)i / 2;
      if (packed_before[direction]) return;
      if (i % 2 && (!backward || p.d_x)) kernels.pack_input_weights(from, direction, backward);
      if (i % 2 == 0) kernels.pack_weights(from, direction, backward);
    });
    for (Packed *each : kept) each->filled = true;
  };
  const int64_t multiplications = p.directions * call.live * 3 * H * D;
  const int multiplying = sharing(multiplications, worth_multiplying);
  auto multiply = [&](const std::vector<Part> &parts, auto product) {
    pool.run((int64_t)parts.size(), multiplying,
             [&](int64_t i, int thread) { product(call, scratch[thread], parts[i]); });
  };
  // What was packed before is taken to be right, and looked at beside the recurrence.
  const int64_t looked_at = inference ? p.directions * 3 * H * (H + D) : 0;
  const int64_t states = p.directions * steps * B * 3 * H * H + looked_at * 8;
  // Where there is but one item, threads take turns at it.
  const int sharers = sharing(states, worth_multiplying);
  const bool shared = !backward && items.size() == 1 && sharers > 1 && H >= 2 * worth_a_turn;
  const int64_t parts = shared ? H / worth_a_turn : 1;
  const int64_t helpers = std::min<int64_t>(parts, sharers) - 1;
  // A thread that is done with its items looks at a piece; one that comes to take turns, at both of
  // a direction, before.
  const int64_t looks = inference ? 2 * p.directions : 0, pieces = shared ? 2 : 1;
  const int64_t count = (int64_t)items.size() + std::max(looks / pieces, helpers);
  auto begin = [&](const Item &item, const Scratch<T> &all) {
    const gru_direction &d = directions[item.direction];
    for (int64_t i = 0; i < item.rows; ++i) {
      const bool anew = p.resets && steps && resets_at(p, d, item, d.reverse ? steps - 1 : 0, i);
      T *const h = all.h + i * call.state_stride;
      for (int64_t u = 0; u < call.state_stride; ++u) {
        const int64_t at = item.row[i] * H + u;
        h[u] = u >= H ? T(0) : anew ? reset_state<T>(d, at) : d.h0 ? ((const T *)d.h0)[at] : T(0);
      }
    }
  };
  auto finish = [&](const Item &item, const Scratch<T> &all) {
    for (int64_t i = 0; i < item.rows; ++i)
      memcpy((T *)directions[item.direction].h_last + item.row[i] * H,
             all.state(steps) + i * call.state_stride, H * sizeof(T));
  };
  auto take_turns = [&](const Item &item, const Scratch<T> &all, const Scratch<T> &own,
                        Turns &turns, bool to_the_end) {
    const int64_t pairs = call.weight_stride / (2 * V), halves = p.reset_after ? 1 : 2;
    while (to_the_end || !turns.busy) {
      const int64_t turn = turns.taken.fetch_add(1), half = turn / parts, part = turn % parts;
      if (half >= steps * halves) return;
      if (Pool::wait([&] { return turns.done >= half * parts; })) turns.busy = true;
      kernels.forward(call, item, all, own,
                      {half / halves, half % halves == 0, (half + 1) % halves == 0,
                       pairs * part / parts * 2 * V, pairs * (part + 1) / parts * 2 * V});
      turns.done.fetch_add(1);
    }
  };
  std::atomic<bool> changed;
  auto look = [&](int direction, int piece) {
    if (packed_before[direction] && fingerprint(kernels, p, directions[direction], piece) !=
                                        kept[direction]->fingerprint[piece])
      packed_before[direction] = false, changed = true;
  };
  do {
    changed = false;
    pack();
    if (!backward)
      multiply(cut(p.directions, call.live, panels, input_rows, input_panels), kernels.project);
    Turns turns;
    if (shared) begin(items[0], scratch[0]);
    pool.run(count, sharers, [&](int64_t i, int thread) {
      const int64_t beside = i - (int64_t)items.size();
      for (int64_t j = beside * pieces; beside >= 0 && j < (beside + 1) * pieces && j < looks; ++j)
        look((int)j / 2, (int)j % 2);
      if (shared) return take_turns(items[0], scratch[0], scratch[thread], turns, i == 0);
      if (beside >= 0) return;
      if (!backward) {
        Turns own;
        begin(items[i], scratch[thread]);
        take_turns(items[i], scratch[thread], scratch[thread], own, true);
        return finish(items[i], scratch[thread]);
      }
      memset(items[i].d_weights, 0, 3 * call.gate_stride * call.weight_stride * sizeof(T));
      memset(items[i].d_bias, 0, 3 * call.gate_stride * sizeof(T));
      memset(items[i].d_projections, 0,
             deal.distinct[i % blocks] * 3 * call.gate_stride * sizeof(T));
      kernels.backward(call, items[i], scratch[thread]);
    });
    if (shared) finish(items[0], scratch[0]);
  } while (changed);
  if (backward) {
    const int64_t some = 128, of_weights = (3 * H + some - 1) / some;
    const int64_t of_rows = (call.live + some - 1) / some;
    const int64_t of_tokens = p.tokens ? of_rows : 0, each = of_weights + of_tokens;
    const int64_t elements = p.directions * blocks * 3 * H * (H + call.live) + call.live * D;
    pool.run(of_rows + p.directions * each, sharing(elements, worth_sharing), [&](int64_t i, int) {
      auto up_to = [&](int64_t from, int64_t end) { return std::min(from + some, end); };
      if (i < of_rows) return kernels.pack_inputs(call, i * some, up_to(i * some, call.live));
      const int direction = (int)((i - of_rows) / each);
      const int64_t part = (i - of_rows) % each, at = part * some, row = at - of_weights * some;
      if (row < 0) return kernels.reduce_weights(call, direction, at, up_to(at, 3 * H));
      kernels.reduce_projections(call, direction, row, up_to(row, call.live));
    });
    const int64_t most = gradient_bytes / (int64_t)(2 * V * sizeof(T));
    multiply(cut(p.directions, columns, panels_of_x, gradient_rows, most, 2 * multiplying),
             kernels.input_weight_gradient);
    if (p.d_x && !deal.place.empty()) memset(p.d_x, 0, p.distinct * D * sizeof(T));
    if (p.d_x)
      multiply(cut(1, call.live, panels_of_x, input_rows, input_panels), kernels.input_gradient);
  }
  pool.finish();
  return GRU_OK;
}

int compute(const gru_problem &problem, const gru_direction *directions, bool backward) try {
  const OwnIndices own(problem);
  if (own.status != GRU_OK) return own.status;
  return problem.is_double ? execute<double>(own.problem, directions, backward)
                           : execute<float>(own.problem, directions, backward);
} catch (const std::bad_alloc &) {
  return GRU_OUT_OF_MEMORY;
}

}  // namespace

extern "C" {

int gru_forward(const gru_problem *problem, const gru_direction *directions) {
  return compute(*problem, directions, false);
}

int gru_backward(const gru_problem *problem, const gru_direction *directions) {
  return compute(*problem, directions, true);
}

int64_t gru_saved_size(int64_t steps, int64_t batch, int64_t hidden, int32_t reset_after) {
  return steps * batch * hidden * (reset_after ? 5 : 4);
}

int gru_bfloat16(void) { return find_instruction_set("avx512bf16") != nullptr; }

const char *gru_instruction_set(const char *name) {
  if (name) {
    const InstructionSet *set = find_instruction_set(name);
    if (!set) return nullptr;
    chosen = set;
  }
  return instruction_set().name;
}

}  // extern "C"
