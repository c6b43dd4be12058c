// The division of a call's work: the batch into row blocks, products into parts.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "call.h"

namespace {

using namespace gru;

// The largest number of rows of a row block. More rows read the weights from the cache less often;
// fewer rows make more blocks for the threads. The number of blocks is a power of two, which
// divides evenly among 2, 4, 8 ... cores. A block of fewer than min_rows rows takes nearly as long
// as one of twice as many. With other numbers for some products, a backward pass with these
// products could not read what a forward pass with others has saved.
constexpr int64_t max_rows = 16, min_rows = 4;

// The number of panels of one part of the input product. With input_rows, this is the product that
// a core computes without waking another.
constexpr int64_t input_panels = 4;

// The numbers of copied or summed elements, and of multiplications, that justify waking a thread.
constexpr int64_t worth_sharing = 1 << 19, worth_multiplying = 1 << 21;

// The number of multiplications that justifies testing whether OpenMP's threads spin, which takes a
// microsecond.
constexpr int64_t worth_testing = 1 << 24;

// The smallest number of units of a task if threads share a row block, because waiting takes time.
constexpr int64_t task_units = 64;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows at a distance of a power of two bytes compete for the same few places of a cache; rows at a
// distance of an odd number of vectors do not.
inline int64_t odd_stride(int64_t n, int64_t width) { return (n / width | 1) * width + n % width; }

// The number of row blocks of each direction.
inline int64_t count_blocks(int64_t B) {
  int64_t blocks = 1;
  while (blocks * max_rows < B || (blocks < 2 && B >= 2 * min_rows)) blocks *= 2;
  return blocks;
}

// The rows of the batch, sorted by length, longest first, are assigned to row blocks in turn: every
// block has a share of the long ones, and its active rows are always its first.
struct Schedule {
  std::vector<int32_t> row, active, before, slots;  // the memory of the row blocks' pointers
  std::vector<int64_t> distinct;            // tokens of each block: rows of its d_projections
  std::vector<RowBlock> row_blocks;         // [directions, blocks]
  std::vector<int64_t> live_rows, place;    // see Call; empty where all rows of x are live

  Schedule(const gru_problem &p, int64_t blocks, bool backward)
      : active(blocks * p.steps),
        before(blocks * (p.steps + 1)),
        slots(backward && p.tokens ? blocks * p.distinct : 0, -1),
        distinct(blocks),
        row_blocks(p.directions * blocks) {
    std::vector<int32_t> order(p.batch);
    std::iota(order.begin(), order.end(), 0);
    if (p.lengths)
      std::stable_sort(order.begin(), order.end(),
                       [&](int a, int b) { return p.lengths[a] > p.lengths[b]; });
    row.reserve(p.batch);
    int64_t live_before = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      RowBlock own = {};
      own.first = (int64_t)row.size();
      own.row = row.data() + row.size();
      for (int64_t b = block; b < p.batch; b += blocks, ++own.rows) row.push_back(order[b]);
      if (!slots.empty()) own.slot = slots.data() + block * p.distinct;
      int32_t *const active_rows = active.data() + block * p.steps;
      int64_t remaining = own.rows;
      for (int64_t t = 0; t < p.steps; ++t) {
        while (remaining && p.lengths && p.lengths[own.row[remaining - 1]] <= t) --remaining;
        active_rows[t] = (int32_t)remaining;
        for (int64_t i = 0; own.slot && i < remaining; ++i)
          own.slot[p.tokens[t * p.batch + own.row[i]]] = 0;
      }
      own.active = active_rows;
      own.before = &before[block * (p.steps + 1)];
      std::partial_sum(active_rows, active_rows + p.steps, &before[block * (p.steps + 1) + 1]);
      own.live_before = live_before, live_before += own.before[p.steps];
      for (int64_t k = 0; own.slot && k < p.distinct; ++k)
        if (!own.slot[k]) own.slot[k] = (int32_t)distinct[block]++;
      for (int direction = 0; direction < p.directions; ++direction) {
        own.direction = direction;
        row_blocks[direction * blocks + block] = own;
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
        for (int64_t i = 0; i < row_blocks[block].active[t]; ++i) {
          const int64_t at = t * p.batch + row_blocks[block].row[i];
          place[p.tokens ? p.tokens[at] : at] = 1;
        }
    for (int64_t row = 0; row < p.distinct; ++row)
      if (place[row]) {
        place[row] = (int64_t)live_rows.size();
        live_rows.push_back(row);
      }
  }
};

// Divides a product into parts of at most this many rows and panels and, if there are too few parts
// for the threads, of fewer panels. The number of panels of a part does not change the sums, but
// the number of rows does.
inline std::vector<Part> cut(int directions, int64_t rows, int64_t panels, int64_t most_rows,
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
                         panels * (j + 1) / across, nullptr});
  return parts;
}

}  // namespace
