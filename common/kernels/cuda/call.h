// What recurrence.cu is called with: all directions of a layer.
#pragma once

// R directions, T steps, B rows, H hidden units, K distinct inputs. Dense, row-major; gates are in
// the order z, r, n. Rows of a length out of 0..T become NaN, steps of a token out of 0..K-1, too.
struct Call {
  const float *projections;     // [R, K, 3H], x W' + b; K is T * B without tokens
  const float *weight_hh;       // [R, 3, S, S], S >= H units of which those beyond H are 0
  const float *bias_hh;         // [R, 3H]
  const float *h0, *h_reset;    // [R, B, H]
  const int *tokens;            // [T, B], or null
  const int *lengths;           // [B]
  const unsigned char *resets;  // [T, B], or null: then h_reset is not read
  float *outputs;               // [T, B, R * H], 0 at padding, or null
  float *h_last;                // [R, B, H]
  float *saved;                 // [R, T, B, 4H or 5H]: z, r, n, the state before and, reset after,
                                // h U_n' + c_n; null: there will be no backward
  const float *d_outputs;       // [T, B, R * H], or null
  const float *d_h_last;        // [R, B, H]
  float *d_a;                   // [R, T, B, 3H]: of the projections, as the steps read them
  float *d_q;                   // [R, T, B, H], reset after: of h U_n' + c_n
  float *d_h0, *d_h_reset;      // [R, B, H]; the latter null without resets
  int steps, batch, hidden, distinct, directions;
  int reverse[2];               // of each direction: whether it walks from step T - 1 to 0
};
