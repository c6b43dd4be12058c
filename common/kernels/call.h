// The data of one call of gru.h. The host (execution.h) prepares it; the vectorised code, which is
// compiled once for each instruction set, reads it. Functions in this file have internal linkage,
// so that the linker never replaces a copy for one instruction set by the copy for another.
#pragma once

#include <type_traits>

#include "gru.h"

namespace gru {

// The number of rows, over several steps, from which the gradient of the recurrent weights is
// computed at once. With fewer, reading and writing the gradient takes more of the time; with more,
// its rounding errors grow.
constexpr int64_t chunk_rows = 128;

// The number of rows of the inputs in one part of the input product.
constexpr int64_t input_rows = 96;

// The gradient of the input weights is a sum over all live rows. These are the number of rows, and
// the bytes of each, that one part sums. With fewer, memory is read more often; with more, the sums
// exceed the second-level cache.
constexpr int64_t gradient_rows = 192, gradient_bytes = 640;

// The properties of a cell that the rest of the kernel needs: see cells.h.
constexpr int max_gates = 4, max_phases = 2;
struct CellShape {
  int gates;                         // blocks of H rows of the weights
  int saved;                         // numbers per unit and step that forward saves for backward
  int phases;                        // successive products of a step
  int phase_gates[max_phases];       // the gates of each phase: one or two
  bool reads_operand[max_phases];    // whether the left factor is the operand or the state
  int separate_gate;                 // the gate whose input projection and recurrent product the cell
                                     // combines itself; -1: none
  int nn_gate[max_gates], nn_sign[max_gates];  // the gate and its sign in nn_order

  // The first gate of a phase.
  constexpr int first_gate(int phase) const { return phase ? phase_gates[0] : 0; }
  // The parts of a step, between which threads that share a row block wait for each other.
  constexpr int parts() const { return phases == 2 && reads_operand[1] ? 2 : 1; }
};

// Rows of the batch in one direction, whose time steps one thread computes.
struct RowBlock {
  int direction;
  int64_t first, rows;                       // first: the number of rows in the blocks before it
  const int32_t *row;                        // [rows] into the batch, longest first
  const int32_t *active;                     // [steps] the number of rows that have this step
  const int32_t *before;                     // [steps + 1] their sum over all steps before this one
  int64_t live_before;                       // their sum over all steps of the blocks before
  int32_t *slot;                             // [distinct] the row of d_projections below, or -1
  void *d_projections, *d_weights, *d_bias;  // the gradients of the block, padded
};

// Phases [first_phase, last_phase) of a step, for units [from, to).
struct Task {
  int64_t step;
  int first_phase, last_phase;
  int64_t from, to;
};

// A part of a product: panels [first, last) of live rows [from, to) or, if there is a row block, of its
// rows of steps [from, to).
struct Part {
  int direction;
  int64_t from, to, first, last;
  const RowBlock *block;
};

struct Call {
  const gru_problem *problem;
  const gru_direction *directions;
  CellShape cell;
  const RowBlock *row_blocks;  // [directions, blocks]
  int64_t blocks, chunk;
  // The number of steps of a row block whose inputs are projected together; 0: the live rows of x
  // are projected, regardless of the row blocks.
  int64_t projected_steps;
  // Distances in memory, padded to vectors: between the rows of states, the gates of a row, the
  // rows of gates, the rows of the weights' gradient, and the rows of inputs.
  int64_t state_stride, gate_stride, gates_stride, weight_stride, input_stride;
  // The live rows of x are those that some step reads; the input product is computed only for them.
  // live_rows contains the row of x of each live row, place the inverse; NULL if all rows are live.
  int64_t live;
  const int64_t *live_rows, *place;
  void *packed[2], *packed_inputs[2];
  // [rows, gates] of the live rows of x or, with projected_steps, of the row blocks one after
  // another; NULL if the threads' Scratch has them. Backward: the gradient, of the live rows.
  void *projections[2];
  void *inputs;  // backward: the live rows in panels

  int64_t columns() const { return cell.gates * gate_stride; }
};

// The first row of a gate's weights, and the sign that they are multiplied by.
static inline int64_t rows_of(const Call &call, int gate) {
  const gru_problem &p = *call.problem;
  return (p.nn_order ? call.cell.nn_gate[gate] : gate) * p.hidden;
}

static inline int sign_of(const Call &call, int gate) {
  return call.problem->nn_order ? call.cell.nn_sign[gate] : 1;
}

static inline int64_t live_row(const Call &call, int64_t i) {
  return call.live_rows ? call.live_rows[i] : i;
}

template <class T>
static inline const T *input(const Call &call, int64_t i) {
  return (const T *)call.problem->x + live_row(call, i) * call.problem->inputs;
}

// The number of panels, of two vectors of width V, for this many columns.
static inline int64_t panels_of(int64_t columns, int64_t V) { return (columns + 2 * V - 1) / (2 * V); }

// Whether a direction is reset before step t in row i of the block, which has that step.
static inline bool resets_at(const gru_problem &p, const gru_direction &d, const RowBlock &block,
                             int64_t t, int64_t i) {
  const int64_t begin = t + (d.reverse ? 1 : 0);  // backward, the reset is at the following step
  return begin < p.steps && i < block.active[begin] && p.resets[begin * p.batch + block.row[i]];
}

// An element of the state to which such a direction is reset.
template <class T>
static inline T reset_state(const gru_direction &d, int64_t at) {
  return d.h_reset ? ((const T *)d.h_reset)[at] : T(0);
}

// The elements of a product's factors: numbers, or pairs of successive bfloat16 numbers of a sum,
// the first in the lower half.
struct __attribute__((may_alias)) Pair {
  uint32_t bits;
};

// The number of numbers in an element E of a product's factors.
template <class E>
constexpr int64_t numbers = 1;
template <>
constexpr int64_t numbers<Pair> = 2;

// The type of a factor's numbers, in which products are summed.
template <class E>
using Number = std::conditional_t<std::is_same_v<E, Pair>, float, E>;

// The K extent: the number of elements of a sum over n numbers.
template <class E>
static constexpr int64_t depth(int64_t n) {
  return (n + numbers<E> - 1) / numbers<E>;
}

// The working memory of a thread.
template <class T>
struct Scratch {
  T *h, *after, *between[2], *operand, *tile, *gates, *states, *operands, *inputs, *sums;
  T *factor;                 // a product's left factor in pairs
  T *projections;            // of projected_steps steps of a row block, if a call has no others
  int64_t projected_before;  // the number of the block's rows before these steps
  const T **source, **next;  // the projections of this step and the next
};

// The state before a step.
template <class T>
static inline T *state_of(const Scratch<T> &scratch, int64_t step) {
  return step % 2 ? scratch.after : scratch.h;
}

// The projections of a row block from step t on.
template <class T>
static inline T *block_projections(const Call &call, const RowBlock &block, const Scratch<T> &own,
                                   int64_t t) {
  T *const all = (T *)call.projections[block.direction];
  const int64_t row = block.before[t] + (all ? block.live_before : -own.projected_before);
  return (all ? all : own.projections) + row * call.gates_stride;
}

// The functions that are compiled for a cell, and for everything else, with one instruction set.
template <class T>
struct CellKernels {
  CellShape shape;
  void (*forward)(const Call &, const RowBlock &, const Scratch<T> &shared, const Scratch<T> &own,
                  const Task &);
  void (*backward)(const Call &, const RowBlock &, const Scratch<T> &);
};

template <class T>
struct Kernels {
  int64_t width;
  const CellKernels<T> (*cells)[2];  // by gru_problem's cell and reset_after
  void (*pack_input_weights)(const Call &, int direction, bool backward);
  void (*pack_weights)(const Call &, int direction, bool backward);
  void (*project)(const Call &, const Scratch<T> &, const Part &);
  void (*reduce_weights)(const Call &, int direction, int64_t from, int64_t to);
  void (*reduce_projections)(const Call &, int direction, int64_t from, int64_t to);
  void (*pack_inputs)(const Call &, int64_t from, int64_t to);
  void (*input_weight_gradient)(const Call &, const Scratch<T> &, const Part &);
  void (*input_gradient)(const Call &, const Scratch<T> &, const Part &);
  uint64_t (*fingerprint)(const void *, int64_t);
  void (*release_tiles)();
};

}  // namespace gru

// Defined in instruction_set.cpp: the kernels of each instruction set.
#define DECLARE_KERNELS(set, E)                        \
  namespace set {                                      \
  using gru::Pair;                                     \
  extern const gru::Kernels<gru::Number<E>> kernels_of_##E; \
  }
