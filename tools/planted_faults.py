"""Plants faults in the CPU kernel and its bindings, one at a time; the tests must detect each.

    python -m tools.planted_faults          all of them, an hour and more on two cores
    python -m tools.planted_faults bias     those with "bias" in their names

A fault replaces one text in a copy of the working tree. The kernel is rebuilt if the fault is in
C++; with ccache in front of the compiler (PATH=/usr/lib/ccache:$PATH CCACHE_BASEDIR=/tmp
CCACHE_NOHASHDIR=1), only the affected parts are compiled. The exit status is 1 if the tests do not
detect a fault: a test is then missing. Faults of threads need two cores, and the fault of denormal
numbers in the input needs x86.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.kernels.build import build

ROOT = Path(__file__).parents[1]
JOBS = 2  # faults tried at the same time
FLAGS = ["-O1", "-fexpensive-optimizations"]
"""With -O3, the compiler takes twice as long; with -O1 alone, it fuses no products and sums, which
the tests notice."""
BUILD = (
    "-c",
    f"from common.kernels import build; exit(build.build(build.FOLDER, {FLAGS}) is None)",
)
"""Arguments of Python that build the kernel of a copy of the working tree."""
PACKAGES = ("torch_impl", "jax_impl", "common")
# Threads of NumPy and PyTorch would slow down the other job, and the plugins of pytest, which these
# tests do not need, take two seconds to import.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_PLUGINS": "xdist.plugin",  # pyproject.toml sets an option of this plugin
    "PYTHONDONTWRITEBYTECODE": "1",
}
# Arguments of pytest. The tests of the kernel do not need conftest.py, which imports PyTorch.
KERNEL_TESTS = ("--noconftest", "tests/kernel/test_kernel.py")
TESTS = {
    "kernel": KERNEL_TESTS,
    "bindings": ("tests/kernel/test_fused.py",),
    # With the tests marked "long": only these detect three of the faults.
    "openmp": ("-m", "", "-k", "openmp_threads", "tests/kernel/test_fused.py"),
    "switch": ("-k", "switch", "tests/kernel/test_bfloat16.py"),
    "tiles": ("-k", "emulated or matrix_unit or tiles", "tests/kernel/test_bfloat16.py"),
    "arguments": ("tests/layers/test_arguments.py",),
    "memory": ("tests/kernel/test_changing_memory.py",),
    "derivatives": ("-k", "gradient_of_a_gradient", "tests/parity/test_derivatives.py"),
}
FAULT = r"^(\S+): (.*)\n((?:-.*\n?)+)((?:\+.*\n?)*)"


@dataclass(frozen=True)
class Fault:
    """`old` occurs once in `file`; with `new` in its place, `tests` have to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = KERNEL_TESTS


# A group begins with "@", the tests that detect its faults, and a title. A fault has a file (if it
# has no folder, of common/kernels), a name, and lines before (-) and after (+) the change.
TABLE = """
@ memory: Arrays that change during a call.
gru.cpp: tokens are read again from the caller's memory
- copy(problem.tokens, cells, at);
jax_impl/layers.py: an eager call in JAX reads NumPy arrays in place
- array = np.array(value)
+ array = np.asarray(value)
@ kernel: Sequences that begin within a row.
call.h: the backward direction starts anew a step late
- const int64_t begin = t + (d.reverse ? 1 : 0);
+ const int64_t begin = t;
call.h: padding resets the backward direction
- begin < p.steps && i < block.active[begin] && p.resets
+ begin < p.steps && p.resets
recurrence.h: a gradient crosses a reset
- dh[i * stride + u] = T(0);
+ dh[i * stride + u] += T(0);
recurrence.h: of a row's resets the last one's gradient is kept
- ((T *)d.d_h_reset)[block.row[i] * H + u] += dh[i * stride + u];
+ ((T *)d.d_h_reset)[block.row[i] * H + u] = dh[i * stride + u];
call.h: resets go back to zero
- return d.h_reset ? ((const T *)d.h_reset)[at] : T(0);
+ return T(0);
@ kernel: The ends of vectors, tiles, chunks and items.
vectors.h: a partial vector's store writes one element too many
- if (n >= Simd<T>::width) return store(p, v);
+ if (n >= Simd<T>::width - 1) return store(p, v);
vectors.h: a partial vector of six loses one
- for (int64_t i = 0; i < n; ++i) v[i] = p[i];
+ for (int64_t i = 0; i < n - (n == 6); ++i) v[i] = p[i];
products.h: rows that do not come out even on the tiles are lost
- const int64_t row = M * i / tiles, next = M * (i + 1) / tiles;
+ const int64_t row = M / tiles * i, next = M / tiles * (i + 1);
products.h: a tile of two rows reads the first twice at an odd end
- const E x = Transposed ? a[k * lda + i] : a[i * lda + k];
+ const E x = Transposed ? a[k * lda] : a[i * lda + k];
schedule.h: rows an even number of vectors apart overlap
- return (n / width | 1) * width + n % width;
+ return (n / width - 1 | 1) * width + n % width;
recurrence.h: a full chunk of whole items counts twice
-     gathered += rows;
+     gathered += rows;
+     if (gathered == call.chunk && rows == 16)
+       add_recurrent_gradients<E, Cell>(call, block, scratch, gathered);
recurrence.h: a chunk may have a row too many
- if (gathered + rows > call.chunk) {
+ if (gathered + rows > call.chunk + 1) {
recurrence.h: a full chunk's last row is missing from the bias's gradient
- for (int64_t i = 0; i < rows; ++i) sum += load(g + i * gates + u);
+ for (int64_t i = 0; i < (rows < 64 ? rows : 63); ++i) sum += load(g + i * gates + u);
@ kernel: The ends of parts of the input product.
input_product.h: inputs that do not come out even on the parts of a long product are lost
- const int64_t k = K * i / parts, end = K * (i + 1) / parts;
+ const int64_t k = K / parts * i, end = K / parts * (i + 1);
input_product.h: every part of a long product begins anew
- i ? c : from, i ? ldc : ld_from,
+ from, ld_from,
schedule.h: rows of x that do not come out even on the parts are lost
- parts.push_back({direction, rows * i / down, rows * (i + 1) / down,
+ parts.push_back({direction, rows / down * i, rows / down * (i + 1),
schedule.h: panels that do not come out even on the parts are lost
- panels * j / across,
-                          panels * (j + 1) / across, nullptr});
+ panels / across * j,
+                          panels / across * (j + 1), nullptr});
input_product.h: a chunk of a single row is missing from the gradients of W and b
- for (int64_t k = 0; k < call.live; k += chunk_rows) {
+ for (int64_t k = 0; k + (k > 0) < call.live; k += chunk_rows) {
input_product.h: the gradient of b is that of the last chunk
- store(bias + u, load(bias + u) + (sum[0] + sum[1]));
+ store(bias + u, sum[0] + sum[1]);
execution.h: the last of 129 rows is not packed for the gradient of W
- kernels.pack_inputs(call, i * piece, up_to(i * piece, call.live));
+ kernels.pack_inputs(call, i * piece,
+                                    up_to(i * piece, call.live - (call.live % piece == 1)));
packing.h: the last number of an odd row of x is not packed
- store_rows(at, row + u, next ? next + u : next, D - u);
+ store_rows(at, row + u, next ? next + u : next, D - u - (D - u - V == 1));
@ kernel: The input's weights and biases.
packing.h: the gates of W are taken to be whole vectors apart
- weights + (rows_of(call, gate) + u) * D, sign_of(call, gate)
+ weights + (gate < 2 ? rows_of(call, gate) + u : 3 * H - Hv + u) * D,
+                    sign_of(call, gate)
packing.h: backward, the last unit of each gate of W is the first of the next
- const T *from = weights + (row / Hv * H + row % Hv) * D + u;
+ const T *from = weights + (row / Hv * H + (row % Hv + 1) % H) * D + u;
packing.h: the recurrent biases of z and r are added twice
- gate == call.cell.separate_gate ? input : input + hidden;
+ gate == call.cell.separate_gate ? input
+                           : gate < 2 ? input + hidden + hidden : input + hidden;
packing.h: with the reset after the product, n's recurrent bias is outside it, too
- gate == call.cell.separate_gate ? input : input + hidden;
+ input + hidden;
@ kernel: Projections of a few steps at a time.
execution.h: a thread that shares a row block reads projections that it has not computed
- return !backward && !shares_steps() &&
+ return !backward &&
execution.h: the backward direction projects the first steps first
- if (directions[block.direction].reverse)
+ if (false)
execution.h: the rows before the projected steps are those of the first steps
- own.projected_before = block.before[steps.from];
+ own.projected_before = block.before[0];
call.h: the projections of one row block replace those of another
- (all ? block.live_before : -own.projected_before)
+ (all ? 0 : -own.projected_before)
input_product.h: the projected steps are those of other rows of the batch
- part.block->row[j]) * p.inputs, p.inputs);
+ j) * p.inputs, p.inputs);
schedule.h: a row block counts the rows of the blocks before without the last step
- live_before += own.before[p.steps];
+ live_before += own.before[p.steps - (p.steps > 0)];
@ kernel: Which rows of x are read.
schedule.h: with tokens, rows of x that no step reads count as read
- bool ragged = p.tokens;
+ bool ragged = false;
schedule.h: without tokens, padded rows of x count as read
- !ragged && p.lengths; ++b) ragged = p.lengths[b] < p.steps;
+ !ragged && p.lengths; ++b) ragged = p.lengths[b] + 1 < p.steps;
schedule.h: a row of x that is read has the place of the one before
- place[row] = (int64_t)live_rows.size();
+ place[row] = (int64_t)live_rows.size() - (live_rows.size() > 100);
call.h: the first rows of x are taken for those that are read
- return (const T *)call.problem->x + live_row(call, i) * call.problem->inputs;
+ return (const T *)call.problem->x + i * call.problem->inputs;
input_product.h: the gradients of the rows of x that are read come first
- store((T *)call.problem->d_x + live_row(call, part.from + i) * D + u + j,
+ store((T *)call.problem->d_x + (part.from + i) * D + u + j,
execution.h: the last row of x has no gradient where no step reads it
- memset(p.d_x, 0, p.distinct * D * sizeof(T));
+ memset(p.d_x, 0, (p.distinct - 1) * D * sizeof(T));
@ kernel: Ragged rows.
schedule.h: a row that ends a step before the others does not
- p.lengths[own.row[remaining - 1]] <= t) --remaining;
+ p.lengths[own.row[remaining - 1]] <= t - (t + 1 == p.steps)) --remaining;
recurrence.h: outputs are not zero at a step that no row of the item has
- if (task.first_phase == 0) keep_ended_rows
+ if (task.first_phase == 0 && rows) keep_ended_rows
recurrence.h: an empty row has no gradient of h0
- block.row[i] * H + u, load(dh + i * stride + u), H - u);
+ block.row[i] * H + u,
+             p.steps && i >= block.active[0] ? Vector<T>{} : load(dh + i * stride + u), H - u);
recurrence.h: in reverse, the first step's record is another's
- const int64_t records = block.first * p.steps + t * block.rows;
+ const int64_t records =
+         block.first * p.steps + (t - (d.reverse && t && t + 1 == p.steps)) * block.rows;
execution.h: in reverse, with the reset after the product, h_last is a step old
- state_of(all, p.steps) +
+ state_of(all, p.steps - (p.reset_after && directions[block.direction].reverse && p.steps)) +
cell_gru.h: where no backward follows, the reset comes after the product
- units.set_operand(reset * state);
-       units.save(
+ units.set_operand(units.record ? reset * state : state);
+       units.save(
@ kernel: Threads that take turns at a step.
execution.h: nobody waits for the others' units
- if (Pool::wait([&] { return progress.done >= before * tasks; })) progress.busy = true;
execution.h: r * h is not waited for
- progress.done >= before * tasks;
+ progress.done >= before / parts * parts * tasks;
recurrence.h: a row that has ended goes back by a step
- step.after[i * stride + u] = step.h[i * stride + u];
recurrence.h: a unit is not reset
- for (int64_t u = task.from; u < task.to && u < H; ++u)
-         step.after[
+ for (int64_t u = task.from; u < task.to && u < H - 1; ++u)
+         step.after[
@ kernel: Two directions, many blocks.
recurrence.h: the second direction's bias gradient is that of the first of more than four blocks
- i < call.blocks; ++i) sum += ((const T *)row_blocks[i].d_bias)[padded];
+ i < (direction && call.blocks > 4 ? 1 : call.blocks); ++i)
+       sum += ((const T *)row_blocks[i].d_bias)[padded];
recurrence.h: the weights' gradient lacks the last of more than eight blocks
-         sum += load((const T *)row_blocks[i].d_weights + padded
+         if (i < 8 || i + 1 < call.blocks)
+           sum += load((const T *)row_blocks[i].d_weights + padded
recurrence.h: the second direction's token gradients lack the last of more than eight blocks
- if (row_blocks[i].slot[token] >= 0)
+ if (row_blocks[i].slot[token] >= 0 && (!direction || i < 8 || i + 1 < call.blocks))
execution.h: large weights of the second direction are those of the first
- kernels.pack_weights(from, direction, backward);
+ kernels.pack_weights(from, pack_threads > 1 ? 0 : direction, backward);
execution.h: large input weights of the second direction are those of the first
- kernels.pack_input_weights(from, direction, backward);
+ kernels.pack_input_weights(from, pack_threads > 1 ? 0 : direction, backward);
input_product.h: the second direction's gradient of b is written over the first's
- ((T *)d.d_bias_ih)[row] = bias[i];
+ ((T *)call.directions->d_bias_ih)[row] = bias[i];
input_product.h: the gradient of x is that of the first direction alone
- for (int direction = 0; direction < call.problem->directions; ++direction)
-       long_product
+ for (int direction = 0; direction < 1; ++direction)
+       long_product
@ kernel: Tokens.
execution.h: the last token of 129 has no gradient
- const int64_t of_tokens = p.tokens ? of_rows : 0,
+ const int64_t of_tokens = p.tokens ? of_rows - (call.live % piece == 1) : 0,
schedule.h: tokens of one block are counted in 16 bits
- own.slot[k] = (int32_t)distinct[block]++;
+ own.slot[k] = (uint16_t)distinct[block]++;
recurrence.h: a token's gradient loses half a bit with each addition
- store(to + u, load(to + u) + load(from + u));
+ store(to + u, (load(to + u) + load(from + u)) *
+                   (T(1) - T(1) / (T(2) * (int64_t(1) << Simd<T>::mantissa))));
@ kernel: Memory that is used again.
execution.h: the weights' gradient is added to an earlier call's
- memset(block.d_weights, 0, call
+ memset(block.d_weights, 0, 0 * call
execution.h: the bias's gradient is added to an earlier call's
- memset(block.d_bias, 0, call
+ memset(block.d_bias, 0, 0 * call
execution.h: a token's gradient is added to an earlier call's in all threads but the caller's
- memset(block.d_projections, 0,
+ if (own.h == scratch[0].h) memset(block.d_projections, 0,
input_product.h: the gradient of W is added to that of another part
- for (int64_t i = 0; i < rows * width; i += V) store(sums + i, Vector<T>{});
+ for (int64_t i = V; i < rows * width; i += V) store(sums + i, Vector<T>{});
input_product.h: a part of the gradient of W begins with the first column
- store((T *)d.d_weight_ih + row * D + part.first * 2 * V + u,
+ store((T *)d.d_weight_ih + row * D + u,
input_product.h: a part of the gradient of W begins with the first row
- const T *g = (const T *)call.projections[part.direction] + part.from;
+ const T *g = (const T *)call.projections[part.direction];
execution.h: how many rows a part of the gradient of W has hangs on the threads
- gradient_rows, most, 2 * product_threads),
+ gradient_rows / (product_threads > 1 ? 48 : 1), most),
input_product.h: the gradient of x is added to that of another part
- direction ? sums : zeros, direction ? 2 * V : 0,
+ sums, 2 * V,
execution.h: backward's gradients of the candidates share memory with its sums
- s.between[0] = arena.take<T>(states);
+ s.between[0] = arena.take<T>(forward_only);
gru.cpp: memory that could not be had is not reported
- return GRU_OUT_OF_MEMORY;
+ return GRU_OK;
@ kernel: Weights that were packed before.
execution.h: what is kept is packed from the caller's weights, which another thread changes
- from.directions = sources;
+ from.directions = directions;
execution.h: changed weights are taken for those of an earlier call
- packed_before[direction] = false, changed = true;
+ packed_before[direction] = false;
execution.h: changes of a second piece of the weights are not seen
- verify((int)j / 2, (int)j % 2);
+ verify((int)j / 2, 0);
execution.h: where threads take turns, one piece of the weights is looked at
- j < (verifier + 1) * pieces
+ j < verifier * pieces + 1
execution.h: weights in nn.GRU's order are taken for canonical ones packed before
- p.reset_after, p.nn_order, kernels
+ p.reset_after, kernels
packing.h: two changes of sign are no change of a fingerprint
- hash[s] ^= hash[s] >> 15;
call.h: in nn.GRU's order, the update gate is not turned round
- return call.problem->nn_order ? call.cell.nn_sign[gate] : 1;
+ return 1;
@ kernel: Threads and processes.
execution.h: one thread computes a long recurrence
- share(states + verified * 8, worth_multiplying)
+ share(verified * 8, worth_multiplying)
execution.h: all threads go forward in one thread's memory
- walk_forward(row_blocks[i], scratch[thread], scratch[thread], own, 1, true);
+ walk_forward(row_blocks[i], scratch[thread], scratch[0], own, 1, true);
execution.h: all threads go backward in one thread's memory
- walk_backward(i, scratch[thread]);
+ walk_backward(i, scratch[0]);
execution.h: all threads multiply in one thread's memory
- product(call, scratch[thread], parts[i]);
+ product(call, scratch[thread * 0], parts[i]);
threads.h: of OpenMP's threads, those end that have no work
- std::max(team, helpers + 1)
+ helpers + 1
threads.h: all threads of OpenMP work in one thread's memory
- const int thread = its.arrived++;
+ const int thread = its.arrived.load();
execution.h: two calls at once share their memory
- pool(Pool::lock(threads)),
-         lock(pool.in_use, std::adopt_lock),
+ pool(Pool::get()),
+         lock(*new std::mutex),
threads.h: a forked child waits for its parent's threads
- new (place) Pool; });
+ });
threads.h: a forked child waits for its parent's OpenMP threads
- pthread_atfork(end_openmp_threads,
+ pthread_atfork(nullptr,
@ kernel: Numbers and instruction sets.
threads.h: denormal numbers count where they come in
- _mm_setcsr(before | 0x8040);
+ _mm_setcsr(before | 0x8000);
threads.h: denormal numbers count in all threads but the caller's
- const FlushDenormals flush_denormals;
+ std::unique_ptr<FlushDenormals> flush_denormals(thread ? nullptr : new FlushDenormals);
vectors.h: gates are never closer to 0 than e^-80
- exp_low = -87.f, exp_high = 89.f,
+ exp_low = -87.f, exp_high = 80.f,
vectors.h: e^x in double precision is a few bits short
- bias = 1023, degree = 13;
+ bias = 1023, degree = 11;
vectors.h: a quotient is as precise as its estimate
- _mm512_maskz_fmadd_ps(is_finite, error, estimate, q);
+ _mm512_maskz_mov_ps(is_finite, q);
vectors.h: a quotient by infinity is not a number
- _mm512_maskz_fmadd_ps(is_finite, error, estimate, q);
+ _mm512_fmadd_ps(error, estimate, q);
vectors.h: a quotient by what is not a number is 0
- _CMP_NEQ_UQ
+ _CMP_LT_OQ
vectors.h: with AVX-512, a partial vector of six loses one
- n > 0 ? (1 << n) - 1 : 0
+ n > 0 ? (1 << (n - (n == 6))) - 1 : 0
gru.cpp: a negative length is let in
-     if (!in_range(problem.lengths, B, problem.steps))
+     bool longer = false;
+     for (int64_t b = 0; problem.lengths && b < B; ++b)
+       longer |= problem.lengths[b] > problem.steps;
+     if (longer)
gru.cpp: an instruction set asked for is named, not taken
- chosen = set;
+ return set->name;
gru.cpp: an unknown instruction set changes the choice
-     if (!set) return nullptr;
-     chosen = set;
+     chosen = set;
+     if (!set) return nullptr;
@ kernel: The tanh RNN.
cell_rnn.h: the gradient of the tanh is that at the state before
- const Vector<T> state = units.saved(1);
+ const Vector<T> state = units.saved(0);
cell_rnn.h: the gradient passes a step without a product
- units.set_d_state(Vector<T>{});
+ units.set_d_state(d);
cells.h: another cell is computed in its place
-     {cell<E, Rnn>, cell<E, Rnn>},
+     {cell<E, Gru<false>>, cell<E, Gru<true>>},
@ bindings: The bindings: what the kernel is told.
torch_impl/fused.py: PyTorch: every cell is the GRU
- cell=kernels.cell_index(call.cell),
+ cell=0,
jax_impl/fused.py: JAX: every cell is the GRU
- np.int32(kernels.cell_index(call.cell)),
+ np.int32(0),
torch_impl/fused.py: PyTorch: the second direction writes over the first's outputs
- direction.outputs = offset(pointer(outputs), i * row)
+ direction.outputs = offset(pointer(outputs), 0)
torch_impl/fused.py: PyTorch: the second direction's last states lie a row too early
- direction.h_last = offset(pointer(h_last), state)
+ direction.h_last = offset(pointer(h_last), i * (problem.batch - 1) * row)
torch_impl/fused.py: PyTorch: the second direction's biases are those of the first
- address(f"{name}[{i}]", each, (rows,), h0.dtype)
+ address(f"{name}[{i}]", call.weights[0][3], (rows,), h0.dtype)
tensors.cpp: PyTorch, at once: the shape is not looked at
- tensor.shape[k] == shape.begin()[k] &&
+ true &&
tensors.cpp: PyTorch, at once: nor distances in memory
- || tensor.strides[k] == distance)
+ || true)
tensors.cpp: PyTorch, at once: nor how wide a number is
- tensor.bits == bits &&
+ true &&
tensors.cpp: PyTorch, at once: float16 is read as float32
- x.bits != 64 || bfloat16
+ x.bits != 64 && bfloat16
tensors.cpp: PyTorch, at once: states of the first layer for all
- (layer * R + i) * B * row
+ i * B * row
tensors.cpp: PyTorch, at once: one direction's states for both
- (layer * R + i) * B * row
+ layer * R * B * row
tensors.cpp: PyTorch, at once: anew from h0
- h_reset ? h_reset + state : nullptr
+ d.h0
tensors.cpp: PyTorch, at once: both directions write the same outputs
- outputs + i * row
+ outputs
xla.cpp: JAX: the gradient of bias_ih is written where that of bias_hh belongs
- d.d_bias_ih = result(2 * R + i).untyped_data();
+ d.d_bias_ih = result(3 * R + i).untyped_data();
xla.cpp: JAX: the second direction writes over the first's outputs
- (char *)outputs.untyped_data() + i * H * size
+ (char *)outputs.untyped_data() + 0 * i * H * size
xla.cpp: JAX: the last result is not NaN where a token points nowhere
- status != GRU_OK && i < call.of_results; ++i)
+ status != GRU_OK && i + 2 < call.of_results; ++i)
@ arguments: The bindings: what the kernel is told.
torch_impl/fused.py: PyTorch: the number of rows of the weights is not validated
- each, (rows, columns), dtype)
+ each, (len(each), columns), dtype)
torch_impl/fused.py: PyTorch: the number of columns of the weights is not validated
- each, (rows, columns), dtype)
+ each, (rows, each.shape[-1]), dtype)
torch_impl/memory.py: PyTorch: an array that is not contiguous is taken as if it were
- if array.device != device or not array.is_contiguous() or array.is_neg():
+ if array.device != device or array.is_neg():
torch_impl/layers.py: PyTorch: lengths beyond 32 bits are cut
- if not checks or lengths.dtype != torch.int32:
+ if not checks:
xla.cpp: JAX: the shape of h0 is not looked at
- {"h0", backward ? result(4 * R + 1) : arg(4 * R + 1), of_states, type},
+ {"h0", x, of_x, type},
xla.cpp: JAX: the shape of x is not looked at
- {"x", x, of_x, type},
+ {"x", lengths, {B}, ffi::S32},
xla.cpp: JAX: a row out of range begins from numbers
- 0xff, row);
+ 0, row);
xla.cpp: JAX: all rows begin from NaN
- if (wrong) rows
+ rows
xla.cpp: JAX: of a row out of range, a token is not mended
- token = 0, wrong
+ wrong
jax_impl/fused.py: JAX: derivatives of a row out of range are numbers
- mended(*primals), tangents
+ primals, tangents
jax_impl/layers.py: JAX: a length out of range passes under jit
- s + jnp.where(rows[:, None], jnp.nan, 0) for s in states
+ s + jnp.where(rows[:, None], 0, 0) for s in states
@ tiles: The matrix unit, emulated.
tiles.h: tiles: an incomplete last tile reads what lies behind it
- const bool last = k + tile_pairs > K, odd
+ const bool last = false, odd
tiles.h: tiles: the second block's last tile along K is another one
- two_blocks ? tile_rows * left_ld : 0
+ two_blocks ? tile_rows * lda : 0
tiles.h: tiles: the last rows are computed as a whole block
- two_blocks ? rows - tile_rows : rows);
+ tile_rows);
tiles.h: tiles: the last rows are computed with the configuration of those before
- if (configured[0] == rows && configured[1] == others) return;
+ if (configured[0]) return;
tiles.h: tiles: of the configuration, the second block's rows do not count
- if (configured[0] == rows && configured[1] == others) return;
+ if (configured[0] == rows) return;
tiles.h: tiles: a task takes the tiles to be as an earlier one has left them
- _tile_release(), configured[0] = 0;
+ _tile_release();
tiles.h: tiles: they are not released
- _tile_release(), configured[0] = 0;
+ configured[0] = 0;
execution.h: tiles: a work item does not release them
- item(i, thread);
-       kernels.release_tiles();
+ item(i, thread);
gru.cpp: tiles: a processor whose only bfloat16 is that of the tiles is said to have none
- return find_instruction_set("avx512bf16") || find_instruction_set("amx");
+ return find_instruction_set("avx512bf16") != nullptr;
tiles.h: tiles: of the two sums of a block the second is lost
- store(sum, load(sum) + load(others[half] + j * n));
+ store(sum, load(sum));
tiles.h: tiles: a transposed block of pairs is not swapped
- high = low + s;
+ high = low;
tiles.h: tiles: the last of an odd number of rows is missing from gradients
- row < K ? at : nullptr,
+ row + 1 < K ? at : nullptr,
gru.cpp: tiles: they are used where Linux refuses them
- !syscall(SYS_arch_prctl, 0x1023, 18);
+ (syscall(SYS_arch_prctl, 0x1023, 18), true);
@ switch: The frameworks' own switch of bfloat16.
torch_impl/fused.py: PyTorch: the frameworks' switch is not read
- in_bfloat16 or lowered(dtype),
+ in_bfloat16,
jax_impl/fused.py: JAX: the framework's switch is not read
- if not gpu and lowered(h0.dtype):
+ if False:
@ openmp: The threads of PyTorch's OpenMP runtime.
threads.h: PyTorch, at once: OpenMP's threads whether they spin or not
- before.tv_nsec !=
+ 0 <=
execution.h: PyTorch, at once: never OpenMP's
- GRU_ALWAYS || is_spinning ?
+ GRU_ALWAYS ?
threads.h: PyTorch, at once: OpenMP's of a thread that has none
- number() == getpid() &&
threads.h: PyTorch, at once: OpenMP's of a parent
- threads.st_nlink > 3 + workers.size()
+ true
threads.h: PyTorch, at once: nobody knows of a fork before the first call
- &first = Pool::get()
+ *first = 0
@ derivatives: The bindings: what the kernel is told.
torch_impl/fused.py: PyTorch: a second derivative is that of the other reset
- function = partial(gradients_of, by_scan(tokens, lengths, resets, ctx.flags))
+ flags = (not ctx.flags[0], *ctx.flags[1:])
+         function = partial(gradients_of, by_scan(tokens, lengths, resets, flags))
"""


def faults(table: str) -> list[Fault]:
    """The faults of a table in the notation of TABLE."""
    return [
        Fault(name, file if "/" in file else f"common/kernels/{file}", *sides, TESTS[tests])
        for group in table.split("\n@ ")[1:]
        for tests in [group.partition(":")[0]]
        for file, name, *parts in re.findall(FAULT, group, re.MULTILINE)
        for sides in [["\n".join(line[2:] for line in part.splitlines()) for part in parts]]
    ]


FAULTS = faults(TABLE)


@dataclass(frozen=True)
class Outcome:
    found_by: str  # the first test that failed; empty if all passed
    seconds: float
    error: str = ""  # the reason if the outcome is unknown


def copy_tree(to: Path) -> None:
    """Copy the working tree without ignored files."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def plant(fault: Fault, tree: Path) -> None:
    path = tree / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: in {fault.file} {text.count(fault.old)} times, not once")
    path.write_text(text.replace(fault.old, fault.new))


def try_out(fault: Fault | None, tests: Sequence[str], library: Path) -> Outcome:
    """Test a copy of the working tree, with a fault or without. library: the kernel without one."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted-fault-") as name:
        copy = Path(name).resolve()
        copy_tree(copy)
        if fault:
            plant(fault, copy)
        shutil.copy(library, copy / "common/kernels")
        if fault and fault.file.endswith((".cpp", ".h")):
            status, output = python(copy, *BUILD)
            if status:
                return Outcome("", time.monotonic() - begin, f"not built:\n{output}")
        # The packages must be those of the copy, not installed ones.
        where = f"[find_spec(name).origin for name in {PACKAGES}]"
        status, output = python(copy, "-c", f"from importlib.util import *; print(*{where})")
        if status or not all(Path(each).is_relative_to(copy) for each in output.split()):
            return Outcome("", time.monotonic() - begin, f"not the copy's packages:\n{output}")
        status, output = python(copy, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *tests)
    result = re.search(r"^FAILED (\S.*?)(?: - .*)?$", output, re.MULTILINE)
    error = (
        "" if status == bool(result) else f"pytest ended with status {status}:\n{output[-2000:]}"
    )
    return Outcome(result[1] if result else "", time.monotonic() - begin, error)


def python(
    folder: Path,
    *arguments: str,
    environment: dict[str, str] = ENVIRONMENT,
    seconds: float | None = 600,
) -> tuple[int, str]:
    """Exit status and output of Python in a copy of the tree."""
    own = {"PYTHONPATH": str(folder), "GRU_TWINS_CACHE": str(folder / "cache")}
    try:
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | own | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return -1, f"{late}"
    return result.returncode, result.stdout


def main(words: Sequence[str], faults: Sequence[Fault] = FAULTS) -> int:
    """Test the faults whose names contain one of the words, or all. Returns the exit status."""
    faults = [f for f in faults if not words or any(word in f.name for word in words)]
    if not faults:
        print("no fault has a name like that")
        return 1
    begin = time.monotonic()
    missed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        library = build(folder, FLAGS)
        if library is None:
            return 1
        for tests in dict.fromkeys(fault.tests for fault in faults):
            fine = try_out(None, tests, library)
            if fine.found_by or fine.error:
                print(f"without a fault: {fine.error or fine.found_by}")
                return 1
            print(f"without a fault, {tests[-1]} passes ({fine.seconds:.0f} s)", flush=True)
        outcomes = pool.map(lambda fault: try_out(fault, fault.tests, library), faults)
        for fault, outcome in zip(faults, outcomes, strict=True):
            result = outcome.error or outcome.found_by or "NOT FOUND"
            print(f"{fault.name} ({outcome.seconds:.0f} s)\n    {result}", flush=True)
            missed += bool(outcome.error) or not outcome.found_by
    took = time.monotonic() - begin
    print(f"{len(faults) - missed} of {len(faults)} found, {took:.0f} s in all")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
