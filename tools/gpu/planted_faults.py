"""Plants faults in the GPU kernel and its bindings, one at a time; see tools/planted_faults.py.

    python -m tools.gpu.planted_faults          all faults, about eight minutes on two cores
    python -m tools.gpu.planted_faults reset    the faults with "reset" in their names

A missing last sync_cluster is harmless and not in the table: a block that reaches it has received
everything that the other blocks send, so no block writes to one that has ended.
"""

import sys

from tools.planted_faults import Fault, main

SMALL = ("--noconftest", "tests/gpu/small.py")
# An error of the emulator's compilation is raised at import, and does not count as a detection.
SANITIZED = ("--noconftest", "-p", "tests.gpu.small", "tests/gpu/test_gpu.py")
SANITIZED += ("-m", "long or not long")
# Name | original text | replacement. "@" precedes the file and the tests of the following faults.
TABLE = """
@ common/kernels/cuda/recurrence.cu thread
parts do not wait for each other's sums | sync_some(1 + group, 32 * P); |
lanes that store nothing do not wait to have read | sync_warp(); |
a block does not wait for an exchange | else sync_block(); |
a cluster does not wait for an exchange | barrier_wait(barriers | (void)(barriers
all exchanges use one slot | slots + (exchange++ & 1) | slots + 0 * exchange++
@ common/kernels/cuda/recurrence.cu address
the parity changes with every exchange | exchange >> 1 & 1 | exchange & 1
the expected bytes count a word for each number | rows * count * words * 4 | rows * count * H * 4
a barrier does not expect r * h | begin(1), send(gated, 0); | send(gated, 0);
a barrier expects one of three gradients | begin(3), send(d_z, 0) | begin(1), send(d_z, 0)
a block of empty rows sends its states | if (longest > 0) begin(1) | begin(1)
a block writes to blocks that have not started | if (C > 1) sync_cluster();  // its barriers | //
shared memory lacks space for the barriers | + biases) * 4 + 2 * 16; | + biases) * 4;
the padding against bank conflicts misaligns loads | % 32 ? 0 : 16) | % 32 ? 0 : 2)
rows beyond the batch are read | row[i] = b < a.batch && unit[i] | row[i] = unit[i]
units beyond the hidden size are written | b < a.batch && unit[i] < a.hidden | b < a.batch
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
float32: the low bits of the states are not multiplied | mma_tf32(sum, large_a, small_b); |
the bias of n is left out of q | q[i] = sum[2][i] + c(2, i); | q[i] = sum[2][i];
a row runs one step too many | after[i] = t < length[i] ? | after[i] = t <= length[i] ?
a token is loaded one step late | look_up(step + 2); | look_up(step + 1);
the second direction's states are the first's | states = direction * | states = 0 *
the backward direction is reset a step late | const int at = t + a.reverse[direction]; | int at = t;
padding resets | a.resets && at < length[i] | a.resets && row[i] >= 0 && at < a.steps
a sequence that begins with a row is not reset | (anew ? a.h_reset : a.h0) | (a.h0)
a gradient crosses a reset | d_h[i] = 0; |
of a row's resets, only the last gradient is kept | unit[i]] += d_h[i]; | unit[i]] = d_h[i];
@ common/kernels/cuda/driver.cpp test_torch
driver: blocks are not clustered | config.numAttrs = instance->cluster > 1; | config.numAttrs = 0;
driver: a cluster of 16 is not requested | if (instance.cluster <= 8) | if (instance.cluster <= 16)
driver: a partial block of rows is not launched | ((call.batch + 7) / 8) | (call.batch / 8)
driver: shared memory is not requested | SHARED_SIZE_BYTES, bytes) | SHARED_SIZE_BYTES, 0)
@ common/kernels/cuda/driver.cpp test_jax
XLA: h0 has another gradient | call.d_h0 = floats(result(2)) | call.d_h0 = floats(result(3))
@ torch_impl/cuda.py test_torch
PyTorch: the directions are exchanged | [:] = [False, True] | [:] = [True, False]
PyTorch: both biases of n have one gradient | d_n, gated = d_q, before | gated = before
@ jax_impl/cuda.py test_jax
JAX: the additional units come first | (0, 0), (0, beyond), (0 | (0, 0), (beyond, 0), (0
JAX: of steps with the same token, one counts | .add(d_a, mode="drop") | .set(d_a, mode="drop")
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
