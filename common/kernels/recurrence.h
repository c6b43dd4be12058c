// The recurrence, forward and backward: included by instruction_set.h.

// The recurrent weights as the products read them, in panels of two vectors. Forward: of h, panels
// [H, z of V units | r of V units]; of h or r * h, panels [H, n of 2V units]. Backward: of the
// gradients of n, panels [H, 2V units]; of those of z and r, the same, by turns. H is in elements.
template <class E>
FN void pack_weights(const Call &call, int direction, bool backward) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const int64_t H = call.problem->hidden;
  const T *weights = (const T *)call.directions[direction].weight_hh;
  E *at = (E *)call.packed[direction];
  if (backward) {
    for (int64_t panel = 0; panel < 3 * call.weight_stride / (2 * V); ++panel) {
      const int64_t panels = call.weight_stride / (2 * V), i = panel - panels;
      const int64_t gate = i < 0 ? 2 : i % 2, u = (i < 0 ? panel : i / 2) * 2 * V;
      for (int64_t k = 0; k < H; k += numbers<E>, at += 2 * V) {
        const T *row = weights + (gate * H + k) * H + u;
        store_rows(at, row, k + 1 < H ? row + H : nullptr, H - u);
      }
    }
    return;
  }
  const int64_t panel_size = depth<E>(H) * 2 * V;
  for (int64_t u = 0; u < H; u += V, at += panel_size)
    for (int64_t gate = 0; gate < 2; ++gate)
      transpose<E>(H - u, H, weights + (call.rows_of(gate) + u) * H, call.sign_of(gate),
                   at + gate * V);
  for (int64_t u = 0; u < H; u += 2 * V, at += panel_size)
    for (int64_t j = 0; j < 2 * V; j += V)
      transpose<E>(H - u - j, H, weights + (2 * H + u + j) * H, 1, at + j);
}

// Memory that the next step will need, and that is in no cache near by.
template <class T>
INLINE void prefetch(const T *p, int64_t count) {
  for (int64_t i = 0; i < count; i += Simd<T>::width) __builtin_prefetch(p + i, 0, 2);
}

template <class T>
INLINE T *projections_of(const Call &call, int direction, int64_t t, int64_t b) {
  const gru_problem &p = *call.problem;
  const int64_t at = t * p.batch + b, row = p.tokens ? p.tokens[at] : at;
  const int64_t place = call.place ? call.place[row] : row;
  return (T *)call.projections[direction] + place * call.gates_stride;
}

// A turn of a step: its gates or its candidates, or both, of some units of an item's rows. `shared`
// is the item's, at which several threads may be, `own` this thread's.
template <class E>
FN void forward(const Call &call, const Item &item, const Scratch<Number<E>> &shared,
                const Scratch<Number<E>> &own, const Turn &turn) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const gru_problem &p = *call.problem;
  const gru_direction &d = call.directions[item.direction];
  const int64_t H = p.hidden, Hv = call.gate_stride, stride = call.state_stride;
  const int64_t record = (p.reset_after ? 5 : 4) * H, end = turn.to < H ? turn.to : H;
  const int64_t K = depth<E>(H), panel_size = K * 2 * V;
  const T *bias = (const T *)d.bias_hh, *h = shared.state(turn.step);
  T *after = shared.state(turn.step + 1), *z = shared.z, *r = shared.r, *sums = own.tile;

  const int64_t t = d.reverse ? p.steps - 1 - turn.step : turn.step, rows = item.active[t];
  if (turn.gates)
    for (int64_t i = rows; i < item.rows; ++i)
      for (int64_t u = turn.from; u < end; ++u) {
        after[i * stride + u] = h[i * stride + u];
        if (d.outputs)
          ((T *)d.outputs)[(t * p.batch + item.row[i]) * d.ld_outputs + u] = T(0);
      }
  if (!rows) return;
  const int64_t ahead = turn.step + 1 == p.steps ? 0 : d.reverse ? -1 : 1;
  T *saved = d.saved ? (T *)d.saved + (item.first * p.steps + t * item.rows) * record : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    own.source[i] = projections_of<T>(call, item.direction, t, item.row[i]);
    own.next[i] = projections_of<T>(call, item.direction, t + ahead, item.row[i]);
  }

  const E *packed = (const E *)call.packed[item.direction];
  if (turn.gates) {
    const E *factor = as_left(E{}, rows, H, h, stride, own.factor);
    for (int64_t u = turn.from; u < end; u += V) {
      const int64_t n = H - u;
      for (int64_t i = 0; i < rows; ++i) {
        store(sums + i * 2 * V, load(own.source[i] + u));
        store(sums + i * 2 * V + V, load(own.source[i] + Hv + u));
      }
      product<E>(rows, K, factor, stride, packed + u / V * panel_size, 2 * V, sums, 2 * V);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = i * stride + u;
        const Vector<T> state = load(h + at), update = sigmoid<T>(load(sums + i * 2 * V));
        const Vector<T> reset = sigmoid<T>(load(sums + i * 2 * V + V));
        store(z + at, update);
        store(r + at, reset);
        if (!p.reset_after) store(shared.operand + at, reset * state);
        if (saved) {
          T *s = saved + i * record + u;
          store(s, update, n);
          store(s + H, reset, n);
          store(s + 3 * H, state, n);
        }
        for (int gate = 0; gate < 3; ++gate) prefetch(own.next[i] + gate * Hv + u, V);
        if (saved) prefetch(saved + (ahead * item.rows + i) * record + 4 * u, 4 * V);
      }
    }
  }
  if (!turn.candidates) return;

  packed += Hv / V * panel_size;
  const E *factor = as_left(E{}, rows, H, p.reset_after ? h : shared.operand, stride, own.factor);
  for (int64_t u0 = turn.from; u0 < end; u0 += 2 * V) {
    const Vector<T> bias0 = load(bias + 2 * H + u0, H - u0);
    const Vector<T> bias1 = load(bias + 2 * H + u0 + V, H - u0 - V);
    for (int64_t i = 0; i < rows; ++i) {
      const T *a = own.source[i] + 2 * Hv + u0;
      store(sums + i * 2 * V, p.reset_after ? bias0 : load(a));
      store(sums + i * 2 * V + V, p.reset_after ? bias1 : load(a + V));
    }
    product<E>(rows, K, factor, stride, packed + u0 / (2 * V) * panel_size, 2 * V, sums, 2 * V);
    for (int64_t u = u0; u < u0 + 2 * V && u < H; u += V) {
      const int64_t n = H - u;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = i * stride + u;
        const T *a = own.source[i] + 2 * Hv + u;
        const Vector<T> q = load(sums + i * 2 * V + u - u0), state = load(h + at);
        const Vector<T> candidate = tanh<T>(p.reset_after ? load(a) + load(r + at) * q : q);
        const Vector<T> next = state + load(z + at) * (candidate - state);
        store(after + at, next);
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
  for (int64_t i = 0; p.resets && ahead && i < rows; ++i)
    if (resets_at(p, d, item, t + ahead, i))
      for (int64_t u = turn.from; u < end; ++u)
        after[i * stride + u] = reset_state<T>(d, item.row[i] * H + u);
}

// The weights' gradient over the rows gathered since the last time, which are lost: one large
// product.
template <class E>
FN void flush(const Call &call, const Item &item, const Scratch<Number<E>> &scratch, int64_t rows) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const int64_t H = call.problem->hidden, Hv = call.gate_stride;
  const int64_t stride = call.state_stride, gates = call.gates_stride, ld = call.weight_stride;
  T *g = scratch.gates, *d_weights = (T *)item.d_weights, *d_bias = (T *)item.d_bias;
  for (int64_t u = 0; u < 3 * Hv; u += V) {
    Vector<T> sum = load(d_bias + u);
    for (int64_t i = 0; i < rows; ++i) sum += load(g + i * gates + u);
    store(d_bias + u, sum);
  }
  const int64_t K = depth<E>(rows);
  const E *factor = as_sum(E{}, rows, 3 * Hv, g, gates, g);
  const E *states = as_sum(E{}, rows, ld, scratch.states, stride, scratch.states);
  const E *operands = states;
  if (!call.problem->reset_after)
    operands = as_sum(E{}, rows, ld, scratch.operands, stride, scratch.operands);
  // Of so few columns of the factor that they stay in the nearest cache.
  constexpr int64_t block = 4 * TILE_ROWS;
  for (int gate = 0; gate < 3; ++gate)
    for (int64_t row = 0; row < H; row += block)
      for (int64_t u = 0; u < H; u += 2 * V)
        product<E, true>(H - row < block ? H - row : block, K, factor + gate * Hv + row, gates,
                         (gate < 2 ? states : operands) + u, stride,
                         d_weights + (gate * Hv + row) * ld + u, ld);
}

// An item's share of the gradient of a token's projections.
template <class T>
INLINE T *d_projections_of(const Call &call, const Item &item, int64_t token) {
  return (T *)item.d_projections + item.slot[token] * 3 * call.gate_stride;
}

template <class E>
FN void backward(const Call &call, const Item &item, const Scratch<Number<E>> &scratch) {
  using T = Number<E>;
  constexpr int64_t V = Simd<E>::width;
  const gru_problem &p = *call.problem;
  const gru_direction &d = call.directions[item.direction];
  const int64_t H = p.hidden, Hv = call.gate_stride, record = (p.reset_after ? 5 : 4) * H;
  const int64_t stride = call.state_stride, gates = call.gates_stride;
  const int64_t K = depth<E>(H), panel_size = K * 2 * V;
  const T zeros[2 * V] = {};
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
    if (!rows) continue;
    if (gathered + rows > call.chunk) {
      flush<E>(call, item, scratch, gathered);
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
        // Units beyond H have no part: they may hold the product of an infinite gradient with 0.
        Vector<T> grad = load(dh + at, n);
        if (d_output) grad += load(d_output + u, n);
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

    const E *weights = (const E *)call.packed[item.direction];
    const E *factor = as_left(E{}, rows, H, g + 2 * Hv, gates, scratch.factor);
    for (int64_t u0 = 0; u0 < H; u0 += 2 * V, weights += panel_size) {
      if (p.reset_after) {
        product<E>(rows, K, factor, gates, weights, 2 * V, dh + u0, stride);
        continue;
      }
      product<E>(rows, K, factor, gates, weights, 2 * V, zeros, 0, sums, 2 * V);
      for (int64_t u = u0; u < u0 + 2 * V && u < H; u += V)
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = i * stride + u;
          const Vector<T> d_operand = load(sums + i * 2 * V + u - u0, H - u);
          const Vector<T> r = load(saved + i * record + H + u, H - u);
          store(g + i * gates + Hv + u, d_operand * load(operands + at) * (T(1) - r));
          store(dh + at, load(dh + at) + d_operand * r);
        }
    }
    factor = as_left(E{}, rows, 2 * Hv, g, gates, scratch.factor);
    for (int64_t u = 0; u < H; u += 2 * V)
      for (int gate = 0; gate < 2; ++gate, weights += panel_size)
        product<E>(rows, K, factor + gate * depth<E>(Hv), gates, weights, 2 * V, dh + u, stride);

    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = t * p.batch + item.row[i];
      for (int gate = 0; gate < 3; ++gate) {
        const T *from = gate < 2 ? g + i * gates + gate * Hv : dn + i * dn_stride;
        if (p.tokens) {
          T *to = d_projections_of<T>(call, item, p.tokens[at]) + gate * Hv;
          for (int64_t u = 0; u < H; u += V) store(to + u, load(to + u) + load(from + u));
        } else {
          T *to = projections_of<T>(call, item.direction, t, item.row[i]) + gate * Hv;
          for (int64_t u = 0; u < H; u += V) store(to + u, load(from + u));
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
  flush<E>(call, item, scratch, gathered);
  for (int64_t i = 0; i < item.rows; ++i)
    for (int64_t u = 0; u < H; u += V)
      store((T *)d.d_h0 + item.row[i] * H + u, load(dh + i * stride + u), H - u);
}

// Adds up what a direction's items have gathered, in the items' order: rows [from, to) of the
// weights' gradient, or live rows of the projections'.
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
  const Item *items = call.items + direction * call.blocks;
  for (int64_t row = from; row < to; ++row) {
    const int64_t token = call.row(row);
    T *sums = (T *)call.projections[direction] + row * call.gates_stride;
    for (int64_t u = 0; u < 3 * call.gate_stride; u += V) {
      Vector<T> sum = {};
      for (int64_t i = 0; i < call.blocks; ++i)
        if (items[i].slot[token] >= 0)
          sum += load(d_projections_of<T>(call, items[i], token) + u);
      store(sums + u, sum);
    }
  }
}
