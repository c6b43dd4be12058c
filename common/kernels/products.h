// Products of matrices, and how their factors are laid out: a product C = From + A B computes two
// vectors of columns, a panel, of as many rows as are wanted, in tiles of C that stay in registers.
#pragma once

#include "vectors.h"

// The rows of a tile, such that it fits the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE_ROWS 12
#else
#define TILE_ROWS 6
#endif

namespace INSTRUCTION_SET {

// Elements k and k + 1 of rows, columns of a product's right factor: one vector of elements. Where
// there is no row, zeros.
template <class T>
INLINE Vector<T> load_rows(T, const T *row, const T *, int64_t n) {
  return row ? load(row, n) : Vector<T>{};
}

INLINE Vector<Pair> load_rows(Pair, const float *row, const float *next, int64_t n) {
  const Vector<float> low = load_rows(0.f, row, row, n), high = load_rows(0.f, next, next, n);
  return rounded(low) >> 16 | (rounded(high) & 0xffff0000);
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
    *(S::UnalignedHalf *)(to + u / 2) =
        __builtin_convertvector(rounded(load(from + u, n - u)) >> 16, S::Half);
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

// A matrix [K, columns] whose rows are added up by a product, as one of its factors. The memory may
// be the matrix's own.
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

template <class T>
INLINE void add_product(Vector<T> &sum, T x, Vector<T> y) {
  sum += x * y;
}

// Products of bfloat16 numbers are exact in float32: both forms round the same sums.
INLINE void add_product(Vector<float> &sum, Pair x, Vector<Pair> y) {
#ifdef __AVX512BF16__
  sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Vector<Pair>{} + x.bits),
                                        (__m512bh)y);
#else
  const Vector<Pair> both = Vector<Pair>{} + x.bits;
  sum += (Vector<float>)(both & 0xffff0000) * (Vector<float>)(y & 0xffff0000);
  sum += (Vector<float>)(both << 16) * (Vector<float>)(y << 16);
#endif
}

// Loads what it names once, and not as an operand of each sum: while one such operand is on its way
// from the second cache, the others are tried again and again, and a tile of two rows takes longer
// than one of four.
#if defined(__x86_64__) || defined(__i386__)
#define IN_REGISTERS(a, b) asm("" : "+v"(a), "+v"(b))
#elif defined(__aarch64__)
#define IN_REGISTERS(a, b) asm("" : "+w"(a), "+w"(b))
#else
#define IN_REGISTERS(a, b)
#endif

// C[M, 2 vectors] = From + A[M, K] B[K, 2 vectors], all of C in registers. A is stored [K, M] if
// Transposed: those are the weights' gradients, long sums, of which each is added up in two halves,
// which halves its rounding error.
template <class E, int M, bool Transposed>
FN void tile(int64_t K, const E *a, int64_t lda, const E *b, int64_t ldb, const Number<E> *from,
             int64_t ld_from, Number<E> *c, int64_t ldc) {
  using T = Number<E>;
  constexpr int width = Simd<E>::width;
  // Too few sums to hide an addition's latency: split each.
  constexpr int chains = M == 1 ? 4 : 2 * M <= TILE_ROWS ? 2 : 1;
  constexpr int at_once = chains == 1 && !Transposed ? 2 : chains;
  constexpr int parts = chains == 1 && Transposed ? 2 : 1;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {  // it may lie in no cache near by
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + width, 1);
  }
  Vector<T> sum[parts][chains][M][2] = {};
  int64_t k = 0;
#pragma GCC unroll 2
  for (int part = 0; part < parts; ++part) {
    auto &sums = sum[part];
    const int64_t end = part + 1 == parts ? K : K / 2;
    for (; k + at_once <= end; k += at_once)
#pragma GCC unroll 4
      for (int s = 0; s < at_once; ++s) {
        Vector<E> b0 = load(b + (k + s) * ldb), b1 = load(b + (k + s) * ldb + width);
        IN_REGISTERS(b0, b1);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          const E x = Transposed ? a[(k + s) * lda + i] : a[i * lda + k + s];
          add_product(sums[s % chains][i][0], x, b0);
          add_product(sums[s % chains][i][1], x, b1);
        }
      }
    for (; k < end; ++k)
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const E x = Transposed ? a[k * lda + i] : a[i * lda + k];
        add_product(sums[0][i][0], x, load(b + k * ldb));
        add_product(sums[0][i][1], x, load(b + k * ldb + width));
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      Vector<T> total = sum[0][0][i][j];
      for (int s = 1; s < parts * chains; ++s) total += sum[s / chains][s % chains][i][j];
      store(c + i * ldc + j * width, load(from + i * ld_from + j * width) + total);
    }
}

template <class E, int M, bool Transposed>
INLINE void tile_of(int64_t rows, int64_t K, const E *a, int64_t lda, const E *b, int64_t ldb,
                    const Number<E> *from, int64_t ld_from, Number<E> *c, int64_t ldc) {
  if constexpr (M > 0) {
    if (rows == M) return tile<E, M, Transposed>(K, a, lda, b, ldb, from, ld_from, c, ldc);
    tile_of<E, M - 1, Transposed>(rows, K, a, lda, b, ldb, from, ld_from, c, ldc);
  }
}

// C[M, 2 vectors] = From + A[M, K] B[K, 2 vectors] for any M, dealt evenly into tiles.
template <class E, bool Transposed = false>
FN void product(int64_t M, int64_t K, const E *a, int64_t lda, const E *b, int64_t ldb,
                const Number<E> *from, int64_t ld_from, Number<E> *c, int64_t ldc) {
  const int64_t tiles = (M + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = M * i / tiles, next = M * (i + 1) / tiles;
    tile_of<E, TILE_ROWS, Transposed>(next - row, K, a + row * (Transposed ? 1 : lda), lda, b, ldb,
                                      from + row * ld_from, ld_from, c + row * ldc, ldc);
  }
}

// The same with C itself to begin from.
template <class E, bool Transposed = false>
FN void product(int64_t M, int64_t K, const E *a, int64_t lda, const E *b, int64_t ldb,
                Number<E> *c, int64_t ldc) {
  product<E, Transposed>(M, K, a, lda, b, ldb, c, ldc, c, ldc);
}

}  // namespace INSTRUCTION_SET
