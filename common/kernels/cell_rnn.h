// The tanh RNN, a GRU without gates: h <- tanh(x W' + b + h U' + c).
#pragma once

#include "cell.h"

namespace INSTRUCTION_SET {

struct Rnn {
  static constexpr CellShape shape = {1, 2, 1, {1}, {false}, -1, {0}, {1}};

  template <int phase, class T>
  INLINE void forward(const ForwardUnits<T> &units, const Vector<T> (&sums)[2]) {
    const Vector<T> state = tanh<T>(sums[0]);
    units.set_state(state);
    units.save(1, state);
  }

  template <class T>
  INLINE void backward(const BackwardUnits<T> &units, Vector<T> d) {
    const Vector<T> state = units.saved(1);
    units.set_d_gate(0, d * (T(1) - state * state));
    units.set_d_state(Vector<T>{});
  }
};

}  // namespace INSTRUCTION_SET
