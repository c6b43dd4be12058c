// Everything that is vectorised, for one instruction set: build.py compiles this file once for each,
// with the flags that turn the instructions on and INSTRUCTION_SET, its name. See vectors.h.
#include "cells.h"
#include "input_product.h"
#include "packing.h"

namespace INSTRUCTION_SET {

#define DEFINE_KERNELS(E)                                                                            \
  extern const Kernels<Number<E>> kernels_of_##E = {                                                 \
      Simd<E>::width, cells<E>, pack_input_weights<E>, pack_weights<E>, project<E>,                  \
      reduce_weights<Number<E>>, reduce_projections<Number<E>>, pack_inputs<E>,                      \
      input_weight_gradient<E>, input_gradient<E>, fingerprint<Number<E>>, release_tiles}

DEFINE_KERNELS(Pair);
#if !defined(__AVX512BF16__) && !defined(__AMX_BF16__)  // whose instructions are for pairs alone
DEFINE_KERNELS(float);
DEFINE_KERNELS(double);
#endif

}  // namespace INSTRUCTION_SET
