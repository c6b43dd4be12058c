// Vectors of numbers, their functions that cells use, and the rounding to bfloat16. This file and
// those that include it are compiled once for each instruction set (instruction_set.cpp): the
// compiler's flags select the instructions, and INSTRUCTION_SET names the namespace, so that no two
// sets define the same symbol. For the same reason, nothing here calls a function of std.
#pragma once

#include <stdint.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "call.h"

#ifndef INSTRUCTION_SET
#define INSTRUCTION_SET baseline
#endif

// The width of a register. Vectors are those of the compiler (extensions of GCC and Clang).
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define FN static
#define METHOD inline __attribute__((always_inline))
#define INLINE static METHOD

namespace INSTRUCTION_SET {

using namespace gru;

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

#ifdef __AVX512F__
INLINE __mmask16 first_lanes(int64_t n) { return n < 16 ? n > 0 ? (1 << n) - 1 : 0 : 0xffff; }

INLINE Vector<float> load(const float *p, int64_t n) {
  return (Vector<float>)_mm512_maskz_loadu_ps(first_lanes(n), p);
}

INLINE void store(float *p, Vector<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
#endif

// a / b for finite a and b >= 1. Intel's processors take 16 cycles for each division of 16 floats.
template <class T>
INLINE Vector<T> quotient(Vector<T> a, Vector<T> b) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>) {
    // An estimate of 14 bits and a step of Newton's method, which would make a NaN of an infinite b.
    const __m512 estimate = _mm512_rcp14_ps((__m512)b), q = _mm512_mul_ps((__m512)a, estimate);
    const __m512 error = _mm512_fnmadd_ps((__m512)b, q, (__m512)a), infinite = _mm512_set1_ps(1 / 0.f);
    const __mmask16 is_finite = _mm512_cmp_ps_mask((__m512)b, infinite, _CMP_NEQ_UQ);
    return (Vector<T>)_mm512_maskz_fmadd_ps(is_finite, error, estimate, q);
  }
#endif
  return a / b;
}

constexpr double inverse_factorial(int k) { return k < 2 ? 1. : inverse_factorial(k - 1) / k; }

// e^x = scale * (1 + m), where scale = 2^k and m = e^(x - k ln 2) - 1 by its Taylor series, which
// keeps the precision of m near 0. A NaN results in a NaN in m.
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
INLINE Vector<T> clamp(Vector<T> x, T low, T high) {  // a NaN stays a NaN
  const Vector<T> lows = Vector<T>{} + low, highs = Vector<T>{} + high;
  x = lows > x ? lows : x;
  return highs < x ? highs : x;
}

template <class T>
INLINE Vector<T> sigmoid(Vector<T> x) {  // e^89 is infinite: sigmoid(-inf) = 0
  Vector<T> scale, m;
  exponential<T>(clamp<T>(-x, Simd<T>::exp_low, Simd<T>::exp_high), scale, m);
  return quotient<T>(Vector<T>{} + T(1), T(1) + scale * (T(1) + m));
}

template <class T>
INLINE Vector<T> tanh(Vector<T> x) {  // from e^2x - 1, precise near 0
  Vector<T> scale, m;
  exponential<T>(T(2) * clamp<T>(x, -Simd<T>::tanh_high, Simd<T>::tanh_high), scale, m);
  const Vector<T> e = scale * m + (scale - T(1));
  return quotient<T>(e, e + T(2));
}

// The bits of a float, or a vector of them, rounded to bfloat16, the upper half: to nearest, ties
// to even.
template <class Bits>
INLINE Bits rounded(Bits bits) {
  const auto is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
}

// Two vectors, rounded, as pairs.
INLINE Vector<Pair> as_pairs(Vector<float> low, Vector<float> high) {
#ifdef __AVX512BF16__
  const Vector<Pair> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i order = (__m512i)(lane | (lane + 16) << 16);
  return (Vector<Pair>)_mm512_permutexvar_epi16(
      order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  return rounded((Vector<Pair>)low) >> 16 | (rounded((Vector<Pair>)high) & 0xffff0000);
#endif
}

// One vector, rounded, in half as many bytes.
INLINE Simd<Pair>::Half halved(Vector<float> v) {
#ifdef __AVX512BF16__
  return (Simd<Pair>::Half)_mm512_cvtneps_pbh((__m512)v);
#else
  return __builtin_convertvector(rounded((Vector<Pair>)v) >> 16, Simd<Pair>::Half);
#endif
}

}  // namespace INSTRUCTION_SET
