// Products of pairs on the matrix unit of Intel's processors (AMX), which has eight tiles. TDPBF16PS
// multiplies a left tile, up to 16 rows of 16 pairs, by a right tile, 16 rows of 16 pairs, and adds the
// product to a tile of 16 columns of floats. A panel is two right tiles wide.
#pragma once

#include "packing.h"

namespace INSTRUCTION_SET {

// Whether products of these elements use tiles.
template <class E>
constexpr bool tiled = false;

#ifdef __AMX_BF16__
template <>
constexpr bool tiled<Pair> = true;

constexpr int64_t tile_rows = 16, tile_pairs = 16;

// The compiler does not know that the instructions that load tiles read memory (GCC).
#define MEMORY_BARRIER asm volatile("" : : : "memory")

// The pairs of the rows of a [K, columns], transposed: a whole number of tiles, filled up with zeros.
FN const Pair *transposed_pairs(int64_t K, int64_t columns, const float *a, int64_t stride, Pair *to) {
  constexpr int64_t n = tile_pairs, ld = chunk_rows / 2;
  const Vector<Pair> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t u = 0; u < columns; u += n)
    for (int64_t k = 0; k < depth<Pair>(K); k += n) {
      Vector<Pair> x[n];
#pragma GCC unroll 16
      for (int64_t i = 0; i < n; ++i) {
        const int64_t row = 2 * (k + i);
        const float *at = a + row * stride + u;
        x[i] = load_rows(Pair{}, row < K ? at : nullptr, row + 1 < K ? at + stride : nullptr, n);
      }
      // Swaps blocks of 8 x 8 pairs, in each of them blocks of 4 x 4, of 2 x 2, and pairs.
#pragma GCC unroll 4
      for (uint32_t s = n / 2; s; s /= 2) {
        const Vector<Pair> low = (lane & s) ? lane + n - s : lane, high = low + s;
#pragma GCC unroll 16
        for (int64_t i = 0; i < n; ++i) {
          if (i & s) continue;
          const __m512i first = (__m512i)x[i], second = (__m512i)x[i + s];
          x[i] = (Vector<Pair>)_mm512_permutex2var_epi32(first, (__m512i)low, second);
          x[i + s] = (Vector<Pair>)_mm512_permutex2var_epi32(first, (__m512i)high, second);
        }
      }
#pragma GCC unroll 16
      for (int64_t i = 0; i < n; ++i) store(to + (u + i) * ld + k, x[i]);
    }
  return to;
}

// The operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// The rows of this thread's tiles, as configure_tiles received them; 0: the tiles are not configured.
static thread_local uint8_t configured[2] = {};

// Tiles 0, 1 and 4 receive so many rows, tiles 2, 3 and 5 the others. Tiles 6 and 7 are right ones. To
// load a configuration takes longer than a product of 16 rows by 128 units.
INLINE void configure_tiles(uint8_t rows, uint8_t others) {
  if (configured[0] == rows && configured[1] == others) return;
  const TileConfig config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64},
                             {rows, rows, others, others, rows, others, tile_pairs, tile_pairs}};
  asm volatile("" : : "r"(&config) : "memory");  // GCC knows of its first 8 bytes only
  _tile_loadconfig(&config);
  configured[0] = rows, configured[1] = others;
}

// Adds products to the sums of up to 32 rows: of two blocks of up to 16 rows (tiles 0 and 1, 2 and 3), or
// of one, to whose two sums products are added by turns, to hide the instruction's latency. last_a and
// last_b are read in the place of an incomplete last tile.
template <bool two_blocks>
INLINE void add_tiles(int64_t K, const Pair *a, int64_t lda, const Pair *last_a, const Pair *b,
                      int64_t ldb, const Pair *last_b) {
  for (int64_t k = 0; k < K; k += tile_pairs) {
    const bool last = k + tile_pairs > K, odd = k / tile_pairs % 2;
    const Pair *left = last ? last_a : a + k, *right = last ? last_b : b + k * ldb;
    const int64_t left_ld = last ? tile_pairs : lda, right_bytes = 4 * (last ? 2 * tile_pairs : ldb);
    _tile_loadd(6, right, right_bytes);
    _tile_loadd(7, right + tile_pairs, right_bytes);
    if (two_blocks || !odd) {
      _tile_loadd(4, left, 4 * left_ld);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (two_blocks || odd) {
      _tile_loadd(5, left + (two_blocks ? tile_rows * left_ld : 0), 4 * left_ld);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// C[M, 2 vectors] = From + A[M, K] B[K, 2 vectors] for any M and K.
FN void tile_product(int64_t M, int64_t K, const Pair *a, int64_t lda, const Pair *b, int64_t ldb,
                     const float *from, int64_t ld_from, float *c, int64_t ldc) {
  constexpr int64_t n = tile_pairs;
  const int64_t whole = K / n * n, rest = K - whole;
  alignas(64) Pair last_a[2 * tile_rows * n], last_b[n * 2 * n];
  alignas(64) float others[2][tile_rows * n];
  for (int64_t k = 0; rest && k < n; ++k)
    for (int64_t j = 0; j < 2 * n; j += n)
      store(last_b + 2 * k * n + j, k < rest ? load(b + (whole + k) * ldb + j) : Vector<Pair>{});
  for (int64_t i = 0; i < M; i += 2 * tile_rows) {
    const int64_t rows = M - i < 2 * tile_rows ? M - i : 2 * tile_rows;
    const bool two_blocks = rows > tile_rows;
    for (int64_t j = 0; rest && j < rows; ++j)
      _mm512_store_si512(last_a + j * n, _mm512_maskz_loadu_epi32(
                                             (1 << rest) - 1, a + (i + j) * lda + whole));
    configure_tiles(two_blocks ? tile_rows : rows, two_blocks ? rows - tile_rows : rows);
    MEMORY_BARRIER;
    const float *begin = from + i * ld_from;
    float *end = c + i * ldc;
    _tile_loadd(0, begin, 4 * ld_from);
    _tile_loadd(1, begin + n, 4 * ld_from);
    if (two_blocks) {
      _tile_loadd(2, begin + tile_rows * ld_from, 4 * ld_from);
      _tile_loadd(3, begin + tile_rows * ld_from + n, 4 * ld_from);
      add_tiles<true>(K, a + i * lda, lda, last_a, b, ldb, last_b);
      _tile_stored(2, end + tile_rows * ldc, 4 * ldc);
      _tile_stored(3, end + tile_rows * ldc + n, 4 * ldc);
    } else {
      _tile_zero(2);
      _tile_zero(3);
      add_tiles<false>(K, a + i * lda, lda, last_a, b, ldb, last_b);
      _tile_stored(2, others[0], 4 * n);
      _tile_stored(3, others[1], 4 * n);
    }
    _tile_stored(0, end, 4 * ldc);
    _tile_stored(1, end + n, 4 * ldc);
    for (int64_t j = 0; !two_blocks && j < rows; ++j)
      for (int half = 0; half < 2; ++half) {
        float *sum = end + j * ldc + half * n;
        store(sum, load(sum) + load(others[half] + j * n));
      }
  }
}

#undef MEMORY_BARRIER
#endif

// Called after each work item of a thread. The configuration of the tiles belongs to the thread, and
// other libraries load their own between the items: products configure the tiles.
FN void release_tiles() {
#ifdef __AMX_BF16__
  if (configured[0]) _tile_release(), configured[0] = 0;
#endif
}

// The left factor of a sum over the K rows of a matrix: [K, M], or, in tiles, [M, K].
template <class E>
struct SumFactor {
  const E *at;
  int64_t ld;
  METHOD const E *column(int64_t i) const { return at + (tiled<E> ? i * ld : i); }
};

template <class E>
INLINE SumFactor<E> as_sum_factor(int64_t K, int64_t columns, const Number<E> *a, int64_t stride,
                                  Number<E> *memory) {
  if constexpr (!tiled<E>) return {as_sum(E{}, K, columns, a, stride, memory), stride};
  else return {transposed_pairs(K, columns, a, stride, (E *)memory), chunk_rows / 2};
}

}  // namespace INSTRUCTION_SET
