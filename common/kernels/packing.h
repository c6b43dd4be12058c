// The packed factors of products, weights and inputs in panels of two vectors, and the fingerprint
// of weights, by which the cache of packed weights (weights_cache.h) detects changes.
#pragma once

#include "vectors.h"

namespace INSTRUCTION_SET {

// Elements k and k + 1 of rows, which are columns of a product's right factor, as one vector of
// elements; zeros for missing rows.
template <class T>
INLINE Vector<T> load_rows(T, const T *row, const T *, int64_t n) {
  return row ? load(row, n) : Vector<T>{};
}

INLINE Vector<Pair> load_rows(Pair, const float *row, const float *next, int64_t n) {
  return as_pairs(load_rows(0.f, row, row, n), load_rows(0.f, next, next, n));
}

// The same for two vectors, which are stored.
template <class E>
INLINE void store_rows(E *to, const Number<E> *row, const Number<E> *next, int64_t n) {
  constexpr int64_t V = Simd<E>::width;
  store(to, load_rows(E{}, row, next, n));
  store(to + V, load_rows(E{}, row ? row + V : row, next ? next + V : next, n - V));
}

// The numbers of a row as a product's left factor.
template <class T>
INLINE void copy_row(T *to, const T *from, int64_t n) {
  for (int64_t i = 0; i < n; i += Simd<T>::width) store(to + i, load(from + i, n - i), n - i);
}

INLINE void copy_row(Pair *to, const float *from, int64_t n) {
  using S = Simd<Pair>;
  for (int64_t u = 0; u < n; u += S::width)
    *(S::UnalignedHalf *)(to + u / 2) = halved(load(from + u, n - u));
}

// A matrix [rows, K] as a product's left factor: itself, or, in the memory given, in pairs.
template <class T>
INLINE const T *as_left(T, int64_t, int64_t, const T *a, int64_t, T *) {
  return a;
}

INLINE const Pair *as_left(Pair, int64_t rows, int64_t K, const float *a, int64_t stride,
                           float *memory) {
  for (int64_t i = 0; i < rows; ++i) copy_row((Pair *)memory + i * stride, a + i * stride, K);
  return (const Pair *)memory;
}

// A matrix [K, columns] whose rows a product sums, as one of its factors. The memory may be the
// matrix's own.
template <class T>
INLINE const T *as_sum(T, int64_t, int64_t, const T *a, int64_t, T *) {
  return a;
}

INLINE const Pair *as_sum(Pair, int64_t K, int64_t columns, const float *a, int64_t stride,
                          float *memory) {
  Pair *to = (Pair *)memory;
  for (int64_t k = 0; k < K; k += 2, a += 2 * stride, to += stride)
    for (int64_t u = 0; u < columns; u += Simd<Pair>::width)
      store(to + u, load_rows(Pair{}, a + u, k + 1 < K ? a + stride + u : nullptr, columns));
  return (const Pair *)memory;
}

// Element k of a row of n numbers.
template <class T>
INLINE T element(T, const T *row, int64_t k, int64_t) {
  return row[k];
}

INLINE Pair element(Pair, const float *row, int64_t k, int64_t n) {
  uint32_t low, high = 0;
  __builtin_memcpy(&low, row + 2 * k, 4);
  if (2 * k + 1 < n) __builtin_memcpy(&high, row + 2 * k + 1, 4);
  return {rounded(low) >> 16 | (rounded(high) & 0xffff0000)};
}

INLINE Pair operator*(int sign, Pair x) { return {sign < 0 ? x.bits ^ 0x80008000 : x.bits}; }

// The rows of a [rows, K], at most a vector of them, side by side: element k of row j, times sign,
// goes to to[k * 2 vectors + j]. Missing rows are zeros.
template <class E>
FN void transpose(int64_t rows, int64_t K, const Number<E> *a, int sign, E *to) {
  constexpr int64_t V = Simd<E>::width;
  for (int64_t k = 0; k < depth<E>(K); ++k)
    for (int64_t j = 0; j < V; ++j)
      to[k * 2 * V + j] = j < rows ? sign * element(E{}, a + j * K, k, K) : E{};
}

// The recurrent weights, phase after phase of the cell (backward, the last phase first). Forward, a
// phase of two gates has panels [H, V units of the first | V units of the second], a phase of one
// gate panels [H, 2V units]. Backward, the panels [H, 2V units] of the phase's gates alternate. H
// is in elements.
template <class E>
FN void pack_weights(const Call &call, int direction, bool backward) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const CellShape &cell = call.cell;
  const int64_t H = call.problem->hidden;
  const T *weights = (const T *)call.directions[direction].weight_hh;
  E *at = (E *)call.packed[direction];
  for (int phase = cell.phases - 1; backward && phase >= 0; --phase)
    for (int64_t u = 0; u < H; u += 2 * V)
      for (int i = 0; i < cell.phase_gates[phase]; ++i)
        for (int64_t k = 0; k < H; k += numbers<E>, at += 2 * V) {
          const T *row = weights + ((cell.first_gate(phase) + i) * H + k) * H + u;
          store_rows(at, row, k + 1 < H ? row + H : nullptr, H - u);
        }
  const int64_t panel_size = depth<E>(H) * 2 * V;
  for (int phase = 0; !backward && phase < cell.phases; ++phase) {
    const int gates = cell.phase_gates[phase];
    for (int64_t u = 0; u < H; u += 2 * V / gates, at += panel_size)
      for (int i = 0; i < 2; ++i) {
        const int gate = cell.first_gate(phase) + (gates == 2 ? i : 0);
        const int64_t unit = u + (gates == 2 ? 0 : i * V);
        transpose<E>(H - unit, H, weights + (rows_of(call, gate) + unit) * H, sign_of(call, gate),
                     at + i * V);
      }
  }
}

// W packed for the products, in panels of two vectors; a gate's rows begin at multiples of
// gate_stride. Forward: panels [D, 2V rows of W], then b, and c where it is only added to it.
// Backward: panels [rows of W, 2V columns]. The first of these sizes is in elements.
template <class E>
FN void pack_input_weights(const Call &call, int direction, bool backward) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const gru_problem &p = *call.problem;
  const gru_direction &d = call.directions[direction];
  const int64_t H = p.hidden, D = p.inputs, Hv = call.gate_stride, columns = call.columns();
  const T *weights = (const T *)d.weight_ih;
  E *at = (E *)call.packed_inputs[direction];
  if (backward) {
    for (int64_t u = 0; u < D; u += 2 * V)
      for (int64_t row = 0; row < columns; row += numbers<E>, at += 2 * V) {
        const T *from = weights + (row / Hv * H + row % Hv) * D + u;
        store_rows(at, row % Hv < H ? from : nullptr, row % Hv + 1 < H ? from + D : nullptr, D - u);
      }
    return;
  }
  for (int64_t column = 0; column < columns; column += 2 * V, at += depth<E>(D) * 2 * V)
    for (int64_t j = 0; j < 2 * V; j += V) {
      const int gate = (int)((column + j) / Hv);
      const int64_t u = (column + j) % Hv, n = gate < call.cell.gates ? H - u : 0;
      transpose<E>(n, D, weights + (rows_of(call, gate) + u) * D, sign_of(call, gate), at + j);
    }
  T *bias = (T *)at;
  for (int64_t column = 0; column < columns; column += V, bias += V) {
    const int gate = (int)(column / Hv);
    const int64_t u = column % Hv, n = H - u;
    const Vector<T> hidden = load((const T *)d.bias_hh + rows_of(call, gate) + u, n);
    const Vector<T> input = load((const T *)d.bias_ih + rows_of(call, gate) + u, n);
    const Vector<T> sum = gate == call.cell.separate_gate ? input : input + hidden;
    store(bias, T(sign_of(call, gate)) * sum);
  }
}

// The live rows [from, to) of x in panels of two vectors, padded with zeros.
template <class E>
FN void pack_inputs(const Call &call, int64_t from, int64_t to) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const int64_t D = call.problem->inputs;
  for (int64_t i = from; i < to; i += numbers<E>) {
    const T *row = input<T>(call, i), *next = i + 1 < to ? input<T>(call, i + 1) : nullptr;
    E *at = (E *)call.inputs + i / numbers<E> * 2 * V;
    for (int64_t u = 0; u < D; u += 2 * V, at += depth<E>(call.live) * 2 * V)
      store_rows(at, row + u, next ? next + u : next, D - u);
  }
}

// A hash of n 32-bit words. It detects every change of a single word, and changes of several words
// unless they cancel: a random change does so with a probability of 2^-32 at most, but the changes
// that cancel are easy to construct (bit 31 of word k together with bits 31 and 16 of the word
// that the same lane reads next). The hash detects accidents; it is not collision-resistant. (A sum
// would miss accidents: many changes of sign leave a sum as it is.)
template <class T>
FN uint64_t fingerprint(const void *memory, int64_t n) {
  typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
  typedef uint32_t Word __attribute__((may_alias));
  constexpr int64_t width = VECTOR_BYTES / 4, chains = 8;
  const Word *at = (const Word *)memory;
  Words hash[chains] = {};
  int64_t i = 0;
  for (; i + chains * width <= n; i += chains * width)
#pragma GCC unroll 8
    for (int64_t s = 0; s < chains; ++s) {
      hash[s] = (hash[s] ^ *(const Unaligned *)(at + i + s * width)) * 0x9E3779B1u;
      hash[s] ^= hash[s] >> 15;
    }
  uint64_t result = (uint64_t)n;
  for (; i < n; ++i) result = (result ^ at[i]) * 0x9E3779B97F4A7C15u, result ^= result >> 32;
  for (int64_t j = 0; j < chains * width; ++j)
    result = (result ^ hash[j / width][j % width]) * 0x9E3779B97F4A7C15u, result ^= result >> 32;
  return result;
}

}  // namespace INSTRUCTION_SET
