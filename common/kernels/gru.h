/* A GRU layer, forward and backward, on the CPU: a plain C interface.

   With W = weight_ih, b = bias_ih, U = weight_hh, c = bias_hh, x the input of a step (a row of the
   inputs, the one that the step's token points at) and h the state, row b of the batch does at each
   step t < lengths[b]

       a = x W' + b                                 the input's share of the pre-activations
       z = sigmoid(a_z + h U_z' + c_z)              update gate: how much of the candidate is let in
       r = sigmoid(a_r + h U_r' + c_r)              reset gate
       n = tanh(a_n + (r * h) U_n' + c_n)           candidate, reset_after = 0
       n = tanh(a_n + r * (h U_n' + c_n))           candidate, reset_after = 1
       h = h + z * (n - h)

   and keeps its state at every other step. a is computed once for each row of x, and not for rows
   that no such step reads: these have no influence, and gradients of zero. Before a step where a
   sequence begins within the row (see resets), h is h_reset. Matrices are dense and row-major, gates
   are in the order z, r, n, and every pointer is to float, or to double where the problem says so.
   Results do not depend on the number of threads. Denormal numbers, too small for full precision,
   count as 0.

   Another cell (see gru_problem's cell) has blocks of H rows of its own in the place of the three
   gates: the tanh RNN has one, h = tanh(a + h U' + c).

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
  int64_t distinct;       /* K: T * B without tokens */
  const void *x;          /* [K, D] */
  const int32_t *tokens;  /* [T, B], rows of x; NULL: step t of row b reads row t * B + b */
  const int32_t *lengths; /* [B], in any order; NULL: every row has T steps */
  const uint8_t *resets;  /* [T, B], not 0 where a sequence begins: no direction's state crosses from
                             step t - 1 to t, or back; NULL: nowhere */
  int32_t is_double, reset_after;
  int32_t nn_order;   /* of gru_forward: the gates of weights and biases are in nn.GRU's order, r, z,
                         n, and z says how much of the state is kept */
  int32_t directions; /* 1 or 2 */
  int32_t threads;    /* the largest number, at least 1; more than the cores are not used */
  int32_t openmp;     /* GRU_ALWAYS, GRU_WHILE_SPINNING or GRU_NEVER: when to take the threads of the
                         process's own OpenMP runtime, where it has one. Waiting for work they spin,
                         and would slow down threads beside them; beside busy programs, one that
                         sleeps may take long to come */
  int32_t bfloat16;   /* of floats: what every product of matrices multiplies is rounded to bfloat16
                         (to nearest, ties to even); the products are exact, their sums floats */
  int32_t cell;       /* GRU_CELL_... */
  void *d_x;          /* [K, D], of gru_backward; NULL: not computed */
} gru_problem;

/* One direction. The second half is read and written by gru_backward alone, which does not read the
   biases. */
typedef struct {
  int32_t reverse;                     /* walk from step T - 1 down to 0 */
  int64_t ld_outputs;                  /* distance between the rows of outputs, and of d_outputs, in
                                          elements, so that two directions can share a matrix */
  const void *weight_ih, *weight_hh;   /* [3H, D], [3H, H] */
  const void *bias_ih, *bias_hh;       /* [3H] */
  const void *h0, *h_reset;            /* [B, H]; NULL: zeros */
  void *outputs;                       /* [T, B, H], 0 at padded steps; NULL: not written */
  void *h_last;                        /* [B, H] */
  void *saved;                         /* gru_saved_size(); NULL: without a backward */

  const void *d_outputs, *d_h_last;    /* [T, B, H], [B, H]; NULL: zeros */
  void *d_weight_ih, *d_weight_hh;     /* [3H, D], [3H, H] */
  void *d_bias_ih, *d_bias_hh;         /* [3H] */
  void *d_h0, *d_h_reset;              /* [B, H]; the latter NULL without resets */
} gru_direction;

enum { GRU_OK, GRU_BAD_LENGTH, GRU_BAD_TOKEN, GRU_OUT_OF_MEMORY };

GRU_API int gru_forward(const gru_problem *problem, const gru_direction *directions);
GRU_API int gru_backward(const gru_problem *problem, const gru_direction *directions);

/* Elements that one direction's forward saves for its backward. */
GRU_API int64_t gru_saved_size(int64_t steps, int64_t batch, int64_t hidden, int32_t cell,
                               int32_t reset_after);

/* The blocks of H rows of a cell's weights: 3 of the GRU's. */
GRU_API int32_t gru_gates(int32_t cell);

/* Whether this processor multiplies bfloat16 numbers itself, by AVX-512 BF16 or AMX; elsewhere, their
   products take longer than those of floats. */
GRU_API int gru_bfloat16(void);

/* The instruction set in use; with a name ("amx", "avx512bf16", "avx512", "avx2", "baseline"), choose
   it first. Returns NULL, and changes nothing, where the processor lacks it, the system does not grant
   it or the compiler did not know it. Not to be called during a gru_ call. */
GRU_API const char *gru_instruction_set(const char *name);

#ifdef __cplusplus
}
#endif

#endif
