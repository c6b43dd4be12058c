// The GRU recurrence of gru.h. Each item of work, some rows of the batch in one direction, goes
// through all its time steps in one thread that never waits for another; the recurrent weights are
// packed once a call and stay in that core's cache. How rows are dealt into items, and the order in
// which gradients are added up, depend on the sizes alone, so results do not depend on the threads.
//
// Plain flags will do: c++ -O3 -std=c++17 -fPIC -shared -pthread gru.cpp -o libgru.so. Whole
// vectors are the compiler's own (GCC's and Clang's vector extensions); recurrence.h is compiled
// once for each instruction set, and the processor is asked which to use.
#include "gru.h"

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

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

int count_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (!sched_getaffinity(0, sizeof set, &set)) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// While it lives, this thread takes numbers too small to be normal, below 1.2e-38 in a float, for 0,
// as XLA's threads always do: gradients that vanish over the steps pass through them, and with each
// an Intel processor takes a hundred times as long.
class FlushDenormals {
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(before | 0x8040); }  // FTZ, DAZ
  ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;

 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" : : "r"(before | 1 << 24));  // FZ
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#else
 public:
  FlushDenormals() {}  // or else it would be unused
#endif
};

// Entry point of the OpenMP runtime that the process has loaded for all to see, as PyTorch has.
using OpenMP = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);

OpenMP find_openmp() { return (OpenMP)dlsym(RTLD_DEFAULT, "GOMP_parallel"); }

// Threads that wait for work between calls, and the memory they work in. One call at a time.
class Pool {
 public:
  std::mutex in_use;
  OpenMP openmp = nullptr;  // if not null, its threads do this call's work
  static inline bool forked = false;

  static Pool &get() {
    // Never destroyed: its threads may outlive the static objects of the process. A forked child
    // has none of them: it starts anew.
    alignas(Pool) static char place[sizeof(Pool)];
    static Pool *pool = [] {
      pthread_atfork(nullptr, nullptr, [] {
        new (place) Pool;
        forked = true;
      });
      return new (place) Pool;
    }();
    return *std::launder(pool);
  }

  // Calls work(i, thread) for each i below count, thread 0 being the caller's.
  template <class Work>
  void run(int64_t count, int threads, const Work &work) {
    const int helpers = (int)std::min<int64_t>(threads, count) - 1;
    std::atomic<int64_t> next{0};
    auto loop = [&](int thread) {
      const FlushDenormals while_it_works;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i, thread);
    };
    if (helpers <= 0) return loop(0);
    if (openmp && !forked) {  // an OpenMP runtime does not survive a fork
      struct {
        decltype(loop) &body;
        std::atomic<int> arrived{0};
      } team{loop};
      openmp([](void *of) { ((decltype(team) *)of)->body(((decltype(team) *)of)->arrived++); },
             &team, helpers + 1, 0);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex);
      while ((int)workers.size() < helpers) try {
          workers.emplace_back(&Pool::wait_for_work, this, (int)workers.size() + 1);
        } catch (const std::system_error &) {  // no more threads to be had: fewer do the same
          break;
        }
      call = [](void *context, int thread) { (*(decltype(loop) *)context)(thread); };
      context = &loop;
      invited = helpers;
      ++generation;
    }
    wake.notify_all();
    loop(0);
    std::unique_lock<std::mutex> lock(mutex);
    call = nullptr;  // who has not woken by now is not needed
    done.wait(lock, [&] { return busy == 0; });
  }

  // At least so many bytes, aligned for vectors; the contents do not survive a call.
  void *memory(size_t bytes) {
    if (bytes > capacity) {
      release();
      buffer = ::operator new(bytes, std::align_val_t(64));
      capacity = bytes;
    }
    return buffer;
  }

  // Keeps the memory for the next call, which saves asking the system for it again, unless it is
  // large.
  void finish() {
    if (capacity > (size_t)64 << 20) release();
  }

 private:
  std::mutex mutex;
  std::condition_variable wake, done;
  std::vector<std::thread> workers;
  void (*call)(void *, int) = nullptr;
  void *context = nullptr;
  int invited = 0, busy = 0;
  uint64_t generation = 0;
  void *buffer = nullptr;
  size_t capacity = 0;

  void wait_for_work(int thread) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake.wait(lock, [&] { return generation != seen; });
      seen = generation;
      if (!call || thread > invited) continue;
      auto *const current = call;
      void *const its_context = context;
      ++busy;
      lock.unlock();
      current(its_context, thread);
      lock.lock();
      if (--busy == 0) done.notify_one();
    }
  }

  void release() {
    ::operator delete(buffer, std::align_val_t(64));
    buffer = nullptr;
    capacity = 0;
  }
};

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

// The same for JAX: XLA FFI handlers, where the compiler finds jaxlib's headers.
//   gru_xla_forward:  projections..., weight_hh..., bias_hh..., h0, tokens, lengths
//                     -> outputs, h_last, saved
//   gru_xla_backward: weight_hh..., d_outputs, d_h_last, saved, tokens, lengths
//                     -> d_projections..., d_weight_hh..., d_bias_hh..., d_h0
// where "..." is one for each direction, h0, h_last, d_h0 [directions, B, H] and saved hold all
// directions, and an empty vector stands for what is missing. Whoever calls, no array is taken to be
// larger than it is. A length or a token out of range makes every result NaN: an error would come too
// late, since XLA runs ahead, and everything after it would fail as well.
#if __has_include("xla/ffi/api/ffi.h")
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using Sizes = std::vector<int64_t>;

// An array of a call: what it is, and what it has to be.
struct Expected {
  const char *name;
  ffi::AnyBuffer array;
  Sizes sizes;
  ffi::DataType type;
};

std::string described(const Sizes &sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

ffi::Error check(const std::vector<Expected> &arrays) {
  for (const Expected &each : arrays) {
    const Sizes found(each.array.dimensions().begin(), each.array.dimensions().end());
    if (found != each.sizes)
      return ffi::Error::InvalidArgument(std::string("GRU: ") + each.name + ": expected shape " +
                                         described(each.sizes) + ", found " + described(found));
    if (each.array.element_type() != each.type)
      return ffi::Error::InvalidArgument(std::string("GRU: ") + each.name + ": wrong dtype");
  }
  return ffi::Error::Success();
}

ffi::Error execute_xla(ffi::RemainingArgs args, ffi::RemainingRets results, bool backward,
                       ffi::Span<const int64_t> reverse, bool reset_after, int32_t threads) {
  const size_t R = reverse.size(), of_args = backward ? R + 5 : 3 * R + 3,
               of_results = backward ? 3 * R + 1 : 3;
  if (R < 1 || R > 2 || args.size() != of_args || results.size() != of_results)
    return ffi::Error::InvalidArgument("GRU: wrong number of arrays");
  auto arg = [&](size_t i) { return *args.get<ffi::AnyBuffer>(i); };
  auto result = [&](size_t i) { return **results.get<ffi::AnyBuffer>(i); };
  auto rank = [](const ffi::AnyBuffer &buffer) { return buffer.dimensions().size(); };
  auto offset = [](const ffi::AnyBuffer &buffer, size_t direction, size_t directions) -> void * {
    return buffer.element_count()
               ? (char *)buffer.untyped_data() + buffer.size_bytes() / directions * direction
               : nullptr;
  };
  const auto tokens = arg(of_args - 2), lengths = arg(of_args - 1);
  const auto weights = arg(backward ? 0 : R), projections = backward ? result(0) : arg(0);
  const bool has_tokens = rank(tokens) == 2;
  const ffi::DataType type = weights.element_type();
  if (type != ffi::F32 && type != ffi::F64)
    return ffi::Error::InvalidArgument("GRU: float32 and float64 only");
  if (rank(weights) != 2 || rank(lengths) != 1 || rank(projections) != (has_tokens ? 2 : 3))
    return ffi::Error::InvalidArgument("GRU: an array has the wrong number of dimensions");
  gru_problem problem = {};
  problem.steps = has_tokens ? tokens.dimensions()[0] : projections.dimensions()[0];
  problem.batch = lengths.dimensions()[0];
  problem.hidden = weights.dimensions()[1];
  problem.distinct = has_tokens ? projections.dimensions()[0] : problem.steps * problem.batch;
  problem.tokens = has_tokens ? (const int32_t *)tokens.untyped_data() : nullptr;
  problem.lengths = (const int32_t *)lengths.untyped_data();
  problem.is_double = type == ffi::F64;
  problem.reset_after = reset_after;
  problem.directions = (int32_t)R;
  problem.threads = threads;

  const int64_t T = problem.steps, B = problem.batch, H = problem.hidden, both = (int64_t)R;
  const Sizes of_projections = has_tokens ? Sizes{problem.distinct, 3 * H} : Sizes{T, B, 3 * H};
  const Sizes of_states = {both, B, H}, of_weights = {3 * H, H}, of_bias = {3 * H};
  // Outputs, or their gradient, may be left out: then they have no time steps. So may what forward
  // saves.
  const auto outputs = backward ? arg(R) : result(0), saved = backward ? arg(R + 2) : result(2);
  const bool every_step = rank(outputs) != 3 || outputs.dimensions()[0] != 0;
  const bool saves = backward || rank(saved) != 2 || saved.dimensions()[1] != 0;
  std::vector<Expected> arrays = {
      {"tokens", tokens, has_tokens ? Sizes{T, B} : Sizes{0}, ffi::S32},
      {"lengths", lengths, {B}, ffi::S32},
      {"outputs", outputs, {every_step ? T : 0, B, both * H}, type},
      {"saved", saved, {both, saves ? gru_saved_size(T, B, H, reset_after) : 0}, type},
      {"h_last", backward ? arg(R + 1) : result(1), of_states, type},
      {"h0", backward ? result(3 * R) : arg(3 * R), of_states, type}};
  for (size_t i = 0; i < R; ++i) {
    arrays.push_back({"projections", backward ? result(i) : arg(i), of_projections, type});
    arrays.push_back({"weight_hh", arg(backward ? i : R + i), of_weights, type});
    arrays.push_back({"bias_hh", backward ? result(2 * R + i) : arg(2 * R + i), of_bias, type});
    if (backward) arrays.push_back({"d_weight_hh", result(R + i), of_weights, type});
  }
  if (ffi::Error error = check(arrays); error.failure()) return error;

  const size_t size = problem.is_double ? 8 : 4;
  gru_direction directions[2] = {};
  for (size_t i = 0; i < R; ++i) {
    gru_direction &d = directions[i];
    d.reverse = reverse[i] != 0;
    d.ld_projections = 3 * H;
    d.ld_outputs = both * H;
    d.weight_hh = arg(backward ? i : R + i).untyped_data();
    char *const half = outputs.element_count() ? (char *)outputs.untyped_data() + i * H * size : nullptr;
    if (backward) {
      d.d_outputs = half;
      d.d_h_last = offset(arg(R + 1), i, R);
      d.saved = offset(saved, i, R);
      d.d_projections = result(i).untyped_data();
      d.d_weight_hh = result(R + i).untyped_data();
      d.d_bias_hh = result(2 * R + i).untyped_data();
      d.d_h0 = offset(result(3 * R), i, R);
    } else {
      d.projections = arg(i).untyped_data();
      d.bias_hh = arg(2 * R + i).untyped_data();
      d.h0 = offset(arg(3 * R), i, R);
      d.outputs = half;
      d.h_last = offset(result(1), i, R);
      d.saved = offset(saved, i, R);
    }
  }
  const int status = backward ? gru_backward(&problem, directions) : gru_forward(&problem, directions);
  if (status == GRU_OUT_OF_MEMORY)
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "GRU: out of memory");
  for (size_t i = 0; status != GRU_OK && i < of_results; ++i)  // all bits set: a NaN of either type
    memset(result(i).untyped_data(), 0xff, result(i).size_bytes());
  return ffi::Error::Success();
}

ffi::Error xla_forward(ffi::RemainingArgs args, ffi::RemainingRets results,
                       ffi::Span<const int64_t> reverse, bool reset_after, int32_t threads) {
  return execute_xla(args, results, false, reverse, reset_after, threads);
}

ffi::Error xla_backward(ffi::RemainingArgs args, ffi::RemainingRets results,
                        ffi::Span<const int64_t> reverse, bool reset_after, int32_t threads) {
  return execute_xla(args, results, true, reverse, reset_after, threads);
}

auto binding() {
  return ffi::Ffi::Bind()
      .RemainingArgs()
      .RemainingRets()
      .Attr<ffi::Span<const int64_t>>("reverse")
      .Attr<bool>("reset_after")
      .Attr<int32_t>("threads");
}

}  // namespace

extern "C" GRU_API XLA_FFI_Error *gru_xla_forward(XLA_FFI_CallFrame *);
extern "C" GRU_API XLA_FFI_Error *gru_xla_backward(XLA_FFI_CallFrame *);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gru_xla_forward, xla_forward, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gru_xla_backward, xla_backward, binding());
#endif
