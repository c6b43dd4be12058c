// Memory aligned for vectors.
#pragma once

#include <stddef.h>
#include <stdint.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <new>

namespace {

// The bytes of memory that are kept between calls, at most.
constexpr size_t most_kept = (size_t)256 << 20;

// For large memory that has just come from the system: asking for huge pages saves thousands of page
// faults, which would take a fifth of a forward's time.
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

// Memory aligned for vectors.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory &) = delete;
  ~Memory() { release(); }
  void *at = nullptr;
  size_t capacity = 0;

  // At least so many bytes; what was there is lost if they are more than before.
  void *reserve(size_t bytes) {
    if (bytes > capacity) {
      release();
      at = ::operator new(bytes, std::align_val_t(64));
      capacity = bytes;
      want_huge_pages(at, bytes);
    }
    return at;
  }
  void release() {
    ::operator delete(at, std::align_val_t(64));
    at = nullptr;
    capacity = 0;
  }
};

// Hands out aligned pieces of memory; from address 0, it measures how much is needed.
struct Arena {
  uintptr_t at = 0;
  template <class T>
  T *take(int64_t count) {
    const uintptr_t piece = at;
    at += (count * sizeof(T) + 63) / 64 * 64;
    return (T *)piece;
  }
};

}  // namespace
