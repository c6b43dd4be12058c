// The threads that share the work of a call of gru.h, and the memory that they keep between calls.
#pragma once

#include <dlfcn.h>
#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "weights_cache.h"

namespace {

int count_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (!sched_getaffinity(0, sizeof set, &set)) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// During its lifetime, this thread treats denormal numbers, below 1.2e-38 in a float, as 0, as
// XLA's threads always do. Vanishing gradients are denormal, and an Intel processor computes with
// them a hundred times more slowly.
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
  FlushDenormals() {}  // avoids a warning about an unused object
#endif
};

// An entry point of the OpenMP runtime that the process has loaded globally, as PyTorch does.
using OpenMP = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);

OpenMP find_openmp() { return (OpenMP)dlsym(RTLD_DEFAULT, "GOMP_parallel"); }

// Ends the OpenMP threads of the calling thread; its next parallel region starts new ones.
// Otherwise GNU's runtime does not survive a fork: the parallel regions of a child, including
// PyTorch's own, would wait forever for threads that only the parent has.
void end_openmp_threads() {
  constexpr int soft = 1;  // omp_pause_soft
  if (auto pause = (int (*)(int))dlsym(RTLD_DEFAULT, "omp_pause_resource_all")) pause(soft);
}

// The thread id on Linux; 0 on other systems, which do not use it.
int number() {
#ifdef __linux__
  return (int)syscall(SYS_gettid);
#else
  return 0;
#endif
}

// Threads that wait for work between calls, and their memory. A pool serves one call at a time;
// calls of one thread each, as from several devices of a process, run in parallel on their own
// pools.
class Pool {
 public:
  std::mutex in_use;
  Memory memory;             // the working memory of a call
  Memory copies;             // copies of the weights that an inference packs
  WeightsCache weights;
  OpenMP openmp = nullptr;   // if not null, its threads compute this call
  int team = 1;              // all of the process's OpenMP threads, because a smaller team ends the others

  static Pool &get() {
    // Never destroyed, because its threads may outlive the static objects of the process. A forked
    // child, which has none of the threads, starts its own.
    alignas(Pool) static char place[sizeof(Pool)];
    static Pool *pool = [] {
      pthread_atfork(end_openmp_threads, nullptr, [] { new (place) Pool; });
      return new (place) Pool;
    }();
    return *std::launder(pool);
  }

  // The locked pool of a call: the first one, which keeps the memory, or, for a call of one thread,
  // the first free one.
  static Pool &lock(int threads) {
    Pool *pool = &get();
    if (threads > 1) pool->in_use.lock();
    else
      while (!pool->in_use.try_lock()) pool = &pool->next();
    return *pool;
  }

  // Whether the OpenMP threads of this thread's team spin: whether the CPU clock of one of them, the
  // follower, advances. If no running follower is known, the function returns true in the main
  // thread: the call then uses the team and learns a follower. This requires other threads in the
  // process: in a child that was forked before this library was loaded, the team's threads do not
  // exist and would never arrive.
  bool openmp_spins() {
#ifdef __linux__
    if (follower < 0) return false;
    const clockid_t clock = ~follower * 8 | 6;  // as of pthread_getcpuclockid, but it may have ended
    timespec before, after;
    if (follower && !clock_gettime(clock, &before))
      return !clock_gettime(clock, &after) && before.tv_nsec != after.tv_nsec;
    struct stat threads;  // one link per thread, and two for the folder
    return number() == getpid() && !stat("/proc/self/task", &threads) &&
           threads.st_nlink > 3 + workers.size();
#else
    return false;
#endif
  }

  // Calls work(i, thread) for each i below count; thread 0 is the caller.
  template <class Work>
  void run(int64_t count, int threads, const Work &work) {
    const int helpers = (int)std::min<int64_t>(threads, count) - 1;
    std::atomic<int64_t> next{0};
    auto loop = [&](int thread) {
      const FlushDenormals flush_denormals;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i, thread);
    };
    if (helpers <= 0) return loop(0);
    if (openmp) {
      struct Team {
        decltype(loop) &body;
        const int threads, leader = number();
        std::atomic<int> arrived{0}, follower{0};
      } its{loop, helpers + 1};
      openmp(
          [](void *of) {
            Team &its = *(Team *)of;
            if (number() != its.leader) its.follower = number();
            if (const int thread = its.arrived++; thread < its.threads) its.body(thread);
          },
          &its, std::max(team, helpers + 1), 0);
      follower = its.follower ? its.follower.load() : -1;
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex);
      while ((int)workers.size() < helpers) try {
          workers.emplace_back(&Pool::wait_for_work, this, (int)workers.size() + 1);
        } catch (const std::system_error &) {  // the system grants no more threads; fewer compute the same
          break;
        }
      call = [](void *context, int thread) { (*(decltype(loop) *)context)(thread); };
      context = &loop;
      invited = helpers;
      ++generation;
    }
    wake.notify_all();
    loop(0);
    {
      std::lock_guard<std::mutex> lock(mutex);
      call = nullptr;  // a thread that has not woken yet is not needed
    }
    spin([&] { return busy == 0; });
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [&] { return busy == 0; });
  }

  // Waits until a condition is met. Returns true if spinning did not suffice, which means that
  // another program occupies the core of the awaited thread.
  template <class Condition>
  static bool wait(const Condition &met) {
    spin(met);
    if (met()) return false;
    while (!met()) std::this_thread::yield();
    return true;
  }

  // Keeps the memory for the next call, unless it is large.
  void finish() {
    for (Memory *each : {&memory, &copies})
      if (each->capacity > most_kept) each->release();
    weights.evict();
  }

 private:
  std::mutex mutex;
  std::condition_variable wake, done;
  std::unique_ptr<Pool> following;
  std::vector<std::thread> workers;
  void (*call)(void *, int) = nullptr;
  void *context = nullptr;
  int invited = 0;
  std::atomic<int> busy{0};
  std::atomic<uint64_t> generation{0};
  static inline thread_local int follower = 0;  // a thread of the OpenMP team of this thread; -1: none

  Pool &next() {
    std::lock_guard<std::mutex> lock(mutex);
    if (!following) following = std::make_unique<Pool>();
    return *following;
  }

  // Spins briefly, because putting a thread to sleep and waking it takes as long as a short text.
  // Longer spinning would take the cores of a busy machine from the threads that it waits for.
  template <class Condition>
  static void spin(const Condition &met) {
    if (met()) return;  // usual, and faster than reading the clock
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    while (!met() && std::chrono::steady_clock::now() < end) {
#ifdef __SSE__
      _mm_pause();
#endif
    }
  }

  void wait_for_work(int thread) {
    uint64_t last = 0;
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      lock.unlock();
      spin([&] { return generation != last; });
      lock.lock();
      wake.wait(lock, [&] { return generation != last; });
      last = generation;
      if (!call || thread > invited) continue;
      auto *const current = call;
      void *const current_context = context;
      ++busy;
      lock.unlock();
      current(current_context, thread);
      lock.lock();
      if (--busy == 0) done.notify_one();
    }
  }
};

// Registers the fork handlers when the library is loaded, not at the first call.
[[maybe_unused]] const Pool &first = Pool::get();

}  // namespace
