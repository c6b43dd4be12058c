// Vectors, what is computed of them, and products of matrices: included by instruction_set.h.

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int width = VECTOR_BYTES / 4, mantissa = 23, bias = 127, degree = 7;
  static constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float exp_low = -87.f, exp_high = 89.f, tanh_high = 10.f;
};

template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int width = VECTOR_BYTES / 8, mantissa = 52, bias = 1023, degree = 13;
  static constexpr double round = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-1,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double exp_low = -708., exp_high = 710., tanh_high = 20.;
};

template <>
struct Simd<Pair> {
  typedef uint32_t Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint16_t UnalignedHalf
      __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
  static constexpr int width = VECTOR_BYTES / 4;
};

template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
INLINE Vector<T> load(const T *p) {
  return *(const typename Simd<T>::Unaligned *)p;
}

template <class T>
INLINE void store(T *p, Vector<T> v) {
  *(typename Simd<T>::Unaligned *)p = v;
}

// The first n elements; the others read as 0 and are not written.
template <class T>
INLINE Vector<T> load(const T *p, int64_t n) {
  if (n >= Simd<T>::width) return load(p);
  Vector<T> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

template <class T>
INLINE void store(T *p, Vector<T> v, int64_t n) {
  if (n >= Simd<T>::width) return store(p, v);
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

constexpr double inverse_factorial(int k) { return k < 2 ? 1. : inverse_factorial(k - 1) / k; }

// e^x = scale * (1 + m), where scale = 2^k and m = e^(x - k ln 2) - 1 by its Taylor series, which
// keeps m's own precision near 0. A NaN comes out as a NaN in m.
template <class T>
INLINE void exponential(Vector<T> x, Vector<T> &scale, Vector<T> &m) {
  using S = Simd<T>;
  const Vector<T> shifted = x * T(1.4426950408889634) + S::round, k = shifted - S::round;
  const Vector<T> rest = (x - k * S::ln2_high) - k * S::ln2_low;
  Vector<T> sum = Vector<T>{} + T(inverse_factorial(S::degree));
#pragma GCC unroll 16
  for (int i = S::degree - 1; i >= 1; --i) sum = sum * rest + T(inverse_factorial(i));
  m = sum * rest;
  // k is in the low bits of shifted: move it to where the exponent is.
  using Bits = typename S::Bits;
  scale = (Vector<T>)(((Bits)shifted << S::mantissa) + ((Bits{} + S::bias) << S::mantissa));
}

template <class T>
INLINE Vector<T> clamp(Vector<T> x, T low, T high) {  // leaves a NaN as it is
  const Vector<T> lows = Vector<T>{} + low, highs = Vector<T>{} + high;
  x = lows > x ? lows : x;
  return highs < x ? highs : x;
}

template <class T>
INLINE Vector<T> sigmoid(Vector<T> x) {  // e^89 is infinite: sigmoid(-inf) = 0
  Vector<T> scale, m;
  exponential<T>(clamp<T>(-x, Simd<T>::exp_low, Simd<T>::exp_high), scale, m);
  return T(1) / (T(1) + scale * (T(1) + m));
}

template <class T>
INLINE Vector<T> tanh(Vector<T> x) {  // from e^2x - 1, precise near 0
  Vector<T> scale, m;
  exponential<T>(T(2) * clamp<T>(x, -Simd<T>::tanh_high, Simd<T>::tanh_high), scale, m);
  const Vector<T> e = scale * m + (scale - T(1));
  return e / (e + T(2));
}

// The bits of a float, or a vector of them, rounded to bfloat16, the upper half: to nearest, ties
// to even.
template <class Bits>
INLINE Bits rounded(Bits bits) {
  const auto is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
}

INLINE Vector<Pair> rounded(Vector<float> v) { return rounded((Vector<Pair>)v); }

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
#ifdef BFLOAT16_INSTRUCTION
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
// goes to to[k * 2 vectors + j]. Rows that are not there are zeros.
template <class E>
FN void transpose(int64_t rows, int64_t K, const Number<E> *a, int sign, E *to) {
  constexpr int64_t V = Simd<E>::width;
  for (int64_t k = 0; k < depth<E>(K); ++k)
    for (int64_t j = 0; j < V; ++j)
      to[k * 2 * V + j] = j < rows ? sign * element(E{}, a + j * K, k, K) : E{};
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
  uint64_t found = (uint64_t)n;
  for (; i < n; ++i) found = (found ^ at[i]) * 0x9E3779B97F4A7C15u, found ^= found >> 32;
  for (int64_t j = 0; j < chains * width; ++j)
    found = (found ^ hash[j / width][j % width]) * 0x9E3779B97F4A7C15u, found ^= found >> 32;
  return found;
}
