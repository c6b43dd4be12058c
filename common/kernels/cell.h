// What the functions of a cell read and write: one vector of units of one row at one time step. A
// cell is a type with a CellShape and three functions (cell_gru.h is the example, cells.h the list):
//
//   forward<phase>(units, sums)   follows the product of a phase. sums holds the pre-activations of the
//                                 phase's gates (of a separate gate the recurrent product alone). The
//                                 function keeps values for the next phase, sets the operand that the
//                                 next phase multiplies, saves values for backward, and at the end
//                                 sets the state.
//   backward(units, d)            receives the gradient d of the state after the step. It sets the
//                                 gradients of the pre-activations (of a separate gate also that of
//                                 the input's share), the share of d that reaches the state before
//                                 the step without a product, and, if a phase reads it, the operand.
//   backward_operand(units, d)    receives the gradient d of the operand, where a phase reads it, and
//                                 sets or completes the gradients that depend on it.
//
// recurrence.h does everything else: products, time steps, resets, padding and sums of gradients.
#pragma once

#include "vectors.h"

namespace INSTRUCTION_SET {

template <class T>
struct ForwardUnits {
  const T *inputs, *before;
  T *after, *between[2], *product_operand, *output, *record;  // output, record: or NULL
  int64_t gate_stride, hidden, n;  // n: the number of units from the first of the vector

  METHOD Vector<T> state() const { return load(before); }
  METHOD Vector<T> input(int gate) const { return load(inputs + gate * gate_stride); }
  METHOD Vector<T> kept(int i) const { return load(between[i]); }
  METHOD void keep(int i, Vector<T> v) const { store(between[i], v); }
  METHOD void set_operand(Vector<T> v) const { store(product_operand, v); }
  METHOD void save(int i, Vector<T> v) const {  // number 0 is the state before the step
    if (record) store(record + i * hidden, v, n);
  }
  METHOD void set_state(Vector<T> v) const {
    store(after, v);
    if (output) store(output, v, n);
  }
};

template <class T>
struct BackwardUnits {
  const T *record;
  T *gates, *inputs, *before, *product_operand;
  int64_t gate_stride, hidden, n;

  METHOD Vector<T> saved(int i) const { return load(record + i * hidden, n); }
  METHOD Vector<T> state() const { return saved(0); }
  METHOD Vector<T> operand() const { return load(product_operand); }
  METHOD void set_operand(Vector<T> v) const { store(product_operand, v); }
  METHOD Vector<T> d_gate(int gate) const { return load(gates + gate * gate_stride); }
  METHOD void set_d_gate(int gate, Vector<T> v) const { store(gates + gate * gate_stride, v); }
  METHOD void set_d_input(Vector<T> v) const { store(inputs, v); }  // of the separate gate
  METHOD Vector<T> d_state() const { return load(before); }
  METHOD void set_d_state(Vector<T> v) const { store(before, v); }
};

}  // namespace INSTRUCTION_SET
