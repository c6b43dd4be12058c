/* The recurrence of a GRU layer, forward and backward, on the CPU: a plain C interface.

   With a = projections[token] (the input's share of the pre-activations, bias_ih included), U =
   weight_hh, c = bias_hh and h the state, row b of the batch does at each step t < lengths[b]

       z = sigmoid(a_z + h U_z' + c_z)              update gate: how much of the candidate is let in
       r = sigmoid(a_r + h U_r' + c_r)              reset gate
       n = tanh(a_n + (r * h) U_n' + c_n)           candidate, reset_after = 0
       n = tanh(a_n + r * (h U_n' + c_n))           candidate, reset_after = 1
       h = h + z * (n - h)

   and keeps its state at every other step. Before a step where a sequence begins within the row (see
   resets), h is h_reset. Matrices are dense and row-major, gates are in the order
   z, r, n, and every pointer is to float, or to double where the problem says so. Nothing is copied
   on the way in or out. Results do not depend on the number of threads. Denormal numbers, too small
   for full precision, count as 0.

   T steps, B rows, H hidden units, K rows of projections. */
#ifndef GRU_H
#define GRU_H

#include <stdint.h>

#define GRU_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* What the directions of a layer have in common. */
typedef struct {
  int64_t steps, batch, hidden; /* T, B, H */
  int64_t distinct;             /* K: T * B without tokens */
  const int32_t *tokens;  /* [T, B], rows of projections; NULL: step t of row b is row t * B + b */
  const int32_t *lengths; /* [B], in any order; NULL: every row has T steps */
  const uint8_t *resets;  /* [T, B], not 0 where a sequence begins: no direction's state crosses from
                             step t - 1 to t, or back; NULL: nowhere */
  int32_t is_double, reset_after;
  int32_t directions; /* 1 or 2 */
  int32_t threads;    /* at most this many, at least 1, and never more than gru_cores() */
  int32_t openmp;     /* take the threads of the process's own OpenMP runtime, where it has one:
                         waiting for work they spin, and would slow down threads beside them */
} gru_problem;

/* One direction. ld_*: distance between the rows of a matrix, in elements, so that two directions
   can share one matrix. The second half is read and written by gru_backward alone. */
typedef struct {
  int32_t reverse;                    /* walk from step T - 1 down to 0 */
  int64_t ld_projections, ld_outputs; /* of the gradients, too */
  const void *projections;            /* [K, 3H] */
  const void *weight_hh, *bias_hh;    /* [3H, H], [3H] */
  const void *h0, *h_reset;           /* [B, H]; NULL: zeros */
  void *outputs;                      /* [T, B, H], 0 at padded steps; NULL: not wanted */
  void *h_last;                       /* [B, H] */
  void *saved;                        /* gru_saved_size(); NULL: there will be no backward */

  const void *d_outputs, *d_h_last;     /* [T, B, H], [B, H]; NULL: zeros */
  void *d_projections;                  /* [K, 3H] */
  void *d_weight_hh, *d_bias_hh, *d_h0; /* [3H, H], [3H], [B, H] */
  void *d_h_reset;                      /* [B, H]; NULL without resets */
} gru_direction;

enum { GRU_OK, GRU_BAD_LENGTH, GRU_BAD_TOKEN, GRU_OUT_OF_MEMORY };

GRU_API int gru_forward(const gru_problem *problem, const gru_direction *directions);
GRU_API int gru_backward(const gru_problem *problem, const gru_direction *directions);

/* Elements that one direction's forward saves for its backward: 4 per unit and step, or 5. */
GRU_API int64_t gru_saved_size(int64_t steps, int64_t batch, int64_t hidden, int32_t reset_after);

/* Cores this process may use. */
GRU_API int gru_cores(void);

/* The instruction set in use; with a name ("avx512", "avx2", "baseline"), choose it first. Returns
   NULL, and changes nothing, where this processor lacks it. Not to be called during a gru_ call. */
GRU_API const char *gru_instruction_set(const char *name);

#ifdef __cplusplus
}
#endif

#endif
