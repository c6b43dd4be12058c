// The arguments of recurrence.cu, for all directions of a layer.
#pragma once

// R directions, T steps, B rows, H hidden units, K distinct inputs. Arrays are dense and row-major;
// the gates have the order z, r, n. A row with a length outside 0..T becomes NaN, and so does a step
// with a token outside 0..K-1.
struct Call {
  const float *projections;     // [R, K, 3H], x W' + b; K is T * B without tokens
  const float *weight_hh;       // [R, 3, S, S], S >= H; the units beyond H are 0
  const float *bias_hh;         // [R, 3H]
  const float *h0, *h_reset;    // [R, B, H]
  const int *tokens;            // [T, B], or null
  const int *lengths;           // [B]
  const unsigned char *resets;  // [T, B], or null; without resets, h_reset is not read
  float *outputs;               // [T, B, R * H], 0 at padding, or null
  float *h_last;                // [R, B, H]
  float *saved;                 // [R, T, B, 4H or 5H]: z, r, n, the previous state and, with
                                // reset after, h U_n' + c_n; null without a backward pass
  const float *d_outputs;       // [T, B, R * H], or null
  const float *d_h_last;        // [R, B, H]
  float *d_a;                   // [R, T, B, 3H]: of the projections, for each step
  float *d_q;                   // [R, T, B, H], with reset after: of h U_n' + c_n
  float *d_h0, *d_h_reset;      // [R, B, H]; d_h_reset is null without resets
  int steps, batch, hidden, distinct, directions;
  int reverse[2];               // for each direction: whether it runs from step T - 1 to 0
};
