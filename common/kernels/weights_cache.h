// The cache of packed weights: an inference keeps the weights that it has packed for the next one.
#pragma once

#include <string.h>

#include <algorithm>
#include <list>
#include <vector>

#include "call.h"
#include "memory.h"

namespace {

// The packed weights of a direction. The callers do not say whether weights have changed: PyTorch's
// count of versions misses what is written through .data, and JAX gives the memory of one array to the
// next. The fingerprint of the weights detects it.
struct PackedWeights {
  std::vector<int64_t> key;  // their addresses and sizes, and what the packing depends on
  Memory memory;
  uint64_t fingerprint[2] = {};
  bool filled = false;
};

class WeightsCache {
 public:
  // The memory that a key had the last time, or else new memory.
  PackedWeights &find(const std::vector<int64_t> &key) {
    auto found = std::find_if(entries.begin(), entries.end(),
                              [&](const PackedWeights &each) { return each.key == key; });
    if (found == entries.end()) entries.emplace_front().key = key;
    else entries.splice(entries.begin(), entries, found);
    return entries.front();
  }

  // Keeps the entries that were used last, the very last however large it is.
  void evict() {
    size_t bytes = 0;
    for (auto each = entries.begin(); each != entries.end();) {
      bytes += each->memory.capacity;
      const bool dropped = bytes > most_kept && each != entries.begin();
      each = dropped ? entries.erase(each) : std::next(each);
    }
  }

 private:
  std::list<PackedWeights> entries;  // the one used last comes first
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
