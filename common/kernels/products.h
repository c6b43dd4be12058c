// Products of matrices: a product C = From + A B computes two vectors of columns, a panel, of any
// number of rows, in tiles of C that stay in registers.
#pragma once

#include "tiles.h"

// The number of rows of a tile that fits the registers.
#if defined(__AMX_BF16__)
#define TILE_ROWS 16
#elif defined(__AVX512F__) || defined(__aarch64__)
#define TILE_ROWS 12
#else
#define TILE_ROWS 6
#endif

namespace INSTRUCTION_SET {

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

// Loads a value once, instead of as a memory operand of each sum: while such an operand is loaded
// from the second-level cache, the processor retries the others, and a tile of two rows takes
// longer than one of four.
#if defined(__x86_64__) || defined(__i386__)
#define IN_REGISTERS(a, b) asm("" : "+v"(a), "+v"(b))
#elif defined(__aarch64__)
#define IN_REGISTERS(a, b) asm("" : "+w"(a), "+w"(b))
#else
#define IN_REGISTERS(a, b)
#endif

// The distance, in rows of a transposed factor, at which memory is prefetched.
constexpr int64_t rows_ahead = 32;

// C[M, 2 vectors] = From + A[M, K] B[K, 2 vectors], all of C in registers. A is stored [K, M] if
// Transposed: those are the weights' gradients, long sums, of which each is added up in two halves,
// which halves its rounding error.
template <class E, int M, bool Transposed>
FN void tile(int64_t K, const E *a, int64_t lda, const E *b, int64_t ldb, const Number<E> *from,
             int64_t ld_from, Number<E> *c, int64_t ldc) {
  using T = Number<E>;
  constexpr int width = Simd<E>::width;
  // So few sums do not hide the latency of an addition, so each is split.
  constexpr int chains = M == 1 ? 4 : 2 * M <= TILE_ROWS ? 2 : 1;
  constexpr int at_once = chains == 1 && !Transposed ? 2 : chains;
  constexpr int parts = chains == 1 && Transposed ? 2 : 1;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {  // it may not be in a near cache
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
        if (Transposed) {  // far apart rows, which the processor does not prefetch
          __builtin_prefetch(a + (k + s + rows_ahead) * lda);
          __builtin_prefetch(a + (k + s + rows_ahead) * lda + M - 1);
        }
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

// C[M, 2 vectors] = From + A[M, K] B[K, 2 vectors] for any M, divided evenly into tiles.
template <class E, bool Transposed = false>
FN void product(int64_t M, int64_t K, const E *a, int64_t lda, const E *b, int64_t ldb,
                const Number<E> *from, int64_t ld_from, Number<E> *c, int64_t ldc) {
  if constexpr (tiled<E>) return tile_product(M, K, a, lda, b, ldb, from, ld_from, c, ldc);
  const int64_t tiles = (M + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = M * i / tiles, next = M * (i + 1) / tiles;
    tile_of<E, TILE_ROWS, Transposed>(next - row, K, a + row * (Transposed ? 1 : lda), lda, b, ldb,
                                      from + row * ld_from, ld_from, c + row * ldc, ldc);
  }
}

// The same with C as From.
template <class E, bool Transposed = false>
FN void product(int64_t M, int64_t K, const E *a, int64_t lda, const E *b, int64_t ldb,
                Number<E> *c, int64_t ldc) {
  product<E, Transposed>(M, K, a, lda, b, ldb, c, ldc, c, ldc);
}

}  // namespace INSTRUCTION_SET
