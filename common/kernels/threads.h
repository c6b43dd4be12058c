// The threads that share the work of a call of gru.h, and the memory that is kept between calls.
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

// Ends the OpenMP threads that the calling thread leads; its next parallel region starts new ones.
// GNU's runtime does not survive a fork otherwise: the parallel regions of a child, PyTorch's own
// among them, would wait forever for threads that only the parent has.
void end_openmp_threads() {
  constexpr int soft = 1;  // omp_pause_soft
  if (auto pause = (int (*)(int))dlsym(RTLD_DEFAULT, "omp_pause_resource_all")) pause(soft);
}

// The system's number of this thread; where it is not asked, 0.
int number() {
#ifdef __linux__
  return (int)syscall(SYS_gettid);
#else
  return 0;
#endif
}

// Threads that wait for work between calls, and what is kept for them. One call at a time: but calls
// that want one thread each, as of several devices of a process, run side by side, on pools of theirs.
class Pool {
 public:
  std::mutex in_use;
  Memory memory;             // what a call works in
  Memory copies;             // of the weights that an inference packs
  WeightsCache weights;
  OpenMP openmp = nullptr;   // if not null, its threads do this call's work
  int team = 1;              // as many as the process has of them: of a smaller team, the others end

  static Pool &get() {
    // Never destroyed: its threads may outlive the static objects of the process. A forked child
    // has none of them: it starts anew.
    alignas(Pool) static char place[sizeof(Pool)];
    static Pool *pool = [] {
      pthread_atfork(end_openmp_threads, nullptr, [] { new (place) Pool; });
      return new (place) Pool;
    }();
    return *std::launder(pool);
  }

  // The pool of a call, locked: the first, so that what is kept is found again, or, of a call of one
  // thread, the first that is free.
  static Pool &lock(int threads) {
    Pool *pool = &get();
    if (threads > 1) pool->in_use.lock();
    else
      while (!pool->in_use.try_lock()) pool = &pool->next();
    return *pool;
  }

  // Whether OpenMP's threads, of the team that this one leads, are running, as one's clock tells.
  // Where none is known, the process's first thread shall take them, and so get to know one: but not
  // where there are none, for in a child forked before this library was loaded they would not come.
  bool openmp_spins() {
#ifdef __linux__
    if (follower < 0) return false;
    const clockid_t clock = ~follower * 8 | 6;  // as of pthread_getcpuclockid, but it may have ended
    timespec before, after;
    if (follower && !clock_gettime(clock, &before))
      return !clock_gettime(clock, &after) && before.tv_nsec != after.tv_nsec;
    struct stat threads;  // a link for each, one for itself and one for what it is in
    return number() == getpid() && !stat("/proc/self/task", &threads) &&
           threads.st_nlink > 3 + workers.size();
#else
    return false;
#endif
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
    {
      std::lock_guard<std::mutex> lock(mutex);
      call = nullptr;  // who has not woken by now is not needed
    }
    spin([&] { return busy == 0; });
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [&] { return busy == 0; });
  }

  // Waits for what another thread is at; whether it took so long that others must have its core.
  template <class Condition>
  static bool wait(const Condition &met) {
    spin(met);
    if (met()) return false;
    while (!met()) std::this_thread::yield();
    return true;
  }

  // Keeps the memory for the next call, which saves allocating it again, unless it is large.
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
  static inline thread_local int follower = 0;  // of the OpenMP team that this one leads; -1: none

  Pool &next() {
    std::lock_guard<std::mutex> lock(mutex);
    if (!following) following = std::make_unique<Pool>();
    return *following;
  }

  // Waits for a moment: to put a thread to sleep and to wake it takes as long as a short text. No
  // longer, for on a busy machine it takes the time away from those that are waited for.
  template <class Condition>
  static void spin(const Condition &met) {
    if (met()) return;  // mostly, and to look at the clock takes longer
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    while (!met() && std::chrono::steady_clock::now() < end) {
#ifdef __SSE__
      _mm_pause();
#endif
    }
  }

  void wait_for_work(int thread) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      lock.unlock();
      spin([&] { return generation != seen; });
      lock.lock();
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
};

// The handlers of forks are registered when the library is loaded, not at its first call.
[[maybe_unused]] const Pool &first = Pool::get();

}  // namespace
