"""Faults planted in what is for GPUs, one at a time: see tools/planted_faults.py, for the CPU.

    python -m tools.gpu.planted_faults          all of them, some eight minutes on two cores
    python -m tools.gpu.planted_faults reset    those with "reset" in their names

Left out, for it is harmless: the last sync_cluster. Whoever comes to it has received all that the
others send, and so nobody writes to a block that may end.
"""

import sys

from tools.planted_faults import Fault, main

SMALL = ("--noconftest", "tests/gpu/small.py")
# What the emulator cannot compile, its import says: that is not found.
SANITIZED = ("--noconftest", "-p", "tests.gpu.small", "tests/gpu/test_gpu.py")
SANITIZED += ("-m", "long or not long")
# Name | text | in its place; after "@", the file of those that follow, and which tests find them.
TABLE = """
@ common/kernels/cuda/recurrence.cu thread
parts do not wait for each other's sums | sync_some(1 + group, 32 * P); |
lanes that store nothing do not wait to have read | sync_warp(); |
a block does not wait for what it exchanges | else sync_block(); |
a cluster does not wait for what it exchanges | barrier_wait(barriers | (void)(barriers
one slot is used for every exchange | slots + (exchange++ & 1) | slots + 0 * exchange++
@ common/kernels/cuda/recurrence.cu address
the parity of every exchange, not of every other | exchange >> 1 & 1 | exchange & 1
bytes are expected as if each number was a word | rows * count * words * 4 | rows * count * H * 4
nothing is expected of r * h | begin(1), send(gated, 0); | send(gated, 0);
one of three gradients is expected | begin(3), send(d_z, 0) | begin(1), send(d_z, 0)
a block of empty rows sends its states | if (longest > 0) begin(1) | begin(1)
a block writes to others that have not begun | if (C > 1) sync_cluster();  // its barriers | //
shared memory has no room for the barriers | + biases) * 4 + 2 * 16; | + biases) * 4;
the padding against bank conflicts misaligns loads | % 32 ? 0 : 16) | % 32 ? 0 : 2)
rows beyond the batch are read | row[i] = b < a.batch && unit[i] | row[i] = unit[i]
units beyond those that there are are written | b < a.batch && unit[i] < a.hidden | b < a.batch
padding is not zeroed in outputs | if (outputs) outputs[at * width + unit[i]] = 0; |
padding is not zeroed in saved | saved[(at * record + 1) * size + unit[i]] = saved[(at | saved[(at
padding is not zeroed in d_a | gate < 3; ++gate) d_a[ | gate < 2; ++gate) d_a[
padding is not zeroed in d_q | if (ResetAfter) d_q[at * size + unit[i]] = 0; |
h_reset's gradient does not begin at 0 | if (row[i] >= 0 && a.d_h_reset) | if (longest < 0)
@ common/kernels/cuda/recurrence.cu test_torch
two entries of a fragment are swapped | u0 + lane / 4 + (e & 1) * 8; | u0 + lane / 4 + (e >> 1) * 8;
a pair is in the wrong order | odd ? other : mine, odd ? mine : other | mine, other
of two rows, a lane stores the other's | store(at(first + i + odd) | store(at(first + i + !odd)
the last part of a sum is lost | UNROLL for (int p = 0; p < P; | for (int p = 0; p < P - 1;
backward, the weights are not transposed | (Backward ? k : u)) * H + (Backward ? u : k) | u) * H + k
a gradient of three is counted twice | for (int k = 1; k < Count; | for (int k = 0; k < Count;
float32: what TF32 loses of the states is not multiplied | mma_tf32(sum, large_a, small_b); |
the bias of n is left out of q | q[i] = sum[2][i] + c(2, i); | q[i] = sum[2][i];
a row takes a step too many | after[i] = t < length[i] ? | after[i] = t <= length[i] ?
a token is asked for a step too late | look_up(step + 2); | look_up(step + 1);
the second direction's states are the first's | states = direction * | states = 0 *
the backward direction is reset a step late | const int at = t + a.reverse[direction]; | int at = t;
padding resets | a.resets && at < length[i] | a.resets && row[i] >= 0 && at < a.steps
a sequence that begins with a row is not reset | (anew ? a.h_reset : a.h0) | (a.h0)
a gradient crosses a reset | d_h[i] = 0; |
of a row's resets the last one's gradient is kept | unit[i]] += d_h[i]; | unit[i]] = d_h[i];
@ common/kernels/cuda/driver.cpp test_torch
driver: the blocks are no cluster | config.numAttrs = instance->cluster > 1; | config.numAttrs = 0;
driver: a cluster of 16 is not asked for | if (instance.cluster <= 8) | if (instance.cluster <= 16)
driver: rows that are no whole block get none | ((call.batch + 7) / 8) | (call.batch / 8)
driver: shared memory is not asked for | SHARED_SIZE_BYTES, bytes) | SHARED_SIZE_BYTES, 0)
@ common/kernels/cuda/driver.cpp test_jax
XLA: the gradient of h0 is elsewhere | call.d_h0 = floats(result(2)) | call.d_h0 = floats(result(3))
@ torch_impl/cuda.py test_torch
PyTorch: the directions are exchanged | [:] = [False, True] | [:] = [True, False]
PyTorch: both biases of n have one gradient | d_n, gated = d_q, before | gated = before
@ jax_impl/cuda.py test_jax
JAX: the units that there are not come first | (0, 0), (0, beyond), (0 | (0, 0), (beyond, 0), (0
JAX: of steps with the same token one counts | .add(d_a, mode="drop") | .set(d_a, mode="drop")
"""


FAULTS = [
    Fault(name, file, old, new, (*(SMALL if "test" in tests else SANITIZED), "-k", tests))
    for group in TABLE.split("\n@ ")[1:]
    for head, *lines in [group.strip().splitlines()]
    for file, tests in [head.split()]
    for name, old, new in [map(str.strip, line.split("|")) for line in lines]
]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], FAULTS))
