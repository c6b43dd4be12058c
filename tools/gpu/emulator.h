// Emulates on a CPU the GPU operations of recurrence.cu, with the interface of
// common/kernels/cuda/device.h. Each CUDA thread is a fiber; the blocks of a cluster run concurrently,
// in an order that depends on a seed.
//
// Warp-wide operations do not order memory accesses. Stores into other blocks arrive late and in any
// order, and shared memory initially contains NaN. Operations that would hang, trap or be undefined on
// a GPU call `fault`. Under ThreadSanitizer, every fiber is a thread, and only the operations that
// synchronize on a GPU synchronize fibers, so that a race is detected in every order.
#pragma once
#define EMULATOR
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define TSAN(x) x
#else
#define TSAN(x)
#endif
#define UNSEEN __attribute__((no_sanitize("address", "thread", "undefined"), noinline))
// For the most expensive functions. Optimizing all functions would take long to compile.
#define FAST __attribute__((optimize("O2")))

#define DEVICE inline
#define UNROLL
#define ROLLED

struct Barrier {  // an mbarrier for one arrival
  int pending_bytes, there, arrived, phase;
};
static_assert(sizeof(Barrier) == 16, "the kernel leaves room for 16 bytes");

namespace emulator {

constexpr int there = 0x600d;
struct Group {
  int count = 0, generation = 0;
  char order[2];  // of this generation and the next, which some threads may have reached
};
struct Warp {
  // For the current collective and the next one: a lane is at most one ahead of the others.
  uint32_t in[2][32][10];
  float out[2][32][4];
  Group collective, sync;
};
struct Block {
  int index = 0, rank = 0, ended = 0;
  std::unique_ptr<unsigned[]> shared;
  std::vector<Warp> warps;
  Group all, named[16];
};
struct alignas(64) Fiber {
  bool started = false, done = false;
  int thread, value;
  const int *until = nullptr;  // the fiber waits until *until differs from `value`
  Block *block;
  void *place[5];  // of __builtin_setjmp, which sanitizers do not intercept
  void *tsan = nullptr;
  ucontext_t context;
};
struct Late {  // a store that has not arrived
  unsigned *to, word;
  Barrier *barrier;
  int rank;
};

inline Fiber *current;
inline void *main_place[5];
inline void *main_tsan;
inline int64_t progress;
inline std::vector<Block> *blocks;
inline Group cluster;
inline int block_threads;
inline const std::function<void()> *body;
inline std::mt19937 rng;
inline std::vector<Late> in_flight;
inline char launch_order;
inline std::string failure;

// Records a failure, with which the scheduler ends the launch: exceptions cannot cross fibers.
UNSEEN inline void fault(const char *what) {
  if (failure.empty()) failure = what;
}

UNSEEN inline void jump(void **place) { __builtin_longjmp(place, 1); }
// Yields to the scheduler until a counter has changed.
UNSEEN inline void wait(const int &counter) {
  current->until = &counter, current->value = counter;
  TSAN(__tsan_switch_to_fiber(main_tsan, 1));
  if (!__builtin_setjmp(current->place)) jump(main_place);
  current->until = nullptr;
}

// Waits for all threads. Returns whether this thread is the last, which continues first.
UNSEEN inline bool last(Group &g, int threads) {
  if (++g.count < threads) return wait(g.generation), false;
  return g.count = 0, ++g.generation, ++progress, true;
}
UNSEEN inline void rendezvous(Group &g, int threads) {
  char *order = &g.order[g.generation & 1];
  TSAN(__tsan_release(order));
  last(g, threads);
  TSAN(__tsan_acquire(order));
}

// All lanes pass words, the last lane computes, and all lanes receive their results.
template <class F>
FAST UNSEEN inline void collective(const uint32_t *in, int n, float *out, int m, F compute) {
  Warp &w = current->block->warps[current->thread / 32];
  const int lane = current->thread % 32, half = w.collective.generation & 1;
  for (int i = 0; i < n; ++i) w.in[half][lane][i] = in[i];
  if (last(w.collective, 32)) compute(w.in[half], w.out[half]);
  for (int i = 0; i < m; ++i) out[i] = w.out[half][lane][i];
}

UNSEEN inline void check_there(const Barrier *b) {
  if (b->there != there) fault("a barrier was used before it was there");
}
UNSEEN inline void complete(Barrier *b) {
  if (b->arrived && b->pending_bytes == 0) b->arrived = 0, ++b->phase;
  ++progress;
}
inline void store(unsigned *to, unsigned word) { *to = word; }  // visible to sanitizers
UNSEEN inline void deliver(const Late &late) {
  if ((*blocks)[late.rank].ended == block_threads) fault("a store into a block that has ended");
  check_there(late.barrier);
  store(late.to, late.word);
  TSAN(__tsan_release(late.barrier));
  late.barrier->pending_bytes -= 4;
  complete(late.barrier);
}
UNSEEN inline void *remote(void *p, int rank) {
  return (char *)(*blocks)[rank].shared.get() + ((char *)p - (char *)current->block->shared.get());
}

UNSEEN inline void enter() {
  TSAN(__tsan_acquire(&launch_order));
  (*body)();
  TSAN(__tsan_release(&launch_order));
  current->done = true, ++current->block->ended, ++progress;
  TSAN(__tsan_switch_to_fiber(main_tsan, 1));
  jump(main_place);
}

UNSEEN inline void take_turn(Fiber &fiber) {
  current = &fiber;
  TSAN(__tsan_switch_to_fiber(fiber.tsan, 1));
  if (__builtin_setjmp(main_place)) return;
  if (fiber.started) jump(fiber.place);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Runs a cluster of C blocks. Throws std::runtime_error for a fault. With seed 0, fibers run in order
// and stores arrive at the end of a round.
FAST UNSEEN inline void run_cluster(int C, int first_block, int threads, int shared_bytes,
                                    const std::function<void()> &function, unsigned seed) {
  constexpr size_t most_threads = 16 * 1024;  // the maximum of a cluster
  constexpr size_t stack = (64 << 10) + 576;  // the offset spreads the stacks over cache lines
  std::vector<Block> all(C);
  blocks = &all, body = &function, block_threads = threads, cluster = Group();
  rng.seed(seed), in_flight.clear(), failure.clear();
  const int words = (shared_bytes + 3) / 4;
  for (int c = 0; c < C; ++c) {
    all[c].index = first_block + c, all[c].rank = c;
    all[c].shared.reset(new unsigned[words]);  // exact, so that AddressSanitizer detects overruns
    for (int i = 0; i < words; ++i) all[c].shared[i] = 0x7fc00000 | i;
    all[c].warps.resize(threads / 32);
  }
  std::vector<Fiber> fibers(C * threads);
  static char *const stacks =  // reused: allocation takes longer than most clusters
      (char *)mmap(nullptr, stack * most_threads, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  std::vector<Fiber *> order;
  TSAN(main_tsan = __tsan_get_current_fiber());
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber &f = fibers[i];
    order.push_back(&f), f.block = &all[i / threads], f.thread = i % threads;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks + i * stack, f.context.uc_stack.ss_size = stack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, (void (*)())enter, 0);
    TSAN(f.tsan = __tsan_create_fiber(0));
  }
  TSAN(__tsan_release(&launch_order));
  std::vector<int> stalled(C);  // the rounds that each block pauses
  for (int c = 0; seed && c < C; ++c) stalled[c] = rng() % 12;
  for (size_t left = fibers.size(); left && failure.empty();) {
    if (seed && rng() % 4 == 0) std::shuffle(order.begin(), order.end(), rng);
    const int64_t before = progress;
    bool waiting = false;
    left = 0;
    for (Fiber *f : order) {
      if (f->done) continue;
      if (!stalled[f->block->rank] && !(f->until && *f->until == f->value)) take_turn(*f);
      left += !f->done;
    }
    for (int &rounds : stalled) {
      waiting |= rounds > 0;
      if (rounds) --rounds;
      else if (seed && rng() % 16 == 0) rounds = rng() % 12;
    }
    if (!in_flight.empty()) {
      size_t n = in_flight.size();
      if (seed) std::shuffle(in_flight.begin(), in_flight.end(), rng), n = rng() % (n + 1);
      if (!n && progress == before) n = in_flight.size();
      for (; n && failure.empty(); --n) deliver(in_flight.back()), in_flight.pop_back();
    }
    if (left && progress == before && !waiting) fault("deadlock");
  }
  TSAN(__tsan_acquire(&launch_order));
  if (failure.empty() && !in_flight.empty()) fault("a store after the end of the cluster");
  for (Fiber &f : fibers) { TSAN(__tsan_destroy_fiber(f.tsan)); }
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace emulator

UNSEEN inline int thread_index() { return emulator::current->thread; }
UNSEEN inline int block_index() { return emulator::current->block->index; }
UNSEEN inline int cluster_rank() { return emulator::current->block->rank; }

inline uint32_t as_word(float x) { return std::bit_cast<uint32_t>(x); }
inline float as_float(uint32_t word) { return std::bit_cast<float>(word); }
inline uint32_t bf16_bits(float x) {  // to nearest, ties to even
  const uint32_t word = as_word(x);
  return std::isnan(x) ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}
inline unsigned bf16_pair(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline unsigned tf32_of_number(unsigned word) { return (word + 0x1000) & ~0x1fffu; }
inline unsigned tf32(float x) {  // to nearest, ties away from 0
  return std::isnan(x) ? 0x7fffffff : tf32_of_number(as_word(x));
}

// The fragments are those of mma.m16n8k16 (.bf16) and mma.m16n8k8 (.tf32) in the PTX ISA. Products are
// exact; their sum is truncated, as by the hardware.
FAST UNSEEN inline void warp_mma(const uint32_t (*in)[10], float (*out)[4], bool bf16) {
  const int K = bf16 ? 16 : 8;
  double A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 6; ++i) {
      const uint32_t word = in[lane][i];
      const int step = i < 4 ? i >> 1 : i - 4, k = bf16 ? t * 2 + step * 8 : t + step * 4;
      for (int half = 0; half < (bf16 ? 2 : 1); ++half) {
        const float x = as_float(!bf16 ? word & ~0x1fffu : half ? word & ~0xffffu : word << 16);
        if (i < 4) A[g + (i & 1) * 8][k + half] = x;
        else B[k + half][g] = x;
      }
    }
  }
  for (int m = 0; m < 16; ++m) {
    double sums[8];
    auto at = [&](int n) { return std::pair(m % 8 * 4 + n / 2, m / 8 * 2 + n % 2); };
    for (int n = 0; n < 8; ++n) sums[n] = as_float(in[at(n).first][6 + at(n).second]);
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) sums[n] += A[m][k] * B[k][n];
    for (int n = 0; n < 8; ++n) {
      float &result = out[at(n).first][at(n).second] = (float)sums[n];
      if (std::abs((double)result) > std::abs(sums[n])) result = std::nextafter(result, 0.f);
    }
  }
}
UNSEEN inline void mma(float *c, const unsigned *a, const unsigned *b, bool bf16) {
  uint32_t in[10];
  for (int i = 0; i < 4; ++i) in[i] = a[i], in[6 + i] = as_word(c[i]);
  in[4] = b[0], in[5] = b[1];
  emulator::collective(in, 10, c, 4, [bf16](const uint32_t (*in)[10], float (*out)[4]) UNSEEN {
    warp_mma(in, out, bf16);
  });
}
inline void mma_bf16(float *c, const unsigned *a, const unsigned *b) { mma(c, a, b, true); }
inline void mma_tf32(float *c, const unsigned *a, const unsigned *b) { mma(c, a, b, false); }

inline void load16(unsigned *to, const unsigned *from) {
  if ((uintptr_t)from % 16) emulator::fault("a misaligned load");
  for (int i = 0; i < 4; ++i) to[i] = from[i];
}
UNSEEN inline float shuffle_xor(float x, int mask) {
  const uint32_t in = as_word(x);
  float out;
  emulator::collective(&in, 1, &out, 1, [mask](const uint32_t (*in)[10], float (*out)[4]) UNSEEN {
    for (int lane = 0; lane < 32; ++lane) out[lane][0] = as_float(in[lane ^ mask][0]);
  });
  return out;
}
template <bool>
inline float sigmoid(float x) {
  return 1.f / (1.f + std::exp(-x));
}
template <bool>
inline float tanh_of(float x) {
  return std::tanh(x);
}

UNSEEN inline void sync_block() {
  emulator::rendezvous(emulator::current->block->all, emulator::block_threads);
}
UNSEEN inline void sync_warp() {
  emulator::rendezvous(emulator::current->block->warps[thread_index() / 32].sync, 32);
}
UNSEEN inline void sync_some(int barrier, int threads) {
  emulator::rendezvous(emulator::current->block->named[barrier], threads);
}
UNSEEN inline void sync_cluster() {
  emulator::rendezvous(emulator::cluster, emulator::block_threads * (int)emulator::blocks->size());
}
UNSEEN inline void barrier_init(Barrier *b) {
  *b = {0, emulator::there, 0, 0};
  emulator::store((unsigned *)&b->phase, 0);  // AddressSanitizer detects an overrun
  ++emulator::progress;
}
UNSEEN inline void barrier_expect(Barrier *b, unsigned bytes) {
  TSAN(__tsan_release(b));
  emulator::check_there(b);
  if (b->arrived) emulator::fault("a barrier expects bytes twice in a phase");
  b->arrived = 1, b->pending_bytes += bytes;
  emulator::complete(b);
}
UNSEEN inline void barrier_wait(Barrier *b, int parity) {
  while ((b->phase & 1) == parity) emulator::wait(b->phase);
  ++emulator::progress;
  TSAN(__tsan_acquire(b));
}
template <int C>
inline void put(unsigned *to, unsigned word, Barrier *b) {
  for (int rank = 0; rank < C; ++rank) {
    const emulator::Late late = {(unsigned *)emulator::remote(to, rank), word,
                                 (Barrier *)emulator::remote(b, rank), rank};
    TSAN(emulator::deliver(late); continue;)  // immediately: ThreadSanitizer checks the order
    emulator::in_flight.push_back(late);
  }
}
