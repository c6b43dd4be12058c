// The GRU recurrence of gru.h. Each item of work, some rows of the batch in one direction, goes
// through all its time steps in one thread that never waits for another; the recurrent weights are
// packed once a call and stay in that core's cache. How rows are dealt into items, and the order in
// which gradients are added up, depend on the sizes alone, so results do not depend on the threads.
//
// Plain flags will do: c++ -O3 -std=c++17 -fPIC -shared -pthread gru.cpp -o libgru.so. Whole
// vectors are the compiler's own (GCC's and Clang's vector extensions); recurrence.h is compiled
// once for each instruction set, and the processor is asked which to use.
#include "gru.h"

#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <numeric>
#include <vector>

#include "pool.h"

namespace {

// Rows of an item, at most. More rows read the weights from the cache less often; fewer give more
// items to share out. Items are a power of two, so that they come out even on 2, 4, 8 ... cores.
constexpr int64_t max_rows = 16;

// Rows, over several steps, that the weights' gradient is computed from at once. With more, they and
// the weights do not fit into a core's own cache together.
constexpr int64_t chunk_rows = 64;

// Elements to be copied or added up that are worth waking another thread for.
constexpr int64_t worth_sharing = 1 << 19;

struct Item {
  int direction;
  int64_t first, rows;                       // first: how many rows the items before it have
  const int32_t *row;                        // [rows] into the batch, longest first
  const int32_t *active;                     // [steps] rows, from the first, that have this step
  int32_t *slot;                             // [distinct] row of d_projections below, or -1
  void *d_projections, *d_weights, *d_bias;  // this item's share, padded
};

struct Call {
  const gru_problem *problem;
  const gru_direction *directions;
  const Item *items;  // directions * blocks of them
  int64_t blocks, chunk;
  // Distances in memory, padded to vectors: of the states' rows, the gates of a row, the rows of
  // gates, the rows of the weights' gradient.
  int64_t state_stride, gate_stride, gates_stride, weight_stride;
  void *packed[2];
};

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

// What a thread works in.
template <class T>
struct Scratch {
  T *h, *z, *r, *operand, *tile, *gates, *states, *operands;
  const T **source, **next;  // the projections of this step and the next
  Scratch(Arena &arena, const Call &call, int64_t rows, int64_t width, bool backward)
      : h(arena.take<T>(rows * call.state_stride)),
        z(arena.take<T>(rows * call.state_stride)),
        r(arena.take<T>(backward ? 0 : rows * call.state_stride)),
        operand(arena.take<T>(backward ? 0 : rows * call.state_stride)),
        tile(arena.take<T>(rows * 2 * width)),
        gates(arena.take<T>(backward ? call.chunk * call.gates_stride : 0)),
        states(arena.take<T>(backward ? call.chunk * call.state_stride : 0)),
        operands(arena.take<T>(backward ? call.chunk * call.state_stride : 0)),
        source(arena.take<const T *>(rows)),
        next(arena.take<const T *>(rows)) {}
};

template <class T>
struct Kernels {
  int64_t width;
  void (*pack)(const Call &, int direction, bool backward);
  void (*forward)(const Call &, const Item &, const Scratch<T> &);
  void (*backward)(const Call &, const Item &, const Scratch<T> &);
  void (*reduce_weights)(const Call &, int direction, int64_t from, int64_t to);
  void (*reduce_projections)(const Call &, int direction, int64_t from, int64_t to);
};

#if defined(__x86_64__) || defined(__i386__)
#define INSTRUCTION_SET avx512
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define VECTOR_BYTES 64
#define TILE_ROWS 12
#include "recurrence.h"
#define INSTRUCTION_SET avx2
#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#include "recurrence.h"
#endif

#define INSTRUCTION_SET baseline
#define TARGET
#define VECTOR_BYTES 16
#ifdef __aarch64__
#define TILE_ROWS 12
#else
#define TILE_ROWS 6
#endif
#include "recurrence.h"

struct InstructionSet {
  const char *name;
  bool (*supported)();
  Kernels<float> of_float;
  Kernels<double> of_double;
  template <class T>
  const Kernels<T> &of() const;
};
template <>
const Kernels<float> &InstructionSet::of<float>() const {
  return of_float;
}
template <>
const Kernels<double> &InstructionSet::of<double>() const {
  return of_double;
}

const InstructionSet instruction_sets[] = {
// best first
#if defined(__x86_64__) || defined(__i386__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("fma");
     },
     avx512::kernels<float>, avx512::kernels<double>},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::kernels<float>, avx2::kernels<double>},
#endif
    {"baseline", [] { return true; }, baseline::kernels<float>, baseline::kernels<double>},
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

// What a forward saves is mostly memory that the framework has just got from the system. Asking for
// huge pages saves thousands of page faults, which would take a fifth of the forward's time.
void want_huge_pages(void *memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t from = ((uintptr_t)memory + page - 1) / page * page;
  const uintptr_t to = ((uintptr_t)memory + bytes) / page * page;
  if (from < to) madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// The rows by length, longest first, dealt into items like cards, so that every item has its share
// of the long ones, and the rows of an item that are still running are always its first.
struct Deal {
  std::vector<int32_t> row, active, slots;  // what the items point into
  std::vector<int64_t> distinct;            // tokens of each block: rows of its d_projections
  std::vector<Item> items;                  // [directions, blocks]

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
  }
};

template <class T>
int execute(const gru_problem &p, const gru_direction *directions, bool backward) {
  const Kernels<T> &kernels = instruction_set().of<T>();
  const int64_t steps = p.steps, B = p.batch, H = p.hidden, V = kernels.width;
  for (int64_t b = 0; p.lengths && b < B; ++b)
    if (p.lengths[b] < 0 || p.lengths[b] > steps) return GRU_BAD_LENGTH;
  for (int64_t i = 0; p.tokens && i < steps * B; ++i)
    if (p.tokens[i] < 0 || p.tokens[i] >= p.distinct) return GRU_BAD_TOKEN;

  Call call = {&p, directions, nullptr, 1, 0, 0, 0, 0, 0, {}};
  while (call.blocks < B && (call.blocks < 2 || call.blocks * max_rows < B)) call.blocks *= 2;
  call.blocks = std::min(call.blocks, std::max<int64_t>(B, 1));
  const int64_t blocks = call.blocks, rows = (B + blocks - 1) / blocks;
  call.chunk = std::max(rows, chunk_rows);
  call.gate_stride = round_up(H, V);
  call.weight_stride = round_up(H, 2 * V);
  call.state_stride = odd_stride(call.weight_stride, V);
  call.gates_stride = odd_stride(3 * call.gate_stride, V);
  const int threads = std::max(1, std::min(p.threads, count_cores()));

  Pool &pool = Pool::get();
  std::lock_guard<std::mutex> lock(pool.in_use);
  pool.openmp = p.openmp ? find_openmp() : nullptr;
  try {
    Deal deal(p, blocks, backward);
    std::vector<Item> &items = deal.items;
    call.items = items.data();

    std::vector<Scratch<T>> scratch;
    auto lay_out = [&](Arena arena) {
      scratch.clear();
      for (int direction = 0; direction < p.directions; ++direction)
        call.packed[direction] = arena.take<T>(3 * H * call.weight_stride);
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
    lay_out(Arena{(uintptr_t)pool.memory(bytes)});

    for (int direction = 0; !backward && direction < p.directions; ++direction)
      if (directions[direction].saved)
        want_huge_pages(directions[direction].saved,
                        gru_saved_size(steps, B, H, p.reset_after) * sizeof(T));
    const int packers = p.directions * 3 * H * H > worth_sharing ? threads : 1;
    pool.run(p.directions, packers, [&](int64_t i, int) { kernels.pack(call, (int)i, backward); });
    pool.run((int64_t)items.size(), threads, [&](int64_t i, int thread) {
      if (!backward) return kernels.forward(call, items[i], scratch[thread]);
      memset(items[i].d_weights, 0, 3 * call.gate_stride * call.weight_stride * sizeof(T));
      memset(items[i].d_bias, 0, 3 * call.gate_stride * sizeof(T));
      memset(items[i].d_projections, 0,
             deal.distinct[i % blocks] * 3 * call.gate_stride * sizeof(T));
      kernels.backward(call, items[i], scratch[thread]);
    });
    if (backward) {
      const int64_t some = 128, weights = (3 * H + some - 1) / some;
      const int64_t projections = p.tokens ? (p.distinct + some - 1) / some : 0;
      const int64_t elements = p.directions * blocks * 3 * H * (H + (p.tokens ? p.distinct : 0));
      const int adders = elements > worth_sharing ? threads : 1;
      pool.run(p.directions * (weights + projections), adders, [&](int64_t i, int) {
        const int direction = (int)(i / (weights + projections));
        const int64_t part = i % (weights + projections), from = part * some;
        if (part < weights)
          return kernels.reduce_weights(call, direction, from, std::min(from + some, 3 * H));
        const int64_t token = from - weights * some;
        kernels.reduce_projections(call, direction, token, std::min(token + some, p.distinct));
      });
    }
    pool.finish();
  } catch (const std::bad_alloc &) {
    return GRU_OUT_OF_MEMORY;
  }
  return GRU_OK;
}

}  // namespace

extern "C" {

int gru_forward(const gru_problem *problem, const gru_direction *directions) {
  return problem->is_double ? execute<double>(*problem, directions, false)
                            : execute<float>(*problem, directions, false);
}

int gru_backward(const gru_problem *problem, const gru_direction *directions) {
  return problem->is_double ? execute<double>(*problem, directions, true)
                            : execute<float>(*problem, directions, true);
}

int64_t gru_saved_size(int64_t steps, int64_t batch, int64_t hidden, int32_t reset_after) {
  return steps * batch * hidden * (reset_after ? 5 : 4);
}

int gru_cores(void) { return count_cores(); }

const char *gru_instruction_set(const char *name) {
  if (name) {
    const InstructionSet *set = find_instruction_set(name);
    if (!set) return nullptr;
    chosen = set;
  }
  return instruction_set().name;
}

}  // extern "C"
