// The GRU's recurrence on an NVIDIA GPU, forward and backward. nvrtc.py compiles this file,
// driver.cpp launches it, and tools/gpu runs it on a CPU.
//
// A cluster of C blocks processes 8 rows of the batch through all their steps, with the recurrent
// weights of all H units in its registers. Products are transposed, [units, H] x [H, 8 rows], so
// that the weights are the operand A of mma and are loaded once. A thread holds z, r and n of the
// same units and rows, so the pointwise operations between the products need no other thread. An
// exchange distributes the operand of a product through the shared memory of the block, or of all
// blocks of the cluster. Exchanges alternate between two slots, so that one synchronization per
// exchange suffices: a thread that sends exchange i + 2 has received exchange i + 1, which every
// thread sends after it has read exchange i.
//
// Forward, a step exchanges the state and, with the reset before the product, also r * h. Backward,
// a step exchanges the gradients of the pre-activations and multiplies by the transposed weights.
// The gradients of the weights are products over all steps, which the framework computes.
#include "call.h"
#ifndef EMULATOR
#include "device.h"
#endif

// The dtypes of the factors. `word` packs one number, or two neighbouring ones, into a word of an
// operand; a load reads four words of an operand.
struct Bf16 {
  static constexpr int per_word = 2;
  static constexpr bool exact = false;
  DEVICE static unsigned word(float first, float second) { return bf16_pair(first, second); }
  DEVICE static void product(float *c, const unsigned *a, const unsigned *b) { mma_bf16(c, a, b); }
};

struct Tf32 {
  static constexpr int per_word = 1;
  static constexpr bool exact = false;
  DEVICE static unsigned word(float x, float) { return tf32(x); }
  DEVICE static void product(float *c, const unsigned *a, const unsigned *b) { mma_tf32(c, a, b); }
};

// Splits each factor into two TF32 numbers, which together lose at most two bits. The product of the
// two small numbers is smaller than the last bit.
struct Float32 {
  static constexpr int per_word = 1;
  static constexpr bool exact = true;
  DEVICE static unsigned word(float x, float) { return as_word(x); }
  DEVICE static void product(float *c, const unsigned *a, const unsigned *b) {
    unsigned large_a[4], small_a[4], large_b[2], small_b[2];
    UNROLL for (int i = 0; i < 4; ++i) split(a[i], large_a[i], small_a[i]);
    UNROLL for (int i = 0; i < 2; ++i) split(b[i], large_b[i], small_b[i]);
    float sum[4] = {0, 0, 0, 0};  // a short sum, because mma rounds sums toward zero
    mma_tf32(sum, small_a, large_b);
    mma_tf32(sum, large_a, small_b);
    mma_tf32(sum, large_a, large_b);
    UNROLL for (int i = 0; i < 4; ++i) c[i] += sum[i];
  }
  DEVICE static void split(unsigned word, unsigned &large, unsigned &small) {
    large = tf32_of_number(word);
    small = as_word(as_float(word) - as_float(large));  // mma ignores the lower bits
  }
};

// H = 16 units * G groups * C blocks. The P parts of a group, one warp each, share its products.
template <class Factors, int H, int C, int G, int P, bool ResetAfter, bool Backward>
struct Kernel {
  static_assert(H == 16 * G * C, "units");
  static_assert(P == 1 || P == 2 || P == 4, "a thread has 4 / P elements of a fragment");
  static constexpr int threads = 32 * G * P, rows = 8, own = 4 / P;
  static constexpr int two = own < 2 ? own : 2;  // rows of a thread: elements i and i + 2 share one
  static constexpr int per_word = Factors::per_word, words = H / per_word;  // words of H numbers
  static constexpr int loads = words / P / 16;  // of 16 bytes by each of 4 lanes, for two mma
  static_assert(words % (P * 16) == 0, "parts");
  static constexpr int vectors = Backward ? (ResetAfter ? 3 : 2) : 1;  // in an exchange
  static constexpr int stride = vectors * words + (vectors * words % 32 ? 0 : 16);  // no conflicts
  static constexpr int slot = rows * stride;
  static constexpr int partials = P > 1 ? G * P * (Backward ? 1 : 3) * 4 * 32 : 0;
  // In shared memory if the weights leave no registers for the biases.
  static constexpr int biases = !Backward && words / P >= 128 ? 3 * 16 * G : 0;
  static constexpr int shared_bytes = (2 * slot + partials + biases) * 4 + 2 * 16;
  static constexpr int record = ResetAfter ? 5 : 4;

  unsigned weights[3][2 * loads][4];
  unsigned *slots;
  float *partial, *bias;
  Barrier *barriers;
  int exchange, group, part, lane, u0;
  int row[own], unit[own], length[own], longest;
  bool valid[own];

  // Adds the sums of a group's parts. Each part keeps its own elements of the result.
  template <int N>
  DEVICE void reduce(float (&sum)[N][4]) {
    if (P == 1) return;
    // All indices into `sum` are constants; otherwise the compiler would place it in local memory.
    UNROLL for (int k = 0; k < N; ++k)
      UNROLL for (int e = 0; e < 4; ++e) partial[place<N>(part, k, e)] = sum[k][e];
    sync_some(1 + group, 32 * P);
    UNROLL for (int k = 0; k < N; ++k)
      UNROLL for (int i = 0; i < own; ++i) {
        float mine = 0;
        UNROLL for (int p = 0; p < P; ++p) mine += partial[place<N>(p, k, part * own + i)];
        sum[k][i] = mine;
      }
  }
  template <int N>
  DEVICE int place(int p, int k, int e) const {
    return (((group * P + p) * N + k) * 4 + e) * 32 + lane;
  }

  // An exchange: `begin` with the number of vectors, `send` for each vector, then `receive`.
  DEVICE void begin(int count) {
    if (C > 1 && thread_index() == 0)
      barrier_expect(barriers + (exchange & 1), rows * count * words * 4);
  }
  DEVICE void send(const float (&value)[own], int vector) {
    auto at = [&](int e) {
      return slots + (exchange & 1) * slot + (lane % 4 * 2 + (e & 1)) * stride + vector * words +
             (u0 + lane / 4 + (e & 2) * 4) / per_word;
    };
    const int first = P == 1 ? 0 : part * own;
    if constexpr (per_word == 1) {
      UNROLL for (int i = 0; i < own; ++i) store(at(first + i), Factors::word(value[i], 0));
    } else {
      // Two neighbouring units, in lanes 4 apart, form a word. With two rows, each lane writes one
      // row; with one row, the even lane writes. A branch would duplicate the code of `store`.
      const bool odd = lane / 4 & 1;
      if constexpr (own == 1) {
        // The stores of other lanes allow the next exchange. Lanes that store nothing must have
        // read before, and a shuffle does not order memory accesses.
        sync_warp();
        const float other = shuffle_xor(value[0], 4);
        if (!odd) store(at(first), Factors::word(value[0], other));
      } else {
        UNROLL for (int i = 0; i < own; i += 2) {
          const float mine = odd ? value[i + 1] : value[i];
          const float other = shuffle_xor(odd ? value[i] : value[i + 1], 4);
          store(at(first + i + odd), Factors::word(odd ? other : mine, odd ? mine : other));
        }
      }
    }
  }
  DEVICE void store(unsigned *to, unsigned word) {
    if (C > 1) put<C>(to, word, barriers + (exchange & 1));
    else *to = word;
  }
  DEVICE const unsigned *receive() {
    if (C > 1) barrier_wait(barriers + (exchange & 1), exchange >> 1 & 1);
    else sync_block();
    return slots + (exchange++ & 1) * slot;
  }

  // Computes the thread's elements of W h for the gates First to First + Count - 1. Backward: of the
  // sum over these gates of W' d, with a vector d for each gate.
  template <int First, int Count>
  DEVICE void multiply(float (&sum)[Count][4], const unsigned *from) {
    UNROLL for (int k = 0; k < Count; ++k) UNROLL for (int e = 0; e < 4; ++e) sum[k][e] = 0;
    from += lane / 4 * stride + part * (words / P) + lane % 4 * 4;
    UNROLL for (int i = 0; i < loads; ++i) {
      unsigned b[4];
      UNROLL for (int k = 0; k < Count; ++k) {
        if (Backward || k == 0) load16(b, from + k * words + i * 16);
        UNROLL for (int j = 0; j < 2; ++j)
          Factors::product(sum[k], weights[First + k][2 * i + j], b + 2 * j);
      }
    }
    if (!Backward) return reduce(sum);
    float total[1][4];
    UNROLL for (int e = 0; e < 4; ++e) {
      total[0][e] = sum[0][e];
      UNROLL for (int k = 1; k < Count; ++k) total[0][e] += sum[k][e];
    }
    reduce(total);
    UNROLL for (int e = 0; e < 4; ++e) sum[0][e] = total[0][e];
  }

  // Lane l holds rows l / 4 and l / 4 + 8 of 16 units, and 4 words of the k of a load.
  DEVICE void load_weights(const float *U) {
    auto at = [&](int gate, int u, int k) {
      return U[(gate * H + (Backward ? k : u)) * H + (Backward ? u : k)];
    };
    UNROLL for (int gate = 0; gate < 3; ++gate)
      UNROLL for (int i = 0; i < loads; ++i)
        UNROLL for (int j = 0; j < 2; ++j)
          UNROLL for (int e = 0; e < 4; ++e) {
            const int u = u0 + lane / 4 + (e & 1) * 8;
            const int word = part * (words / P) + i * 16 + lane % 4 * 4 + 2 * j + (e >> 1);
            const int k = word * per_word;
            weights[gate][2 * i + j][e] =
                Factors::word(at(gate, u, k), per_word == 1 ? 0.f : at(gate, u, k + 1));
          }
  }

  DEVICE void run(const Call &a, unsigned *shared) {
    const int warp = thread_index() / 32, clusters = (a.batch + rows - 1) / rows;
    const int direction = block_index() / C / clusters, first = block_index() / C % clusters * rows;
    slots = shared, partial = (float *)(shared + 2 * slot), exchange = 0;
    barriers = (Barrier *)(partial + partials);
    lane = thread_index() % 32, group = warp % G, part = warp / G;
    u0 = ((C > 1 ? cluster_rank() : 0) * G + group) * 16;
    if (C > 1 && thread_index() == 0) barrier_init(barriers), barrier_init(barriers + 1);
    longest = 0;
    ROLLED for (int b = first; b < first + rows && b < a.batch; ++b) {  // the same in all threads
      const int steps = steps_of(a, b);
      longest = steps > longest ? steps : longest;
    }
    UNROLL for (int i = 0; i < own; ++i) {
      const int e = P == 1 ? i : part * own + i, b = first + lane % 4 * 2 + (e & 1);
      unit[i] = u0 + lane / 4 + (e & 2) * 4;
      // An element outside the batch or the units has length 0 and zero weights.
      row[i] = b < a.batch && unit[i] < a.hidden ? b : -1;
      length[i] = row[i] < 0 ? 0 : steps_of(a, b);
      valid[i] = row[i] < 0 || a.lengths[b] == length[i];
    }
    if (biases) {
      bias = partial + partials + 2 * 4;  // behind the barriers
      for (int i = thread_index(); i < biases; i += threads) {
        const int u = (u0 / 16 - group) * 16 + i % (16 * G), gate = i / (16 * G);
        bias[i] = u < a.hidden ? a.bias_hh[(direction * 3 + gate) * a.hidden + u] : 0.f;
      }
    }
    const int states = direction * a.hidden * a.batch;
    load_weights(a.weight_hh + direction * 3 * H * H);
    if (C > 1) sync_cluster();  // its barriers are initialized
    if (Backward) backward(a, direction, states);
    else forward(a, direction, states);
    if (C > 1) sync_cluster();  // a block must not end while others may write to it
  }

  DEVICE static int steps_of(const Call &a, int b) {
    const int l = a.lengths[b];
    return l < 0 || l > a.steps ? a.steps : l;
  }
  static DEVICE float nan() { return as_float(0x7fc00000); }

  // Whether a sequence begins before a direction's step at t >= 0. Returns the flag as it is in
  // memory, because a comparison here would wait for the load.
  DEVICE unsigned begins(const Call &a, int direction, int i, int t) const {
    const int at = t + a.reverse[direction];
    unsigned flag = 0;
    if (a.resets && at < length[i]) flag = a.resets[at * a.batch + row[i]];
    return flag;
  }

  DEVICE void forward(const Call &a, int direction, int states) {
    const unsigned size = a.hidden, width = a.directions * size;
    const float *const projections = a.projections + (size_t)direction * 3 * size * a.distinct;
    float *const outputs = a.outputs ? a.outputs + direction * size : nullptr;
    float *const saved = a.saved ? a.saved + (size_t)direction * record * size * a.batch * a.steps : nullptr;
    auto time = [&](int step) { return a.reverse[direction] ? longest - 1 - step : step; };

    // Loads from global memory are issued one step ahead, loads of tokens two steps ahead, and loads
    // of resets at the beginning of the step that uses them at its end, so that no step waits.
    float next[3][own], h[own];
    int token[two];
    auto look_up = [&](int step) {
      const int t = time(step);
      UNROLL for (int i = 0; i < two; ++i) {
        const int at = t * a.batch + row[i];
        token[i] = at;
        if (step < longest && t < length[i] && a.tokens) token[i] = a.tokens[at];
      }
    };
    float own_bias[3][own];
    auto c = [&](int gate, int i) {
      return biases ? bias[gate * 16 * G + group * 16 + unit[i] - u0] : own_bias[gate][i];
    };
    auto fetch = [&](int i, int step) {  // the projections of the tokens of look_up
      const bool live = step < longest && time(step) < length[i];
      const int at = token[i % two];
      const bool there = at >= 0 && at < a.distinct;
      UNROLL for (int gate = 0; gate < 3; ++gate)
        next[gate][i] = !live   ? 0.f
                        : there ? projections[(at * 3U + gate) * size + unit[i]]
                                : nan();
    };
    look_up(0);
    UNROLL for (int i = 0; i < own; ++i) {
      fetch(i, 0);
      const bool anew = longest > 0 && begins(a, direction, i, time(0));
      UNROLL for (int gate = 0; gate < 3; ++gate)
        own_bias[gate][i] = row[i] < 0 ? 0.f : a.bias_hh[(direction * 3 + gate) * size + unit[i]];
      const float *const from = (anew ? a.h_reset : a.h0) + states;
      h[i] = row[i] < 0 ? 0.f : valid[i] ? from[row[i] * size + unit[i]] : nan();
    }
    look_up(1);
    if (longest > 0) begin(1), send(h, 0);  // without steps, no thread would receive it

    for (int step = 0; step < longest; ++step) {
      const int t = time(step);
      float x[3][own], z[own], r[own], n[own], q[own], before[own], after[own];
      unsigned anew[two];
      UNROLL for (int i = 0; i < own; ++i) {
        UNROLL for (int gate = 0; gate < 3; ++gate) x[gate][i] = next[gate][i];
        fetch(i, step + 1);
      }
      look_up(step + 2);
      UNROLL for (int i = 0; i < two; ++i) {
        anew[i] = 0;
        if (step + 1 < longest) anew[i] = begins(a, direction, i, time(step + 1));
      }
      const unsigned *from = receive();
      if (ResetAfter) {
        float sum[3][4];
        multiply<0>(sum, from);
        UNROLL for (int i = 0; i < own; ++i) {
          z[i] = sigmoid<Factors::exact>(x[0][i] + (sum[0][i] + c(0, i)));
          r[i] = sigmoid<Factors::exact>(x[1][i] + (sum[1][i] + c(1, i)));
          q[i] = sum[2][i] + c(2, i);
          n[i] = tanh_of<Factors::exact>(x[2][i] + r[i] * q[i]);
        }
      } else {
        float sum[2][4], sum_n[1][4], gated[own];
        multiply<0>(sum, from);
        UNROLL for (int i = 0; i < own; ++i) {
          r[i] = sigmoid<Factors::exact>(x[1][i] + (sum[1][i] + c(1, i)));
          gated[i] = r[i] * h[i];
        }
        begin(1), send(gated, 0);
        UNROLL for (int i = 0; i < own; ++i)
          z[i] = sigmoid<Factors::exact>(x[0][i] + (sum[0][i] + c(0, i)));
        from = receive();
        multiply<2>(sum_n, from);
        UNROLL for (int i = 0; i < own; ++i)
          n[i] = tanh_of<Factors::exact>(x[2][i] + (sum_n[0][i] + c(2, i)));
      }
      UNROLL for (int i = 0; i < own; ++i) {
        before[i] = h[i];
        after[i] = t < length[i] ? h[i] + z[i] * (n[i] - h[i]) : h[i];
        h[i] = anew[i % two] && row[i] >= 0 ? a.h_reset[states + row[i] * size + unit[i]] : after[i];
      }
      if (step + 1 < longest) begin(1), send(h, 0);
      // What nobody waits for comes last.
      UNROLL for (int i = 0; i < own; ++i) {
        if (t >= length[i]) continue;
        const unsigned at = t * a.batch + row[i];
        if (outputs) outputs[at * width + unit[i]] = after[i];
        if (saved) {
          float *const to = saved + at * record * size + unit[i];
          to[0] = z[i], to[size] = r[i], to[2 * size] = n[i], to[3 * size] = before[i];
          if (ResetAfter) to[4 * size] = q[i];
        }
      }
    }

    UNROLL for (int i = 0; i < own; ++i) {
      if (row[i] < 0) continue;
      a.h_last[states + row[i] * size + unit[i]] = h[i];
      ROLLED for (int t = length[i]; t < a.steps; ++t) {  // padding
        const unsigned at = t * a.batch + row[i];
        if (outputs) outputs[at * width + unit[i]] = 0;
        if (saved)  // r and the state are factors of products with zero gradients
          saved[(at * record + 1) * size + unit[i]] = saved[(at * record + 3) * size + unit[i]] = 0;
      }
    }
  }

  DEVICE void backward(const Call &a, int direction, int states) {
    const unsigned size = a.hidden, width = a.directions * size;
    const size_t all = (size_t)direction * a.steps * a.batch;
    const float *const saved = a.saved + record * size * all;
    const float *const d_outputs = a.d_outputs ? a.d_outputs + direction * size : nullptr;
    float *const d_a = a.d_a + 3 * size * all;
    float *const d_q = ResetAfter ? a.d_q + size * all : nullptr;
    auto time = [&](int step) { return a.reverse[direction] ? step : longest - 1 - step; };

    // At padding, all gates are 0, so that a step does not change the gradient of the state.
    float next[record + 1][own], d_h[own];
    auto fetch = [&](int step) {
      UNROLL for (int i = 0; i < own; ++i) {
        const int t = time(step);
        const bool live = step < longest && t < length[i];
        const unsigned at = t * a.batch + row[i];
        UNROLL for (int k = 0; k < record; ++k)
          next[k][i] = live ? saved[(at * record + k) * size + unit[i]] : 0.f;
        next[record][i] = live && d_outputs ? d_outputs[at * width + unit[i]] : 0.f;
      }
    };
    fetch(0);
    UNROLL for (int i = 0; i < own; ++i) {
      if (row[i] >= 0 && a.d_h_reset) a.d_h_reset[states + row[i] * size + unit[i]] = 0;
      d_h[i] = row[i] < 0   ? 0.f
               : valid[i] ? a.d_h_last[states + row[i] * size + unit[i]]
                          : nan();
    }

    for (int step = 0; step < longest; ++step) {
      const int t = time(step);
      float z[own], r[own], n[own], before[own], q[own], d_z[own], d_r[own], d_n[own], d_gated[own];
      unsigned anew[two];
      UNROLL for (int i = 0; i < two; ++i) anew[i] = begins(a, direction, i, t);
      UNROLL for (int i = 0; i < own; ++i) {
        z[i] = next[0][i], r[i] = next[1][i], n[i] = next[2][i], before[i] = next[3][i];
        if (ResetAfter) q[i] = next[4][i];
        const float d = d_h[i] + next[record][i];
        d_z[i] = d * (n[i] - before[i]) * z[i] * (1 - z[i]);
        d_n[i] = d * z[i] * (1 - n[i] * n[i]);
        d_h[i] = d * (1 - z[i]);
        if (ResetAfter) {
          d_gated[i] = d_n[i] * r[i];  // of q
          d_r[i] = d_n[i] * q[i] * r[i] * (1 - r[i]);
        }
      }
      auto keep = [&](float *to, unsigned gates, unsigned gate, const float (&value)[own]) {
        UNROLL for (int i = 0; i < own; ++i)
          if (t < length[i])
            to[((t * a.batch + row[i]) * gates + gate) * size + unit[i]] = value[i];
      };
      fetch(step + 1);
      if (ResetAfter) {
        begin(3), send(d_z, 0), send(d_r, 1), send(d_gated, 2);
        keep(d_a, 3, 0, d_z), keep(d_a, 3, 1, d_r), keep(d_a, 3, 2, d_n), keep(d_q, 1, 0, d_gated);
        float sum[3][4];
        multiply<0>(sum, receive());
        UNROLL for (int i = 0; i < own; ++i) d_h[i] += sum[0][i];
      } else {
        begin(1), send(d_n, 0);
        keep(d_a, 3, 2, d_n);
        float sum_n[1][4], sum[2][4];
        multiply<2>(sum_n, receive());
        UNROLL for (int i = 0; i < own; ++i) {  // sum_n: the gradient of r * h
          d_r[i] = sum_n[0][i] * before[i] * r[i] * (1 - r[i]);
          d_h[i] += sum_n[0][i] * r[i];
        }
        begin(2), send(d_z, 0), send(d_r, 1);
        keep(d_a, 3, 0, d_z), keep(d_a, 3, 1, d_r);
        multiply<0>(sum, receive());
        UNROLL for (int i = 0; i < own; ++i) d_h[i] += sum[0][i];
      }
      UNROLL for (int i = 0; i < own; ++i)
        if (anew[i % two] && row[i] >= 0) {
          a.d_h_reset[states + row[i] * size + unit[i]] += d_h[i];
          d_h[i] = 0;
        }
    }

    UNROLL for (int i = 0; i < own; ++i) {
      if (row[i] < 0) continue;
      const int at = states + row[i] * size + unit[i];
      a.d_h0[at] = d_h[i];
      ROLLED for (int t = length[i]; t < a.steps; ++t) {  // padding
        const unsigned at = t * a.batch + row[i];
        UNROLL for (int gate = 0; gate < 3; ++gate) d_a[(at * 3 + gate) * size + unit[i]] = 0;
        if (ResetAfter) d_q[at * size + unit[i]] = 0;
      }
    }
  }
};

#ifndef EMULATOR
using Instance = Kernel<INSTANCE>;
static_assert(Instance::threads == THREADS && Instance::shared_bytes == SHARED, "see cuda.py");
extern "C" __global__ void __launch_bounds__(THREADS, 1) gru(const __grid_constant__ Call a) {
  extern __shared__ __align__(128) unsigned shared[];
  Instance().run(a, shared);
}
#endif
