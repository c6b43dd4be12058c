// The vectorised part of gru.cpp, which includes this file once for each instruction set:
// INSTRUCTION_SET names the namespace, TARGET is the function attribute that turns the instructions
// on, VECTOR_BYTES is the width of a register, and TILE_ROWS is such that a tile of that many rows
// by two vectors fits the registers; BFLOAT16_INSTRUCTION is defined where there is one for products
// of bfloat16. All functions carry TARGET: compilers lower vectors function by function, before
// inlining. No lambdas and nothing from std, which would not carry it.

#define FN TARGET static
#define INLINE TARGET static inline __attribute__((always_inline))

namespace INSTRUCTION_SET {

// In this order: each uses what comes before it.
#include "vectors.h"
#include "input_product.h"
#include "recurrence.h"

template <class E>
constexpr Kernels<Number<E>> kernels = {Simd<E>::width,
                                        pack_input_weights<E>,
                                        pack_weights<E>,
                                        project<E>,
                                        forward<E>,
                                        backward<E>,
                                        reduce_weights<Number<E>>,
                                        reduce_projections<Number<E>>,
                                        pack_inputs<E>,
                                        input_weight_gradient<E>,
                                        input_gradient<E>,
                                        fingerprint<Number<E>>};

}  // namespace INSTRUCTION_SET

#undef FN
#undef INLINE
#undef INSTRUCTION_SET
#undef TARGET
#undef VECTOR_BYTES
#undef TILE_ROWS
#undef IN_REGISTERS
#undef BFLOAT16_INSTRUCTION
