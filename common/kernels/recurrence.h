// The recurrence of any cell (cell.h), forward and backward: its time steps and row blocks.
#pragma once

#include "cell.h"
#include "products.h"

namespace INSTRUCTION_SET {

// Prefetches memory that the next step reads and that may be outside the near caches.
template <class T>
INLINE void prefetch(const T *p, int64_t count) {
  for (int64_t i = 0; i < count; i += Simd<T>::width) __builtin_prefetch(p + i, 0, 2);
}

// The projections of row b of the batch at step t, or their gradient, among those of the live rows.
template <class T>
INLINE T *live_projections_of(const Call &call, int direction, int64_t t, int64_t b) {
  const gru_problem &p = *call.problem;
  const int64_t at = t * p.batch + b, row = p.tokens ? p.tokens[at] : at;
  const int64_t place = call.place ? call.place[row] : row;
  return (T *)call.projections[direction] + place * call.gates_stride;
}

// The projections of row i of a block at step t.
template <class T>
INLINE const T *projections_of(const Call &call, const RowBlock &block, const Scratch<T> &own,
                               int64_t t, int64_t i) {
  if (!call.projected_steps) return live_projections_of<T>(call, block.direction, t, block.row[i]);
  return block_projections<T>(call, block, own, t) + i * call.gates_stride;
}

// One forward step of a row block. t: its position in the sequence; rows: the number of rows that
// have step t; ahead: the distance to the next step; h, after: the states before and after the step;
// saved: the block's records of the step, or NULL.
template <class T>
struct ForwardStep {
  int64_t t, rows, ahead;
  const T *h;
  T *after, *saved;
};

// The sums of a panel before its product: the input projections or, for a separate gate, the bias.
template <class T, class Cell, int phase>
INLINE void begin_sums(const Call &call, const gru_direction &d, const T *const *source, int64_t rows,
                       int64_t u0, T *sums) {
  constexpr int64_t V = Simd<T>::width;
  constexpr int gates = Cell::shape.phase_gates[phase], first = Cell::shape.first_gate(phase);
  constexpr bool separate = gates == 1 && Cell::shape.separate_gate == first;
  const int64_t H = call.problem->hidden, Hv = call.gate_stride;
  Vector<T> bias[2] = {};
  for (int j = 0; separate && j < 2; ++j)
    bias[j] = load((const T *)d.bias_hh + first * H + u0 + j * V, H - u0 - j * V);
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < 2; ++j)
      store(sums + (2 * i + j) * V,
            separate ? bias[j] : load(source[i] + first * Hv + u0 + j * (gates == 2 ? Hv : V)));
}

// One phase of a step, for the units of the task.
template <class E, class Cell, int phase>
FN void forward_phase(const Call &call, const RowBlock &block, const Scratch<Number<E>> &shared,
                      const Scratch<Number<E>> &own, const Task &task,
                      const ForwardStep<Number<E>> &step, const E *packed, const E *factor) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  constexpr int gates = Cell::shape.phase_gates[phase];
  constexpr int64_t width = 2 * V / gates;  // units of a panel
  const gru_problem &p = *call.problem;
  const gru_direction &d = call.directions[block.direction];
  const int64_t H = p.hidden, Hv = call.gate_stride, stride = call.state_stride;
  const int64_t record = Cell::shape.saved * H, end = task.to < H ? task.to : H;
  const int64_t K = depth<E>(H), panel_size = K * 2 * V;
  T *const sums = own.tile;
  for (int64_t u0 = task.from; u0 < end; u0 += width) {
    begin_sums<T, Cell, phase>(call, d, own.source, step.rows, u0, sums);
    product<E>(step.rows, K, factor, stride, packed + u0 / width * panel_size, 2 * V, sums, 2 * V);
    for (int64_t u = u0; u < u0 + width && u < H; u += V)
      for (int64_t i = 0; i < step.rows; ++i) {
        const int64_t at = i * stride + u, row = step.t * p.batch + block.row[i];
        const T *const from = sums + i * 2 * V + (u - u0);
        const Vector<T> of_gates[2] = {load(from), gates == 2 ? load(from + V) : Vector<T>{}};
        const ForwardUnits<T> units = {
            own.source[i] + u,
            step.h + at,
            step.after + at,
            {shared.between[0] + at, shared.between[1] + at},
            shared.operand + at,
            d.outputs ? (T *)d.outputs + row * d.ld_outputs + u : nullptr,
            step.saved ? step.saved + i * record + u : nullptr,
            Hv,
            H,
            H - u};
        if (phase == 0) units.save(0, units.state());
        Cell::template forward<phase, T>(units, of_gates);
        if (phase > 0) continue;
        for (int gate = 0; gate < Cell::shape.gates; ++gate) prefetch(own.next[i] + gate * Hv + u, V);
        if (step.saved)
          prefetch(step.saved + (step.ahead * block.rows + i) * record + Cell::shape.saved * u,
                   Cell::shape.saved * V);
      }
  }
}

// Copies the states of the rows that have ended and sets their outputs to 0. Called before the first
// phase of a step.
template <class T>
FN void keep_ended_rows(const Call &call, const RowBlock &block, const Task &task,
                        const ForwardStep<T> &step) {
  const gru_direction &d = call.directions[block.direction];
  const int64_t H = call.problem->hidden, stride = call.state_stride;
  for (int64_t i = step.rows; i < block.rows; ++i)
    for (int64_t u = task.from; u < task.to && u < H; ++u) {
      step.after[i * stride + u] = step.h[i * stride + u];
      if (d.outputs)
        ((T *)d.outputs)[(step.t * call.problem->batch + block.row[i]) * d.ld_outputs + u] = T(0);
    }
}

// A task of a row block's step. `shared` is the memory of the block, which several threads may use,
// `own` that of this thread.
template <class E, class Cell>
FN void forward(const Call &call, const RowBlock &block, const Scratch<Number<E>> &shared,
                const Scratch<Number<E>> &own, const Task &task) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  constexpr CellShape shape = Cell::shape;
  const gru_problem &p = *call.problem;
  const gru_direction &d = call.directions[block.direction];
  const int64_t H = p.hidden, stride = call.state_stride;
  const int64_t t = d.reverse ? p.steps - 1 - task.step : task.step, rows = block.active[t];
  const int64_t ahead = task.step + 1 == p.steps ? 0 : d.reverse ? -1 : 1;
  const int64_t records = (block.first * p.steps + t * block.rows) * shape.saved * H;
  const ForwardStep<T> step = {t, rows, ahead, state_of(shared, task.step),
                               state_of(shared, task.step + 1),
                               d.saved ? (T *)d.saved + records : nullptr};
  if (task.first_phase == 0) keep_ended_rows(call, block, task, step);
  if (!rows) return;
  for (int64_t i = 0; i < rows; ++i) {
    own.source[i] = projections_of<T>(call, block, own, t, i);
    // The projections of the thread's Scratch are in the near caches.
    own.next[i] = call.projections[block.direction]
                      ? projections_of<T>(call, block, own, t + ahead, i)
                      : own.source[i];
  }
  const E *packed = (const E *)call.packed[block.direction], *factor = nullptr;
  if (task.first_phase == 0) {
    factor = as_left(E{}, rows, H, step.h, stride, own.factor);
    forward_phase<E, Cell, 0>(call, block, shared, own, task, step, packed, factor);
  }
  if constexpr (shape.phases == 2)
    if (task.last_phase == 2) {
      if (shape.reads_operand[1]) factor = as_left(E{}, rows, H, shared.operand, stride, own.factor);
      constexpr int64_t width = 2 * V / shape.phase_gates[0];
      packed += (H + width - 1) / width * depth<E>(H) * 2 * V;
      forward_phase<E, Cell, 1>(call, block, shared, own, task, step, packed, factor);
    }
  if (task.last_phase < shape.phases) return;
  for (int64_t i = 0; p.resets && ahead && i < rows; ++i)
    if (resets_at(p, d, block, t + ahead, i))
      for (int64_t u = task.from; u < task.to && u < H; ++u)
        step.after[i * stride + u] = reset_state<T>(d, block.row[i] * H + u);
}

// Adds the gradients of the recurrent weights and biases over the gathered rows, in products over
// many rows. The caller then reuses the memory of the rows.
template <class E, class Cell>
FN void add_recurrent_gradients(const Call &call, const RowBlock &block,
                                const Scratch<Number<E>> &scratch, int64_t rows) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  constexpr CellShape shape = Cell::shape;
  const int64_t H = call.problem->hidden, Hv = call.gate_stride;
  const int64_t stride = call.state_stride, gates = call.gates_stride, ld = call.weight_stride;
  T *g = scratch.gates, *d_weights = (T *)block.d_weights, *d_bias = (T *)block.d_bias;
  for (int64_t u = 0; u < shape.gates * Hv; u += V) {
    Vector<T> sum = load(d_bias + u);
    for (int64_t i = 0; i < rows; ++i) sum += load(g + i * gates + u);
    store(d_bias + u, sum);
  }
  const int64_t K = depth<E>(rows);
  const SumFactor<E> factor = as_sum_factor<E>(rows, shape.gates * Hv, g, gates, scratch.factor);
  const E *right[2] = {as_sum(E{}, rows, ld, scratch.states, stride, scratch.states)};
  right[1] = shape.reads_operand[1]
                 ? as_sum(E{}, rows, ld, scratch.operands, stride, scratch.operands)
                 : right[0];
  // So few columns of the factor at a time stay in the first-level cache.
  constexpr int64_t columns = 4 * TILE_ROWS;
  for (int gate = 0; gate < shape.gates; ++gate)
    for (int64_t row = 0; row < H; row += columns)
      for (int64_t u = 0; u < H; u += 2 * V)
        product<E, true>(H - row < columns ? H - row : columns, K, factor.column(gate * Hv + row),
                         factor.ld, right[gate >= shape.phase_gates[0]] + u, stride,
                         d_weights + (gate * Hv + row) * ld + u, ld);
}

// A row block's part of the gradient of a token's projections.
template <class T>
INLINE T *d_projections_of(const Call &call, const RowBlock &block, int64_t token) {
  return (T *)block.d_projections + block.slot[token] * call.columns();
}

// One backward step of a row block: the records of the step, the memory in which the gradients of
// the pre-activations (g), the states and the operands of its rows are gathered and, if the cell
// has a separate gate, the gradient of that gate's input projection.
template <class T>
struct BackwardStep {
  int64_t t, rows;
  const T *saved;
  T *g, *inputs, *states, *operands;
};

template <class Cell, class T>
INLINE BackwardUnits<T> units_of(const Call &call, const Scratch<T> &scratch,
                                 const BackwardStep<T> &step, int64_t i, int64_t u) {
  const int64_t H = call.problem->hidden, at = i * call.state_stride + u;
  return {step.saved + i * Cell::shape.saved * H + u,
          step.g + i * call.gates_stride + u,
          step.inputs + at,
          scratch.h + at,
          step.operands + at,
          call.gate_stride,
          H,
          H - u};
}

// The gradients of the pre-activations that do not depend on the gradient of the operand.
template <class Cell, class T>
FN void backward_units(const Call &call, const RowBlock &block, const Scratch<T> &scratch,
                       const BackwardStep<T> &step, int64_t ahead) {
  constexpr int64_t V = Simd<T>::width;
  const gru_problem &p = *call.problem;
  const gru_direction &d = call.directions[block.direction];
  const int64_t H = p.hidden, record = Cell::shape.saved * H, stride = call.state_stride;
  for (int64_t i = 0; i < step.rows; ++i) {
    const int64_t row = step.t * p.batch + block.row[i];
    const T *d_output = d.d_outputs ? (const T *)d.d_outputs + row * d.ld_outputs : nullptr;
    prefetch(step.saved + (ahead * block.rows + i) * record, record);
    if (p.tokens) prefetch(d_projections_of<T>(call, block, p.tokens[row]), call.columns());
    for (int64_t u = 0; u < H; u += V) {
      const BackwardUnits<T> units = units_of<Cell, T>(call, scratch, step, i, u);
      // Units beyond H are excluded; they may contain the product of an infinite gradient with 0.
      Vector<T> grad = load(scratch.h + i * stride + u, units.n);
      if (d_output) grad += load(d_output + u, units.n);
      store(step.states + i * stride + u, units.state());
      Cell::template backward<T>(units, grad);
    }
  }
}

// The gradient of the state through the products of one phase.
template <class E, class Cell, int phase>
FN const E *backward_phase(const Call &call, const Scratch<Number<E>> &scratch,
                           const BackwardStep<Number<E>> &step, const E *weights) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  constexpr int gates = Cell::shape.phase_gates[phase], first = Cell::shape.first_gate(phase);
  const int64_t H = call.problem->hidden, Hv = call.gate_stride, stride = call.gates_stride;
  const int64_t K = depth<E>(H), panel_size = K * 2 * V, rows = step.rows;
  const T zeros[2 * V] = {};
  T *const dh = scratch.h, *const sums = scratch.tile;
  const E *factor =
      as_left(E{}, rows, (gates - 1) * Hv + H, step.g + first * Hv, stride, scratch.factor);
  for (int64_t u0 = 0; u0 < H; u0 += 2 * V)
    for (int gate = 0; gate < gates; ++gate, weights += panel_size) {
      const E *const left = factor + gate * depth<E>(Hv);
      if constexpr (Cell::shape.reads_operand[phase]) {
        product<E>(rows, K, left, stride, weights, 2 * V, gate ? sums : zeros, gate ? 2 * V : 0, sums,
                   2 * V);
        for (int64_t u = u0; gate + 1 == gates && u < u0 + 2 * V && u < H; u += V)
          for (int64_t i = 0; i < rows; ++i)
            Cell::template backward_operand<T>(units_of<Cell, T>(call, scratch, step, i, u),
                                               load(sums + i * 2 * V + u - u0, H - u));
      } else {
        product<E>(rows, K, left, stride, weights, 2 * V, dh + u0, call.state_stride);
      }
    }
  return weights;
}

// The gradient of the projections that a step has read, summed by token or stored.
template <class Cell, class T>
FN void store_d_projections(const Call &call, const RowBlock &block, const BackwardStep<T> &step) {
  constexpr int64_t V = Simd<T>::width;
  const gru_problem &p = *call.problem;
  const int64_t H = p.hidden, Hv = call.gate_stride;
  for (int64_t i = 0; i < step.rows; ++i) {
    const int64_t at = step.t * p.batch + block.row[i];
    for (int gate = 0; gate < Cell::shape.gates; ++gate) {
      const T *from = gate == Cell::shape.separate_gate ? step.inputs + i * call.state_stride
                                                        : step.g + i * call.gates_stride + gate * Hv;
      if (p.tokens) {
        T *to = d_projections_of<T>(call, block, p.tokens[at]) + gate * Hv;
        for (int64_t u = 0; u < H; u += V) store(to + u, load(to + u) + load(from + u));
      } else {
        T *to = live_projections_of<T>(call, block.direction, step.t, block.row[i]) + gate * Hv;
        for (int64_t u = 0; u < H; u += V) store(to + u, load(from + u));
      }
    }
  }
}

// Where a sequence begins, the gradient of the state is added to that of h_reset.
template <class T>
FN void stop_at_resets(const Call &call, const RowBlock &block, T *dh, const BackwardStep<T> &step) {
  const gru_problem &p = *call.problem;
  const gru_direction &d = call.directions[block.direction];
  const int64_t H = p.hidden, stride = call.state_stride;
  for (int64_t i = 0; p.resets && i < step.rows; ++i)
    if (resets_at(p, d, block, step.t, i))
      for (int64_t u = 0; u < H; ++u) {
        ((T *)d.d_h_reset)[block.row[i] * H + u] += dh[i * stride + u];
        dh[i * stride + u] = T(0);
      }
}

template <class E, class Cell>
FN void backward(const Call &call, const RowBlock &block, const Scratch<Number<E>> &scratch) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const gru_problem &p = *call.problem;
  const gru_direction &d = call.directions[block.direction];
  const int64_t H = p.hidden, stride = call.state_stride;
  T *dh = scratch.h;  // the gradient of the state after the step
  for (int64_t i = 0; i < block.rows; ++i)
    for (int64_t u = 0; u < stride; ++u)
      dh[i * stride + u] =
          u < H && d.d_h_last ? ((const T *)d.d_h_last)[block.row[i] * H + u] : T(0);
  for (int64_t i = 0; d.d_h_reset && i < block.rows; ++i)
    for (int64_t u = 0; u < H; ++u) ((T *)d.d_h_reset)[block.row[i] * H + u] = T(0);

  int64_t gathered = 0;
  for (int64_t step = 0; step < p.steps; ++step) {
    const int64_t t = d.reverse ? step : p.steps - 1 - step, rows = block.active[t];
    if (!rows) continue;
    if (gathered + rows > call.chunk) {
      add_recurrent_gradients<E, Cell>(call, block, scratch, gathered);
      gathered = 0;
    }
    const int64_t ahead = step + 1 == p.steps ? 0 : d.reverse ? 1 : -1;
    const int64_t records = block.first * p.steps + t * block.rows;
    const BackwardStep<T> here = {t,
                                  rows,
                                  (const T *)d.saved + records * Cell::shape.saved * H,
                                  scratch.gates + gathered * call.gates_stride,
                                  scratch.between[0],
                                  scratch.states + gathered * stride,
                                  scratch.operands + gathered * stride};
    backward_units<Cell>(call, block, scratch, here, ahead);
    const E *weights = (const E *)call.packed[block.direction];
    if constexpr (Cell::shape.phases == 2)
      weights = backward_phase<E, Cell, 1>(call, scratch, here, weights);
    backward_phase<E, Cell, 0>(call, scratch, here, weights);
    store_d_projections<Cell>(call, block, here);
    stop_at_resets(call, block, dh, here);
    gathered += rows;
  }
  add_recurrent_gradients<E, Cell>(call, block, scratch, gathered);
  for (int64_t i = 0; i < block.rows; ++i)
    for (int64_t u = 0; u < H; u += V)
      store((T *)d.d_h0 + block.row[i] * H + u, load(dh + i * stride + u), H - u);
}

// Sums the gradients of a direction's row blocks, in their order: rows [from, to) of the gradient
// of the weights, or live rows of the gradient of the projections.
template <class T>
FN void reduce_weights(const Call &call, int direction, int64_t from, int64_t to) {
  constexpr int64_t V = Simd<T>::width;
  const gru_direction &d = call.directions[direction];
  const RowBlock *row_blocks = call.row_blocks + direction * call.blocks;
  const int64_t H = call.problem->hidden;
  for (int64_t row = from; row < to; ++row) {
    const int64_t padded = row / H * call.gate_stride + row % H;
    for (int64_t u = 0; u < H; u += V) {
      Vector<T> sum = {};
      for (int64_t i = 0; i < call.blocks; ++i)
        sum += load((const T *)row_blocks[i].d_weights + padded * call.weight_stride + u);
      store((T *)d.d_weight_hh + row * H + u, sum, H - u);
    }
    T sum = 0;
    for (int64_t i = 0; i < call.blocks; ++i) sum += ((const T *)row_blocks[i].d_bias)[padded];
    ((T *)d.d_bias_hh)[row] = sum;
  }
}

template <class T>
FN void reduce_projections(const Call &call, int direction, int64_t from, int64_t to) {
  constexpr int64_t V = Simd<T>::width;
  const RowBlock *row_blocks = call.row_blocks + direction * call.blocks;
  for (int64_t row = from; row < to; ++row) {
    const int64_t token = live_row(call, row);
    T *sums = (T *)call.projections[direction] + row * call.gates_stride;
    for (int64_t u = 0; u < call.columns(); u += V) {
      Vector<T> sum = {};
      for (int64_t i = 0; i < call.blocks; ++i)
        if (row_blocks[i].slot[token] >= 0)
          sum += load(d_projections_of<T>(call, row_blocks[i], token) + u);
      store(sums + u, sum);
    }
  }
}

}  // namespace INSTRUCTION_SET
