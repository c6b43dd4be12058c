// The input projections a = x W' + b and their gradients, only for the rows of x that some time
// step reads.
#pragma once

#include "products.h"

namespace INSTRUCTION_SET {

// C[M, 2 vectors] = From + A[M, K] B[K, 2 vectors] for any K, in parts of B that stay in the
// first-level cache.
template <class E>
INLINE void long_product(int64_t M, int64_t K, const E *a, int64_t lda, const E *b,
                         const Number<E> *from, int64_t ld_from, Number<E> *c, int64_t ldc) {
  constexpr int64_t V = Simd<E>::width, most = 24576 / (2 * VECTOR_BYTES);
  const int64_t parts = K < most ? 1 : (K + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t k = K * i / parts, end = K * (i + 1) / parts;
    product<E>(M, end - k, a + k, lda, b + k * 2 * V, 2 * V, i ? c : from, i ? ldc : ld_from, c,
               ldc);
  }
}

// Copies the inputs of a part, as the left factor of its product; returns the number of its rows.
template <class E>
INLINE int64_t copy_inputs(const Call &call, const Part &part, E *to) {
  using T = Number<E>;
  const gru_problem &p = *call.problem;
  int64_t rows = 0;
  for (int64_t i = part.from; i < part.to; ++i)
    if (!part.block)
      copy_row(to + rows++ * call.input_stride, input<T>(call, i), p.inputs);
    else
      for (int64_t j = 0; j < part.block->active[i]; ++j)
        copy_row(to + rows++ * call.input_stride,
                 (const T *)p.x + (i * p.batch + part.block->row[j]) * p.inputs, p.inputs);
  return rows;
}

// x W' + b for the rows of a part.
template <class E>
FN void project(const Call &call, const Scratch<Number<E>> &scratch, const Part &part) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const int64_t D = call.problem->inputs, panel_size = depth<E>(D) * 2 * V;
  const E *weights = (const E *)call.packed_inputs[part.direction];
  const T *bias = (const T *)(weights + panels_of(call.columns(), V) * panel_size);
  T *sums = part.block ? block_projections<T>(call, *part.block, scratch, part.from)
                       : (T *)call.projections[part.direction] + part.from * call.gates_stride;
  const E *inputs = (const E *)scratch.inputs;
  int64_t rows = part.to - part.from, stride = call.input_stride;
  if (part.block || call.live_rows || numbers<E> > 1)  // scattered rows, or rows not yet in pairs
    rows = copy_inputs<E>(call, part, (E *)scratch.inputs);
  else
    inputs = (const E *)input<T>(call, part.from), stride = D;
  for (int64_t panel = part.first; panel < part.last; ++panel)
    long_product<E>(rows, depth<E>(D), inputs, stride, weights + panel * panel_size,
                    bias + panel * 2 * V, 0, sums + panel * 2 * V, call.gates_stride);
}

// The gradient of the rows [from, to) of W, padded as in pack_input_weights, in some panels of
// columns, and with the first of them that of b: sums over the live rows.
template <class E>
FN void input_weight_gradient(const Call &call, const Scratch<Number<E>> &scratch,
                              const Part &part) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const gru_direction &d = call.directions[part.direction];
  const int64_t H = call.problem->hidden, D = call.problem->inputs, Hv = call.gate_stride;
  const int64_t rows = part.to - part.from, width = (part.last - part.first) * 2 * V;
  const T *g = (const T *)call.projections[part.direction] + part.from;
  T *sums = scratch.sums, *bias = scratch.inputs;
  for (int64_t i = 0; i < rows * width; i += V) store(sums + i, Vector<T>{});
  for (int64_t i = 0; i < rows; i += V) store(bias + i, Vector<T>{});
  for (int64_t k = 0; k < call.live; k += chunk_rows) {
    const int64_t some = call.live - k < chunk_rows ? call.live - k : chunk_rows;
    const SumFactor<E> factor = as_sum_factor<E>(some, rows, g + k * call.gates_stride,
                                                 call.gates_stride, scratch.factor);
    for (int64_t panel = part.first; panel < part.last; ++panel)
      product<E, true>(rows, depth<E>(some), factor.at, factor.ld,
                       (const E *)call.inputs +
                           (panel * depth<E>(call.live) + k / numbers<E>) * 2 * V, 2 * V,
                       sums + (panel - part.first) * 2 * V, width);
    for (int64_t u = 0; part.first == 0 && u < rows; u += V) {
      Vector<T> sum[2] = {};
      for (int64_t i = k; i < k + some; ++i) sum[i % 2] += load(g + i * call.gates_stride + u);
      store(bias + u, load(bias + u) + (sum[0] + sum[1]));
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t gate = (part.from + i) / Hv, unit = (part.from + i) % Hv, row = gate * H + unit;
    if (unit >= H) continue;
    for (int64_t u = 0; u < width; u += V)
      store((T *)d.d_weight_ih + row * D + part.first * 2 * V + u, load(sums + i * width + u),
            D - part.first * 2 * V - u);
    if (part.first == 0) ((T *)d.d_bias_ih)[row] = bias[i];
  }
}

// The gradient of the live rows [from, to) of x: a sum over the directions.
template <class E>
FN void input_gradient(const Call &call, const Scratch<Number<E>> &scratch, const Part &part) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const int64_t D = call.problem->inputs, K = call.columns(), rows = part.to - part.from;
  const int64_t stride = call.gates_stride;
  const T zeros[2 * V] = {};
  T *sums = scratch.sums;
  const E *factor[2];
  for (int direction = 0; direction < call.problem->directions; ++direction)
    factor[direction] =
        as_left(E{}, rows, K, (const T *)call.projections[direction] + part.from * stride, stride,
                scratch.factor + direction * input_rows * stride);
  for (int64_t panel = part.first; panel < part.last; ++panel) {
    for (int direction = 0; direction < call.problem->directions; ++direction)
      long_product<E>(rows, depth<E>(K), factor[direction], stride,
                      (const E *)call.packed_inputs[direction] + panel * depth<E>(K) * 2 * V,
                      direction ? sums : zeros, direction ? 2 * V : 0, sums, 2 * V);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0, u = panel * 2 * V; j < 2 * V; j += V)
        store((T *)call.problem->d_x + live_row(call, part.from + i) * D + u + j,
              load(sums + i * 2 * V + j), D - u - j);
  }
}

}  // namespace INSTRUCTION_SET
