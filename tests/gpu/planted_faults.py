"""Faults planted in what is for GPUs, one at a time: see tests/planted_faults.py, for the CPU.

    python -m tests.gpu.planted_faults          all of them, some eight minutes on two cores
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

FILES = {
    "kernel": "common/kernels/cuda/recurrence.cu",
    "driver": "common/kernels/cuda/driver.cpp",
    "torch": "torch_impl/cuda.py",
    "jax": "jax_impl/cuda.py",
}
SMALL, SANITIZERS = "tests/gpu/small.py", "tests/test_gpu_sanitizers.py"
TESTS = {"torch": SMALL, "jax": SMALL, "thread": SANITIZERS, "address": SANITIZERS}


def parsed(text: str) -> list[Fault]:
    """What FAULTS says: after "@", of which file and of which of the tests the following faults
    are; of each the name, the text that is taken out, and what takes its place."""
    faults = []
    for group in text.split("@ ")[1:]:
        head, *lines = group.splitlines()
        file, test = head.split()
        tests = ("--noconftest", "-k", test, TESTS[test])
        for name, old, new in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
            faults.append(Fault(name, FILES[file], old[2:], new[2:], tests))
    return faults


FAULTS = parsed("""\
@ kernel thread
parts do not wait for each other's sums
- sync_some(1 + group, 32 * P);
+
lanes that store nothing do not wait to have read
- sync_warp();
+
a block does not wait for what it exchanges
- else sync_block();
+
a cluster does not wait for what it exchanges
- barrier_wait(barriers + (exchange & 1), exchange >> 1 & 1);
+ ;
one slot is used for every exchange
- return slots + (exchange++ & 1) * slot;
+ return exchange += 2, slots;
@ kernel address
the parity of every exchange, not of every other
- exchange >> 1 & 1
+ exchange & 1
bytes are expected as if each number was a word
- rows * count * words * 4
+ rows * count * H * 4
nothing is expected of r * h
- begin(1), send(gated, 0);
+ send(gated, 0);
one of three gradients is expected
- begin(3), send(d_z, 0)
+ begin(1), send(d_z, 0)
a block of empty rows sends its states
- if (longest > 0) begin(1), send(h, 0);
+ begin(1), send(h, 0);
a block writes to others that have not begun
- if (C > 1) sync_cluster();  // its barriers are there
+
shared memory has no room for the barriers
- (2 * slot + partials + biases) * 4 + 2 * 16;
+ (2 * slot + partials + biases) * 4;
the padding against bank conflicts misaligns loads
- % 32 ? 0 : 16)
+ % 32 ? 0 : 2)
rows beyond the batch are read
- row[i] = b < a.batch && unit[i] < a.hidden ? b : -1;
+ row[i] = unit[i] < a.hidden ? b : -1;
units beyond those that there are are written
- row[i] = b < a.batch && unit[i] < a.hidden ? b : -1;
+ row[i] = b < a.batch ? b : -1;
padding is not zeroed in outputs
- if (outputs) outputs[at * width + unit[i]] = 0;
+
padding is not zeroed in saved
- saved[(at * record + 1) * size + unit[i]] = saved[(at
+ saved[(at
padding is not zeroed in d_a
- gate < 3; ++gate) d_a[
+ gate < 2; ++gate) d_a[
padding is not zeroed in d_q
- if (ResetAfter) d_q[at * size + unit[i]] = 0;
+
the gradient of h_reset does not begin at zero
- if (row[i] >= 0 && a.d_h_reset) a.d_h_reset[
+ if (longest < 0) a.d_h_reset[
@ kernel torch
two entries of a fragment are swapped
- const int u = u0 + lane / 4 + (e & 1) * 8;
+ const int u = u0 + lane / 4 + (e >> 1) * 8;
a pair is packed in the wrong order
- Factors::word(odd ? other : mine, odd ? mine : other)
+ Factors::word(odd ? mine : other, odd ? other : mine)
of two rows, a lane stores the other's
- store(at(first + i + odd)
+ store(at(first + i + !odd)
the last part of a sum is lost
- UNROLL for (int p = 0; p < P; ++p)
+ UNROLL for (int p = 0; p < P - 1; ++p)
backward, the weights are not transposed
- (Backward ? k : u)) * H + (Backward ? u : k)
+ u) * H + k
a gradient of three is counted twice
- UNROLL for (int k = 1; k < Count; ++k)
+ UNROLL for (int k = 0; k < Count; ++k)
float32: what TF32 loses of the states is not multiplied
- mma_tf32(sum, large_a, small_b);
+
the bias of n is left out of q
- q[i] = sum[2][i] + c(2, i);
+ q[i] = sum[2][i];
a row takes a step too many
- after[i] = t < length[i] ?
+ after[i] = t <= length[i] ?
a token is asked for a step too late
- look_up(step + 2);
+ look_up(step + 1);
the second direction's states are the first's
- const int states = direction * a.hidden * a.batch;
+ const int states = 0;
the backward direction is reset a step late
- const int at = t + a.reverse[direction];
+ const int at = t;
padding resets
- a.resets && at < length[i]
+ a.resets && row[i] >= 0 && at < a.steps
a sequence that begins with a row is not reset
- (anew ? a.h_reset : a.h0)
+ (a.h0)
a gradient crosses a reset
- d_h[i] = 0;
+
of a row's resets the last one's gradient is kept
- unit[i]] += d_h[i];
+ unit[i]] = d_h[i];
@ driver torch
driver: the blocks are no cluster
- config.numAttrs = instance->cluster > 1;
+ config.numAttrs = 0;
driver: a cluster of 16 is not asked for
- if (instance.cluster <= 8) return 0;
+ if (instance.cluster <= 16) return 0;
driver: rows that are no whole block get none
- ((call.batch + 7) / 8)
+ (call.batch / 8)
driver: shared memory is not asked for
- cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes)
+ CUresult(0)
@ driver jax
XLA: the gradient of h0 is where that of h_reset belongs
- call.d_h0 = floats(result(2)), call.d_h_reset = floats(result(3));
+ call.d_h0 = floats(result(3)), call.d_h_reset = floats(result(2));
@ torch torch
PyTorch: the directions are exchanged
- [*reverse, False][:2]
+ [False, *reverse][:2]
PyTorch: the bias within r * (...) has the gradient of the one outside
- d_n, gated = d_q, before
+ gated = before
@ jax jax
JAX: the units that there are not come first
- ((0, 0), (0, 0), (0, beyond), (0, beyond))
+ ((0, 0), (0, 0), (beyond, 0), (beyond, 0))
JAX: of steps with the same token one counts
- .add(d_a, mode="drop")
+ .set(d_a, mode="drop")
""")


def run(words: Sequence[str]) -> int:
    """As main of tests/planted_faults.py; only for faults in the driver a library is built."""
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder, ["-O0"])

        def prepare(copy: Path, fault: Fault | None) -> str:
            to = copy / "common/kernels"
            if library and not (fault and fault.file == FILES["driver"]):
                shutil.copy(library, to / LIBRARY)
                return ""
            code = f"from common.kernels.build import build; assert build({str(to)!r}, ['-O0'])"
            status, said = python(copy, "-c", code)
            return said if status else ""

        return main(words, FAULTS, prepare)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
