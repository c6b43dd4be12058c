/* The forward and the backward pass of a GRU layer on the CPU, as functions of C.

   With W = weight_ih, b = bias_ih, U = weight_hh, c = bias_hh, x the input of a step (with tokens,
   the row of the inputs that the token of the step indexes) and h the state, row b of the batch
   computes at each step t < lengths[b]

       a = x W' + b                                 the input part of the pre-activations
       z = sigmoid(a_z + h U_z' + c_z)              update gate: the share of the candidate
       r = sigmoid(a_r + h U_r' + c_r)              reset gate
       n = tanh(a_n + (r * h) U_n' + c_n)           candidate, reset_after = 0
       n = tanh(a_n + r * (h U_n' + c_n))           candidate, reset_after = 1
       h = h + z * (n - h)

   and keeps its state at all other steps. a is computed once for each row of x that such a step
   reads; the other rows have no influence, and their gradients are zero. Before a step at which a
   sequence begins within the row (see resets), h is set to h_reset. Matrices are dense and row-major.
   The order of the gates is z, r, n. Arrays of numbers are float or, with is_double, double. The
   results do not depend on the number of threads. Denormal numbers are treated as 0.

   Other cells (see `cell` in gru_problem) have other blocks of H rows in place of the three gates.
   The tanh RNN has one, h = tanh(a + h U' + c).

   T steps, B rows, D inputs, H hidden units, K rows of x. */
#ifndef GRU_H
#define GRU_H

#include <stdint.h>

#define GRU_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { GRU_NEVER, GRU_ALWAYS, GRU_WHILE_SPINNING };

/* The cells, as cells.h lists them. */
enum { GRU_CELL_GRU, GRU_CELL_RNN, GRU_CELLS };

/* The properties that all directions of a layer share. */
typedef struct {
  int64_t steps, batch, inputs, hidden; /* T, B, D, H */
  int64_t distinct;       /* K, which is T * B without tokens */
  const void *x;          /* [K, D] */
  const int32_t *tokens;  /* [T, B], rows of x; NULL: step t of row b reads row t * B + b */
  const int32_t *lengths; /* [B], in any order; NULL: every row has T steps */
  const uint8_t *resets;  /* [T, B], not 0 where a sequence begins: no state passes between steps
                             t - 1 and t, in either direction; NULL: no resets */
  int32_t is_double, reset_after;
  int32_t nn_order;   /* for gru_forward: the gates of weights and biases are in the order of nn.GRU,
                         r, z, n, and z is the share of the state that is kept */
  int32_t directions; /* 1 or 2 */
  int32_t threads;    /* the maximum number of threads, at least 1; never more than the cores */
  int32_t openmp;     /* GRU_ALWAYS, GRU_WHILE_SPINNING or GRU_NEVER: when to use the threads of the
                         process's OpenMP runtime, if it has one. These threads spin while they wait
                         for work, and would slow down other threads beside them. On a busy machine,
                         a thread that sleeps may take long to wake */
  int32_t bfloat16;   /* with float only: the factors of all matrix products are rounded to bfloat16
                         (to nearest, ties to even); the products are exact, and summed as floats */
  int32_t cell;       /* GRU_CELL_... */
  void *d_x;          /* [K, D], for gru_backward; NULL: not computed */
} gru_problem;

/* One direction. Only gru_backward reads and writes the second half; it does not read the biases. */
typedef struct {
  int32_t reverse;                     /* from step T - 1 to step 0 */
  int64_t ld_outputs;                  /* distance between the rows of outputs, and of d_outputs, in
                                          elements, so that two directions can share a matrix */
  const void *weight_ih, *weight_hh;   /* [3H, D], [3H, H] */
  const void *bias_ih, *bias_hh;       /* [3H] */
  const void *h0, *h_reset;            /* [B, H]; NULL: zeros */
  void *outputs;                       /* [T, B, H], 0 at padded steps; NULL: not written */
  void *h_last;                        /* [B, H] */
  void *saved;                         /* [gru_saved_size()]; NULL: no backward pass follows */

  const void *d_outputs, *d_h_last;    /* [T, B, H], [B, H]; NULL: zeros */
  void *d_weight_ih, *d_weight_hh;     /* [3H, D], [3H, H] */
  void *d_bias_ih, *d_bias_hh;         /* [3H] */
  void *d_h0, *d_h_reset;              /* [B, H]; the latter NULL without resets */
} gru_direction;

enum { GRU_OK, GRU_BAD_LENGTH, GRU_BAD_TOKEN, GRU_OUT_OF_MEMORY };

GRU_API int gru_forward(const gru_problem *problem, const gru_direction *directions);
GRU_API int gru_backward(const gru_problem *problem, const gru_direction *directions);

/* The number of elements that the forward pass of one direction saves for the backward pass. */
GRU_API int64_t gru_saved_size(int64_t steps, int64_t batch, int64_t hidden, int32_t cell,
                               int32_t reset_after);

/* The number of blocks of H rows in the weights of a cell, 3 for the GRU. */
GRU_API int32_t gru_gates(int32_t cell);

/* Whether this processor has instructions for products of bfloat16 numbers, AVX-512 BF16 or AMX.
   On others, these products take longer than those of floats. */
GRU_API int gru_bfloat16(void);

/* The instruction set in use, after choosing the named one ("amx", "avx512bf16", "avx512", "avx2",
   "baseline") unless name is NULL. Returns NULL, and changes nothing, if the processor lacks it, the
   system does not grant it or the compiler did not support it. Not to be called during another call
   of this library. */
GRU_API const char *gru_instruction_set(const char *name);

#ifdef __cplusplus
}
#endif

#endif
