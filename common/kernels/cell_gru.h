// The GRU, with the reset gate before or after the product with U_n: see gru.h.
#pragma once

#include "cell.h"

namespace INSTRUCTION_SET {

template <bool reset_after>
struct Gru {
  enum { z, r, n };                          // gates
  enum { saved_z = 1, saved_r, saved_n, saved_q };
  static constexpr CellShape shape = {
      3, reset_after ? 5 : 4, 2, {2, 1}, {false, !reset_after}, reset_after ? n : -1,
      {r, z, n}, {-1, 1, 1}};

  template <int phase, class T>
  INLINE void forward(const ForwardUnits<T> &units, const Vector<T> (&sums)[2]) {
    const Vector<T> state = units.state();
    if constexpr (phase == 0) {
      const Vector<T> update = sigmoid<T>(sums[0]), reset = sigmoid<T>(sums[1]);
      units.keep(0, update);
      units.keep(1, reset);
      if constexpr (!reset_after) units.set_operand(reset * state);
      units.save(saved_z, update);
      units.save(saved_r, reset);
    } else {
      const Vector<T> q = sums[0];  // with the reset after the product: h U_n' + c_n
      const Vector<T> candidate = tanh<T>(reset_after ? units.input(n) + units.kept(1) * q : q);
      units.set_state(state + units.kept(0) * (candidate - state));
      units.save(saved_n, candidate);
      if constexpr (reset_after) units.save(saved_q, q);
    }
  }

  template <class T>
  INLINE void backward(const BackwardUnits<T> &units, Vector<T> d) {
    const Vector<T> update = units.saved(saved_z), reset = units.saved(saved_r);
    const Vector<T> candidate = units.saved(saved_n), state = units.state();
    const Vector<T> through = d * update, d_candidate = through * (T(1) - candidate * candidate);
    units.set_d_state(d * (T(1) - update));
    units.set_d_gate(z, through * (T(1) - update) * (candidate - state));
    if constexpr (reset_after) {
      units.set_d_input(d_candidate);
      units.set_d_gate(r, d_candidate * units.saved(saved_q) * reset * (T(1) - reset));
      units.set_d_gate(n, d_candidate * reset);
    } else {
      units.set_d_gate(n, d_candidate);
      units.set_operand(reset * state);
    }
  }

  template <class T>
  INLINE void backward_operand(const BackwardUnits<T> &units, Vector<T> d) {
    const Vector<T> reset = units.saved(saved_r);
    units.set_d_gate(r, d * units.operand() * (T(1) - reset));
    units.set_d_state(units.d_state() + d * reset);
  }
};

}  // namespace INSTRUCTION_SET
