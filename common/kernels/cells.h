// The cells that the kernel computes.
#pragma once

#include "cell_gru.h"
#include "cell_rnn.h"
#include "recurrence.h"

namespace INSTRUCTION_SET {

template <class E, class Cell>
constexpr CellKernels<Number<E>> cell = {Cell::shape, forward<E, Cell>, backward<E, Cell>};

// In the order of gru.h's GRU_CELL_...; by reset_after.
template <class E>
constexpr CellKernels<Number<E>> cells[][2] = {
    {cell<E, Gru<false>>, cell<E, Gru<true>>},
    {cell<E, Rnn>, cell<E, Rnn>},
};

}  // namespace INSTRUCTION_SET
