"""Faults planted in what is for GPUs, one at a time: see tests/planted_faults.py, for the CPU.

    python -m tests.gpu.planted_faults          all of them, some minutes on two cores
    python -m tests.gpu.planted_faults reset    those with "reset" in their names

Left out, for it is harmless: the last sync_cluster. Whoever comes to it has received all that the
others send, and so nobody writes to a block that may end.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.kernels import LIBRARY
from common.kernels.build import build
from tests.planted_faults import Fault, main, python

KERNEL, DRIVER = (f"common/kernels/cuda/{name}" for name in ("recurrence.cu", "driver.cpp"))
OF_TORCH, OF_JAX = "torch_impl/cuda.py", "jax_impl/cuda.py"
SMALL, SANITIZERS = "tests/gpu/small.py", "tests/test_gpu_sanitizers.py"
TORCH, JAX = (("--noconftest", "-k", name, SMALL) for name in ("torch", "jax"))
RACE, MEMORY = (("--noconftest", "-k", name, SANITIZERS) for name in ("thread", "address"))

FAULTS = [
    # Who waits for whom.
    Fault(
        "parts do not wait for each other's sums",
        KERNEL,
        "    sync_some(1 + group, 32 * P);\n",
        "",
        RACE,
    ),
    Fault(
        "lanes that store nothing do not wait to have read",
        KERNEL,
        "    if (own == 1 && per_word == 2) sync_warp();\n",
        "",
        RACE,
    ),
    Fault(
        "a block does not wait for what it exchanges",
        KERNEL,
        "    else sync_block();\n",
        "",
        RACE,
    ),
    Fault(
        "a cluster does not wait for what it exchanges",
        KERNEL,
        "    if (C > 1) barrier_wait(barriers + (exchange & 1), exchange >> 1 & 1);\n    else ",
        "    if (C == 1) ",
        RACE,
    ),
    Fault(
        "one slot is used for every exchange",
        KERNEL,
        "return slots + (exchange++ & 1) * slot;",
        "return exchange += 2, slots;",
        RACE,
    ),
    Fault(
        "what is read is the slot of the next exchange",
        KERNEL,
        "return slots + (exchange++ & 1) * slot;",
        "return slots + (++exchange & 1) * slot;",
        TORCH,
    ),
    Fault(
        "the parity of every exchange, not of every other",
        KERNEL,
        "exchange >> 1 & 1",
        "exchange & 1",
        MEMORY,
    ),
    Fault(
        "bytes are expected as if each number was a word",
        KERNEL,
        "rows * count * words * 4",
        "rows * count * H * 4",
        MEMORY,
    ),
    Fault(
        "nothing is expected of r * h",
        KERNEL,
        "begin(1), send(gated, 0);",
        "send(gated, 0);",
        MEMORY,
    ),
    Fault(
        "one of three gradients is expected",
        KERNEL,
        "begin(3), send(d_z, 0)",
        "begin(1), send(d_z, 0)",
        MEMORY,
    ),
    Fault(
        "a block of empty rows sends its states",
        KERNEL,
        "if (longest > 0) begin(1), send(h, 0);",
        "begin(1), send(h, 0);",
        MEMORY,
    ),
    Fault(
        "after the last step, the states are sent once more",
        KERNEL,
        "if (step + 1 < longest) begin(1), send(h, 0);",
        "begin(1), send(h, 0);",
        MEMORY,
    ),
    Fault(
        "a block writes to others that have not begun",
        KERNEL,
        "    if (C > 1) sync_cluster();  // its barriers are there\n",
        "",
        MEMORY,
    ),
    Fault(
        "of two rows, either lane stores both",
        KERNEL,
        "own == 1 ? !odd : (i & 1) == odd",
        "own == 1 ? !odd : true",
        MEMORY,
    ),
    # What memory holds.
    Fault(
        "shared memory has no room for the barriers",
        KERNEL,
        "(2 * slot + partials) * 4 + 2 * 16;",
        "(2 * slot + partials) * 4;",
        MEMORY,
    ),
    Fault(
        "the padding against bank conflicts misaligns loads",
        KERNEL,
        "% 32 ? 0 : 16)",
        "% 32 ? 0 : 2)",
        MEMORY,
    ),
    Fault(
        "rows beyond the batch are read",
        KERNEL,
        "row[i] = b < a.batch && unit[i] < a.hidden ? b : -1;",
        "row[i] = unit[i] < a.hidden ? b : -1;",
        MEMORY,
    ),
    Fault(
        "units beyond those that there are are written",
        KERNEL,
        "row[i] = b < a.batch && unit[i] < a.hidden ? b : -1;",
        "row[i] = b < a.batch ? b : -1;",
        MEMORY,
    ),
    Fault(
        "padding is not zeroed in outputs",
        KERNEL,
        "        if (outputs) outputs[at * width + unit[i]] = 0;\n",
        "",
        MEMORY,
    ),
    Fault(
        "padding is not zeroed in saved",
        KERNEL,
        "saved[(at * record + 1) * size + unit[i]] = saved[(at",
        "saved[(at",
        MEMORY,
    ),
    Fault(
        "padding is not zeroed in d_a",
        KERNEL,
        "gate < 3; ++gate) d_a[",
        "gate < 2; ++gate) d_a[",
        MEMORY,
    ),
    Fault(
        "padding is not zeroed in d_q",
        KERNEL,
        "        if (ResetAfter) d_q[at * size + unit[i]] = 0;\n",
        "",
        MEMORY,
    ),
    Fault(
        "the gradient of h_reset does not begin at zero",
        KERNEL,
        "if (row[i] >= 0 && a.d_h_reset) a.d_h_reset[",
        "if (longest < 0) a.d_h_reset[",
        MEMORY,
    ),
    # Products.
    Fault(
        "two entries of a fragment are swapped",
        KERNEL,
        "const int u = u0 + lane / 4 + (e & 1) * 8;",
        "const int u = u0 + lane / 4 + (e >> 1) * 8;",
        TORCH,
    ),
    Fault(
        "a pair is packed in the wrong order",
        KERNEL,
        "odd ? Factors::word(other, value[i]) : Factors::word(value[i], other)",
        "odd ? Factors::word(value[i], other) : Factors::word(other, value[i])",
        TORCH,
    ),
    Fault(
        "the last part of a sum is lost",
        KERNEL,
        "UNROLL for (int p = 0; p < P; ++p)",
        "UNROLL for (int p = 0; p < P - 1; ++p)",
        TORCH,
    ),
    Fault(
        "backward, the weights are not transposed",
        KERNEL,
        "(Backward ? k : u)) * H + (Backward ? u : k)",
        "u) * H + k",
        TORCH,
    ),
    Fault(
        "a gradient of three is counted twice",
        KERNEL,
        "UNROLL for (int k = 1; k < Count; ++k)",
        "UNROLL for (int k = 0; k < Count; ++k)",
        TORCH,
    ),
    Fault(
        "float32: what TF32 loses of the states is not multiplied",
        KERNEL,
        "    mma_tf32(sum, large_a, small_b);\n",
        "",
        TORCH,
    ),
    Fault(
        "float32: what TF32 loses of the weights is not multiplied",
        KERNEL,
        "    mma_tf32(sum, small_a, large_b);\n",
        "",
        TORCH,
    ),
    # A step.
    Fault(
        "the bias of n is left out of q",
        KERNEL,
        "q[i] = sum[2][i] + bias[2][i];",
        "q[i] = sum[2][i];",
        TORCH,
    ),
    Fault(
        "the derivative of tanh has the wrong sign",
        KERNEL,
        "d_n[i] = d * z[i] * (1 - n[i] * n[i]);",
        "d_n[i] = d * z[i] * (1 + n[i] * n[i]);",
        TORCH,
    ),
    Fault(
        "a row takes a step too many",
        KERNEL,
        "after[i] = t < length[i] ?",
        "after[i] = t <= length[i] ?",
        TORCH,
    ),
    Fault(
        "a token is asked for a step too late",
        KERNEL,
        "token[i] = source(i, step + 2);",
        "token[i] = source(i, step + 1);",
        TORCH,
    ),
    Fault(
        "both directions walk as the first does",
        KERNEL,
        "return a.reverse[direction] ? longest - 1 - step : step;",
        "return a.reverse[0] ? longest - 1 - step : step;",
        TORCH,
    ),
    Fault(
        "the second direction's states are the first's",
        KERNEL,
        "const int states = direction * a.hidden * a.batch;",
        "const int states = 0;",
        TORCH,
    ),
    Fault(
        "the second direction saves where the first does",
        KERNEL,
        "a.saved + (size_t)direction * record * size * a.batch * a.steps",
        "a.saved",
        TORCH,
    ),
    # Sequences that begin within a row.
    Fault(
        "the backward direction is reset a step late",
        KERNEL,
        "const int at = t + a.reverse[direction];",
        "const int at = t;",
        TORCH,
    ),
    Fault(
        "padding resets",
        KERNEL,
        "t >= 0 && at < length[i]",
        "t >= 0 && at < a.steps",
        TORCH,
    ),
    Fault(
        "a sequence that begins with a row is not reset",
        KERNEL,
        "(anew ? a.h_reset : a.h0)",
        "(a.h0)",
        TORCH,
    ),
    Fault(
        "a gradient crosses a reset",
        KERNEL,
        "          d_h[i] = 0;\n",
        "",
        TORCH,
    ),
    Fault(
        "of a row's resets the last one's gradient is kept",
        KERNEL,
        "unit[i]] += d_h[i];",
        "unit[i]] = d_h[i];",
        TORCH,
    ),
    # The driver and the bindings.
    Fault(
        "driver: the blocks are no cluster",
        DRIVER,
        "config.numAttrs = instance->cluster > 1;",
        "config.numAttrs = 0;",
        TORCH,
    ),
    Fault(
        "driver: a cluster of 16 is not asked for",
        DRIVER,
        "return instance.cluster > 8 ?",
        "return instance.cluster > 16 ?",
        TORCH,
    ),
    Fault(
        "driver: rows that are no whole block get none",
        DRIVER,
        "((call.batch + 7) / 8)",
        "(call.batch / 8)",
        TORCH,
    ),
    Fault(
        "driver: shared memory is not asked for",
        DRIVER,
        "driver().set(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)instance.shared_bytes)",
        "CUresult(0)",
        TORCH,
    ),
    Fault(
        "XLA: the gradient of h0 is where that of h_reset belongs",
        DRIVER,
        "call.d_h0 = floats(result(2)), call.d_h_reset = floats(result(3));",
        "call.d_h0 = floats(result(3)), call.d_h_reset = floats(result(2));",
        JAX,
    ),
    Fault(
        "PyTorch: the units that there are not come first",
        OF_TORCH,
        "F.pad(weights, (0, beyond, 0, beyond))",
        "F.pad(weights, (beyond, 0, beyond, 0))",
        TORCH,
    ),
    Fault(
        "PyTorch: the directions are exchanged",
        OF_TORCH,
        "[*reverse, False][:2]",
        "[False, *reverse][:2]",
        TORCH,
    ),
    Fault(
        "PyTorch: the bias within r * (...) has the gradient of the one outside",
        OF_TORCH,
        "d_n, gated = d_q, before",
        "gated = before",
        TORCH,
    ),
    Fault(
        "JAX: the units that there are not come first",
        OF_JAX,
        "((0, 0), (0, 0), (0, beyond), (0, beyond))",
        "((0, 0), (0, 0), (beyond, 0), (beyond, 0))",
        JAX,
    ),
    Fault(
        "JAX: of steps with the same token one counts",
        OF_JAX,
        '.add(d_a, mode="drop")',
        '.set(d_a, mode="drop")',
        JAX,
    ),
    Fault(
        "JAX: the gradient of U_n is that of a state that is not reset",
        OF_JAX,
        "gated = kept[..., size : 2 * size] * before",
        "gated = before",
        JAX,
    ),
]


def run(words: Sequence[str]) -> int:
    """As main of tests/planted_faults.py; only for faults in the driver a library is built."""
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder, ["-O0"])

        def prepare(copy: Path, fault: Fault | None) -> str:
            to = copy / "common/kernels"
            if library and not (fault and fault.file == DRIVER):
                shutil.copy(library, to / LIBRARY)
                return ""
            code = f"from common.kernels.build import build; assert build({str(to)!r}, ['-O0'])"
            status, said = python(copy, "-c", code)
            return said if status else ""

        return main(words, FAULTS, prepare)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
