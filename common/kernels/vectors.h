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

}  // namespace INSTRUCTION_SET
