// The vectorised part of gru.cpp, which includes this file once for each instruction set:
// INSTRUCTION_SET names the namespace, TARGET is the function attribute that turns the instructions
// on, VECTOR_BYTES is the width of a register, and TILE_ROWS is such that a tile of that many rows
// by two vectors fits the registers. All functions carry TARGET: compilers lower vectors function
// by function, before inlining. No lambdas and nothing from std, which would not carry it.

#define FN TARGET static
#define INLINE TARGET static inline __attribute__((always_inline))

namespace INSTRUCTION_SET {

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

// C[M, 2 vectors] += A[M, K] B[K, 2 vectors], all of C in registers. A is stored [K, M] if
// Transposed.
template <class T, int M, bool Transposed>
FN void tile(int64_t K, const T *a, int64_t lda, const T *b, int64_t ldb, T *c, int64_t ldc) {
  constexpr int width = Simd<T>::width;
  // Too few sums to hide an addition's latency: split each.
  constexpr int chains = M < 4 ? 4 / M : 1;
  Vector<T> sum[chains][M][2] = {};
  if constexpr (Transposed)  // the weights' gradient, too large for the nearest cache
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      __builtin_prefetch(c + i * ldc, 1);
      __builtin_prefetch(c + i * ldc + width, 1);
    }
  int64_t k = 0;
  for (; k + chains <= K; k += chains)
#pragma GCC unroll 4
    for (int s = 0; s < chains; ++s) {
      const Vector<T> b0 = load(b + (k + s) * ldb), b1 = load(b + (k + s) * ldb + width);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const T x = Transposed ? a[(k + s) * lda + i] : a[i * lda + k + s];
        sum[s][i][0] += x * b0;
        sum[s][i][1] += x * b1;
      }
    }
  for (; k < K; ++k)  // only with several chains
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const T x = Transposed ? a[k * lda + i] : a[i * lda + k];
      sum[0][i][0] += x * load(b + k * ldb);
      sum[0][i][1] += x * load(b + k * ldb + width);
    }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      Vector<T> total = sum[0][i][j];
      for (int s = 1; s < chains; ++s) total += sum[s][i][j];
      store(c + i * ldc + j * width, load(c + i * ldc + j * width) + total);
    }
}

template <class T, int M, bool Transposed>
INLINE void tile_of(int64_t rows, int64_t K, const T *a, int64_t lda, const T *b, int64_t ldb, T *c,
                    int64_t ldc) {
  if constexpr (M > 0) {
    if (rows == M) return tile<T, M, Transposed>(K, a, lda, b, ldb, c, ldc);
    tile_of<T, M - 1, Transposed>(rows, K, a, lda, b, ldb, c, ldc);
  }
}

// C[M, 2 vectors] += A[M, K] B[K, 2 vectors] for any M, dealt evenly into tiles.
template <class T, bool Transposed = false>
FN void product(int64_t M, int64_t K, const T *a, int64_t lda, const T *b, int64_t ldb, T *c,
                int64_t ldc) {
  const int64_t tiles = (M + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t from = M * i / tiles, to = M * (i + 1) / tiles;
    tile_of<T, TILE_ROWS, Transposed>(to - from, K, a + from * (Transposed ? 1 : lda), lda, b, ldb,
                                      c + from * ldc, ldc);
  }
}

// The recurrent weights as the products read them, in panels of two vectors. Forward: of h, panels
// [H, z of V units | r of V units]; of h or r * h, panels [H, n of 2V units]. Backward: of the
// gradients of n, panels [H, 2V units]; of those of z and r, the same, by turns.
template <class T>
FN void pack(const Call &call, int direction, bool backward) {
  constexpr int64_t V = Simd<T>::width;
  const int64_t H = call.problem->hidden;
  const T *weights = (const T *)call.directions[direction].weight_hh;
  T *at = (T *)call.packed[direction];
  if (backward) {
    for (int64_t panel = 0; panel < 3 * call.weight_stride / (2 * V); ++panel) {
      const int64_t panels = call.weight_stride / (2 * V), i = panel - panels;
      const int64_t gate = i < 0 ? 2 : i % 2, u = (i < 0 ? panel : i / 2) * 2 * V;
      for (int64_t k = 0; k < H; ++k, at += 2 * V)
        for (int64_t j = 0; j < 2 * V; ++j)
          at[j] = u + j < H ? weights[(gate * H + k) * H + u + j] : T(0);
    }
    return;
  }
  for (int64_t u = 0; u < H; u += V, at += H * 2 * V)
    for (int64_t j = 0; j < 2 * V; ++j) {
      const int64_t unit = u + j % V, row = j < V ? unit : H + unit;
      for (int64_t k = 0; k < H; ++k) at[k * 2 * V + j] = unit < H ? weights[row * H + k] : T(0);
    }
  for (int64_t u = 0; u < H; u += 2 * V, at += H * 2 * V)
    for (int64_t j = 0; j < 2 * V; ++j)
      for (int64_t k = 0; k < H; ++k)
        at[k * 2 * V + j] = u + j < H ? weights[(2 * H + u + j) * H + k] : T(0);
}

// Memory that the next step will need, and that is in no cache near by.
template <class T>
INLINE void prefetch(const T *p, int64_t count) {
  for (int64_t i = 0; i < count; i += Simd<T>::width) __builtin_prefetch(p + i, 0, 2);
}

template <class T>
INLINE const T *projections_of(const gru_problem &p, const gru_direction &d, int64_t t, int64_t b) {
  const int64_t at = t * p.batch + b;
  return (const T *)d.projections + (p.tokens ? p.tokens[at] : at) * d.ld_projections;
}

// Whether a direction starts anew before step t in the item's row i, which has that step.
INLINE bool resets_at(const gru_problem &p, const gru_direction &d, const Item &item, int64_t t,
                      int64_t i) {
  const int64_t begin = t + (d.reverse ? 1 : 0);  // backward, it is the step after this that begins
  return begin < p.steps && i < item.active[begin] && p.resets[begin * p.batch + item.row[i]];
}

// One item: some rows of the batch through all their steps in one direction.
template <class T>
FN void forward(const Call &call, const Item &item, const Scratch<T> &scratch) {
  constexpr int64_t V = Simd<T>::width;
  const gru_problem &p = *call.problem;
  const gru_direction &d = call.directions[item.direction];
  const int64_t H = p.hidden, stride = call.state_stride, record = (p.reset_after ? 5 : 4) * H;
  const T *bias = (const T *)d.bias_hh;
  T *h = scratch.h, *z = scratch.z, *r = scratch.r, *operand = scratch.operand,
    *sums = scratch.tile;

  for (int64_t i = 0; i < item.rows; ++i)
    for (int64_t u = 0; u < stride; ++u)
      h[i * stride + u] = u < H && d.h0 ? ((const T *)d.h0)[item.row[i] * H + u] : T(0);

  for (int64_t step = 0; step < p.steps; ++step) {
    const int64_t t = d.reverse ? p.steps - 1 - step : step, rows = item.active[t];
    if (d.outputs)
      for (int64_t i = rows; i < item.rows; ++i) {
        T *output = (T *)d.outputs + (t * p.batch + item.row[i]) * d.ld_outputs;
        for (int64_t u = 0; u < H; ++u) output[u] = T(0);
      }
    if (!rows) continue;
    const int64_t ahead = step + 1 == p.steps ? 0 : d.reverse ? -1 : 1;
    T *saved = d.saved ? (T *)d.saved + (item.first * p.steps + t * item.rows) * record : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      scratch.source[i] = projections_of<T>(p, d, t, item.row[i]);
      scratch.next[i] = projections_of<T>(p, d, t + ahead, item.row[i]);
      if (p.resets && resets_at(p, d, item, t, i))
        for (int64_t u = 0; u < H; ++u)
          h[i * stride + u] = d.h_reset ? ((const T *)d.h_reset)[item.row[i] * H + u] : T(0);
    }

    const T *weights = (const T *)call.packed[item.direction];
    for (int64_t u = 0; u < H; u += V, weights += H * 2 * V) {
      const int64_t n = H - u;
      const Vector<T> bias_z = load(bias + u, n), bias_r = load(bias + H + u, n);
      for (int64_t i = 0; i < rows; ++i) {
        store(sums + i * 2 * V, bias_z);
        store(sums + i * 2 * V + V, bias_r);
      }
      product<T>(rows, H, h, stride, weights, 2 * V, sums, 2 * V);
      for (int64_t i = 0; i < rows; ++i) {
        const T *a = scratch.source[i] + u;
        const int64_t at = i * stride + u;
        const Vector<T> state = load(h + at);
        const Vector<T> update = sigmoid<T>(load(a, n) + load(sums + i * 2 * V));
        const Vector<T> reset = sigmoid<T>(load(a + H, n) + load(sums + i * 2 * V + V));
        store(z + at, update);
        store(r + at, reset);
        store(operand + at, p.reset_after ? state : reset * state);
        if (saved) {
          T *s = saved + i * record + u;
          store(s, update, n);
          store(s + H, reset, n);
          store(s + 3 * H, state, n);
        }
        for (int gate = 0; gate < 3; ++gate) prefetch(scratch.next[i] + gate * H + u, V);
        if (saved) prefetch(saved + (ahead * item.rows + i) * record + 4 * u, 4 * V);
      }
    }

    for (int64_t u0 = 0; u0 < H; u0 += 2 * V, weights += H * 2 * V) {
      for (int64_t i = 0; i < rows; ++i) {
        store(sums + i * 2 * V, load(bias + 2 * H + u0, H - u0));
        store(sums + i * 2 * V + V, load(bias + 2 * H + u0 + V, H - u0 - V));
      }
      product<T>(rows, H, operand, stride, weights, 2 * V, sums, 2 * V);
      for (int64_t u = u0; u < u0 + 2 * V && u < H; u += V) {
        const int64_t n = H - u;
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = i * stride + u;
          const Vector<T> a = load(scratch.source[i] + 2 * H + u, n);
          const Vector<T> q = load(sums + i * 2 * V + u - u0), state = load(h + at);
          const Vector<T> candidate = tanh<T>(p.reset_after ? a + load(r + at) * q : a + q);
          const Vector<T> next = state + load(z + at) * (candidate - state);
          store(h + at, next);
          if (d.outputs)
            store((T *)d.outputs + (t * p.batch + item.row[i]) * d.ld_outputs + u, next, n);
          if (saved) {
            T *s = saved + i * record + u;
            store(s + 2 * H, candidate, n);
            if (p.reset_after) store(s + 4 * H, q, n);
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < item.rows; ++i)
    for (int64_t u = 0; u < H; u += V)
      store((T *)d.h_last + item.row[i] * H + u, load(h + i * stride + u), H - u);
}

// The weights' gradient over the rows gathered since the last time: one large product.
template <class T>
FN void flush(const Call &call, const Item &item, const Scratch<T> &scratch, int64_t rows) {
  constexpr int64_t V = Simd<T>::width;
  const int64_t H = call.problem->hidden, Hv = call.gate_stride;
  const int64_t stride = call.state_stride, gates = call.gates_stride, ld = call.weight_stride;
  const T *g = scratch.gates,
          *operands = call.problem->reset_after ? scratch.states : scratch.operands;
  T *d_weights = (T *)item.d_weights, *d_bias = (T *)item.d_bias;
  for (int64_t u = 0; u < H; u += 2 * V) {
    product<T, true>(Hv + H, rows, g, gates, scratch.states + u, stride, d_weights + u, ld);
    product<T, true>(H, rows, g + 2 * Hv, gates, operands + u, stride, d_weights + 2 * Hv * ld + u,
                     ld);
  }
  for (int64_t u = 0; u < 3 * Hv; u += V) {
    Vector<T> sum = load(d_bias + u);
    for (int64_t i = 0; i < rows; ++i) sum += load(g + i * gates + u);
    store(d_bias + u, sum);
  }
}

// An item's share of the gradient of a token's projections.
template <class T>
INLINE T *d_projections_of(const Call &call, const Item &item, int64_t token) {
  return (T *)item.d_projections + item.slot[token] * 3 * call.gate_stride;
}

template <class T>
FN void backward(const Call &call, const Item &item, const Scratch<T> &scratch) {
  constexpr int64_t V = Simd<T>::width;
  const gru_problem &p = *call.problem;
  const gru_direction &d = call.directions[item.direction];
  const int64_t H = p.hidden, Hv = call.gate_stride, record = (p.reset_after ? 5 : 4) * H;
  const int64_t stride = call.state_stride, gates = call.gates_stride;
  T *dh = scratch.h, *sums = scratch.tile;  // dh: the gradient of the state after the step

  for (int64_t i = 0; i < item.rows; ++i)
    for (int64_t u = 0; u < stride; ++u)
      dh[i * stride + u] =
          u < H && d.d_h_last ? ((const T *)d.d_h_last)[item.row[i] * H + u] : T(0);
  for (int64_t i = 0; d.d_h_reset && i < item.rows; ++i)
    for (int64_t u = 0; u < H; ++u) ((T *)d.d_h_reset)[item.row[i] * H + u] = T(0);

  int64_t gathered = 0;
  for (int64_t step = 0; step < p.steps; ++step) {
    const int64_t t = d.reverse ? step : p.steps - 1 - step, rows = item.active[t];
    if (!p.tokens)
      for (int64_t i = rows; i < item.rows; ++i) {
        T *row = (T *)d.d_projections + (t * p.batch + item.row[i]) * d.ld_projections;
        for (int64_t u = 0; u < 3 * H; ++u) row[u] = T(0);
      }
    if (!rows) continue;
    if (gathered + rows > call.chunk) {
      flush<T>(call, item, scratch, gathered);
      gathered = 0;
    }
    // Gradients of the pre-activations: of z, r, and n's product (dq); n itself (dn) differs from
    // dq by the factor r when the reset comes after the product.
    T *g = scratch.gates + gathered * gates, *dn = p.reset_after ? scratch.z : g + 2 * Hv;
    const int64_t dn_stride = p.reset_after ? stride : gates;
    T *states = scratch.states + gathered * stride,
      *operands = scratch.operands + gathered * stride;
    const int64_t ahead = step + 1 == p.steps ? 0 : d.reverse ? 1 : -1;
    const T *saved = (const T *)d.saved + (item.first * p.steps + t * item.rows) * record;

    for (int64_t i = 0; i < rows; ++i) {
      const T *s = saved + i * record;
      const int64_t row = t * p.batch + item.row[i];
      const T *d_output = d.d_outputs ? (const T *)d.d_outputs + row * d.ld_outputs : nullptr;
      prefetch(saved + (ahead * item.rows + i) * record, record);
      if (p.tokens) prefetch(d_projections_of<T>(call, item, p.tokens[row]), 3 * Hv);
      for (int64_t u = 0; u < H; u += V) {
        const int64_t n = H - u, at = i * stride + u, to = i * gates + u;
        const Vector<T> z = load(s + u, n), r = load(s + H + u, n), c = load(s + 2 * H + u, n);
        const Vector<T> state = load(s + 3 * H + u, n);
        const Vector<T> grad = d_output ? load(dh + at) + load(d_output + u, n) : load(dh + at);
        const Vector<T> through = grad * z, d_candidate = through * (T(1) - c * c);
        store(dh + at, grad * (T(1) - z));
        store(g + to, through * (T(1) - z) * (c - state));
        store(dn + i * dn_stride + u, d_candidate);
        store(states + at, state);
        if (p.reset_after) {
          store(g + to + Hv, d_candidate * load(s + 4 * H + u, n) * r * (T(1) - r));
          store(g + to + 2 * Hv, d_candidate * r);
        } else {
          store(operands + at, r * state);
        }
      }
    }

    const T *weights = (const T *)call.packed[item.direction];
    for (int64_t u0 = 0; u0 < H; u0 += 2 * V, weights += H * 2 * V) {
      if (p.reset_after) {
        product<T>(rows, H, g + 2 * Hv, gates, weights, 2 * V, dh + u0, stride);
        continue;
      }
      for (int64_t i = 0; i < rows * 2 * V; i += V) store(sums + i, Vector<T>{});
      product<T>(rows, H, g + 2 * Hv, gates, weights, 2 * V, sums, 2 * V);
      for (int64_t u = u0; u < u0 + 2 * V && u < H; u += V)
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = i * stride + u;
          const Vector<T> d_operand = load(sums + i * 2 * V + u - u0);
          const Vector<T> r = load(saved + i * record + H + u, H - u);
          store(g + i * gates + Hv + u, d_operand * load(operands + at) * (T(1) - r));
          store(dh + at, load(dh + at) + d_operand * r);
        }
    }
    for (int64_t u = 0; u < H; u += 2 * V)
      for (int gate = 0; gate < 2; ++gate, weights += H * 2 * V)
        product<T>(rows, H, g + gate * Hv, gates, weights, 2 * V, dh + u, stride);

    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = t * p.batch + item.row[i];
      for (int gate = 0; gate < 3; ++gate) {
        const T *from = gate < 2 ? g + i * gates + gate * Hv : dn + i * dn_stride;
        if (p.tokens) {
          T *to = d_projections_of<T>(call, item, p.tokens[at]) + gate * Hv;
          for (int64_t u = 0; u < H; u += V) store(to + u, load(to + u) + load(from + u));
        } else {
          T *to = (T *)d.d_projections + at * d.ld_projections + gate * H;
          for (int64_t u = 0; u < H; u += V) store(to + u, load(from + u), H - u);
        }
      }
    }
    for (int64_t i = 0; p.resets && i < rows; ++i)
      if (resets_at(p, d, item, t, i))
        for (int64_t u = 0; u < H; ++u) {
          ((T *)d.d_h_reset)[item.row[i] * H + u] += dh[i * stride + u];
          dh[i * stride + u] = T(0);
        }
    gathered += rows;
  }
  flush<T>(call, item, scratch, gathered);
  for (int64_t i = 0; i < item.rows; ++i)
    for (int64_t u = 0; u < H; u += V)
      store((T *)d.d_h0 + item.row[i] * H + u, load(dh + i * stride + u), H - u);
}

// Adds up what a direction's items have gathered, in the items' order: rows [from, to) of the
// weights' gradient, or of the projections'.
template <class T>
FN void reduce_weights(const Call &call, int direction, int64_t from, int64_t to) {
  constexpr int64_t V = Simd<T>::width;
  const gru_direction &d = call.directions[direction];
  const Item *items = call.items + direction * call.blocks;
  const int64_t H = call.problem->hidden;
  for (int64_t row = from; row < to; ++row) {
    const int64_t padded = row / H * call.gate_stride + row % H;
    for (int64_t u = 0; u < H; u += V) {
      Vector<T> sum = {};
      for (int64_t i = 0; i < call.blocks; ++i)
        sum += load((const T *)items[i].d_weights + padded * call.weight_stride + u);
      store((T *)d.d_weight_hh + row * H + u, sum, H - u);
    }
    T sum = 0;
    for (int64_t i = 0; i < call.blocks; ++i) sum += ((const T *)items[i].d_bias)[padded];
    ((T *)d.d_bias_hh)[row] = sum;
  }
}

template <class T>
FN void reduce_projections(const Call &call, int direction, int64_t from, int64_t to) {
  constexpr int64_t V = Simd<T>::width;
  const gru_direction &d = call.directions[direction];
  const Item *items = call.items + direction * call.blocks;
  const int64_t H = call.problem->hidden, Hv = call.gate_stride;
  for (int64_t token = from; token < to; ++token)
    for (int gate = 0; gate < 3; ++gate)
      for (int64_t u = 0; u < H; u += V) {
        Vector<T> sum = {};
        for (int64_t i = 0; i < call.blocks; ++i)
          if (items[i].slot[token] >= 0)
            sum += load(d_projections_of<T>(call, items[i], token) + gate * Hv + u);
        store((T *)d.d_projections + token * d.ld_projections + gate * H + u, sum, H - u);
      }
}

template <class T>
constexpr Kernels<T> kernels = {Simd<T>::width, pack<T>,           forward<T>,
                                backward<T>,    reduce_weights<T>, reduce_projections<T>};

}  // namespace INSTRUCTION_SET

#undef FN
#undef INLINE
#undef INSTRUCTION_SET
#undef TARGET
#undef VECTOR_BYTES
#undef TILE_ROWS
