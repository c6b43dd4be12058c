// The cache of packed weights: an inference keeps the weights that it has packed for the next one.
#pragma once

#include <string.h>

#include <algorithm>
#include <list>
#include <vector>

#include "call.h"
#include "memory.h"

namespace {

// The packed weights of a direction. The callers cannot tell whether weights have changed: PyTorch's
// version counter misses writes through .data, and JAX reuses the memory of an array for the next.
// The fingerprint of the weights detects changes.
struct PackedWeights {
  std::vector<int64_t> key;  // addresses, sizes and everything else that the packing depends on
  Memory memory;
  uint64_t fingerprint[2] = {};
  bool filled = false;
};

class WeightsCache {
 public:
  // The entry of a key, or a new one.
  PackedWeights &find(const std::vector<int64_t> &key) {
    auto entry = std::find_if(entries.begin(), entries.end(),
                              [&](const PackedWeights &each) { return each.key == key; });
    if (entry == entries.end()) entries.emplace_front().key = key;
    else entries.splice(entries.begin(), entries, entry);
    return entries.front();
  }

  // Drops the entries beyond `most_kept` bytes, least recently used first, but never the last one.
  void evict() {
    size_t bytes = 0;
    for (auto each = entries.begin(); each != entries.end();) {
      bytes += each->memory.capacity;
      const bool dropped = bytes > most_kept && each != entries.begin();
      each = dropped ? entries.erase(each) : std::next(each);
    }
  }

 private:
  std::list<PackedWeights> entries;  // most recently used first
};

// Calls visit(array, first element, elements) for the weights of a direction that belong to a piece.
// There are two pieces of about the same size, for two threads.
template <class Visit>
void visit_piece(const gru_problem &p, int gates, int piece, const Visit &visit) {
  const int64_t rows = gates * p.hidden, first = rows * p.inputs * 2 / 3;
  if (piece == 0) return visit(&gru_direction::weight_ih, 0, first);
  visit(&gru_direction::weight_ih, first, rows * p.inputs - first);
  visit(&gru_direction::weight_hh, 0, rows * p.hidden);
  visit(&gru_direction::bias_ih, 0, rows);
  visit(&gru_direction::bias_hh, 0, rows);
}

template <class T>
uint64_t fingerprint(const gru::Kernels<T> &kernels, const gru_problem &p, int gates,
                     const gru_direction &d, int piece) {
  uint64_t result = 0;
  visit_piece(p, gates, piece, [&](auto array, int64_t first, int64_t count) {
    result = result * 0x9E3779B97F4A7C15u +
             kernels.fingerprint((const T *)(d.*array) + first, count * (sizeof(T) / 4));
  });
  return result;
}

template <class T>
void copy_piece(const gru_problem &p, int gates, const gru_direction &from, const gru_direction &to,
                int piece) {
  visit_piece(p, gates, piece, [&](auto array, int64_t first, int64_t count) {
    if (count) memcpy((T *)(to.*array) + first, (const T *)(from.*array) + first, count * sizeof(T));
  });
}

}  // namespace
