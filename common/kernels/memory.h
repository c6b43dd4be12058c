// Memory aligned for vectors.
#pragma once

#include <stddef.h>
#include <stdint.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <new>

namespace {

// The maximum number of bytes that are kept between calls.
constexpr size_t most_kept = (size_t)256 << 20;

// Request huge pages for memory that the system has just provided. This avoids thousands of page
// faults, which would take a fifth of the time of a forward pass.
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

  // Memory of at least this size. The content is lost if the memory grows.
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

// Divides memory into aligned pieces. An arena at address 0 measures the required size.
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
