"""Makes thousands of valid and invalid calls of the GRU on a kernel with AddressSanitizer.

A valid call must return the results and gradients of common/oracle.py; with products in bfloat16,
those of the oracle that rounds their factors. The kernel's matrix unit (AMX) is emulated, so every
processor with AVX-512 can run it. An invalid call must raise ValueError or TypeError and name the
argument. A valid call is then repeated while another thread writes to the memory of its indices and
initial states: any result or error is accepted, but no read of other memory.

A call depends on its seed and number alone. A child process makes the calls and reports each one
before it begins, so that a crash or a hang counts as a failure and another process continues.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
from tyro.conf import Positional

from common import kernels, oracle
from common.errors import InputError
from common.kernels.build import build, compiler
from common.params import DIRECTIONS, GRU_PARAMETERS
from tools import emulation
from tools.fuzz_gru_calls import FLOATS, VOCABULARY, Array, Call, draw, is_float
from tools.fuzz_gru_frameworks import FRAMEWORKS, Framework
from tools.program import run_program
from tools.rounding_oracle import product, rounding_oracle

# The tolerance: a share of the array's largest value, plus an absolute error.
RELATIVE = {"float32": 1e-6, "float64": 2e-15, "bfloat16": 2**-8, "float16": 2**-11}
ABSOLUTE = {"float32": 1e-6, "float64": 2e-15, "bfloat16": 1e-6, "float16": 1e-6}
MAX_CRASHES = 50  # after which the program stops
TIMEOUT = 300  # seconds without a report after which a process counts as hung


def expected_results(call: Call) -> dict[str, Array]:
    """The results of a valid call by name, and the gradients by d_ and the name of the array."""
    arrays = {n: v.astype(np.float64) if is_float(v) else v for n, v in call.reference.items()}
    compute = operator_results if call.operator else layer_results
    results, gradients = compute(call, arrays)
    if call.entry == "backward":
        return gradients
    expected = {f"d_{name}" for name in call.arrays if name not in call.frozen}
    return results | {name: value for name, value in gradients.items() if name in expected}


def oracle_of(call: Call) -> Any:
    """The oracle, or the one with products in bfloat16."""
    return rounding_oracle(call.K is None) if call.options.get("bfloat16") else oracle


def oracle_inputs(call: Call, parameters: dict, rows: Array, arrays: dict) -> tuple[dict, Array]:
    """The parameters and the inputs [T, B, D] of the oracle, for inputs or for rows and tokens.

    With tokens, products in bfloat16 round the gradients of rows, not those of words. Therefore,
    the inputs are one-hot vectors of rows, and the weights are the product of the rows.
    """
    if call.K is None:
        return parameters, rows
    if not call.options.get("bfloat16"):
        return parameters, rows[arrays["tokens"]]
    projected = {n: product(rows, W.T).T for n, W in parameters.items() if n.endswith("weight_ih")}
    return parameters | projected, np.eye(call.K)[arrays["tokens"]]


def gradient_of_rows(
    call: Call, parameters: dict, rows: Array, arrays: dict, gradients: dict[str, Array]
) -> Array:
    """The gradient of the inputs or rows; removes the gradient of x from `gradients`."""
    d_x = gradients.pop("x")
    if call.K is None:
        return d_x
    if not call.options.get("bfloat16"):
        return scatter(arrays["tokens"], d_x, call.K)
    d_rows = np.zeros_like(rows)
    for name in (each for each in parameters if each.endswith("weight_ih")):
        d_projected = gradients[name]
        gradients[name] = product(d_projected, rows)
        d_rows += product(d_projected.T, parameters[name])
    return d_rows


def layer_results(call: Call, arrays: dict[str, Array]) -> tuple[dict, dict]:
    distinct = arrays["vectors"][arrays["distinct"]] if call.entry == "classify" else arrays["x"]
    if call.entry == "GRU":
        distinct = distinct.swapaxes(0, 1)
    parameters = {name: value for name, value in arrays.items() if name.startswith("gru.")}
    weights, x = oracle_inputs(call, parameters, distinct, arrays)
    reset_after = call.options["reset_after"]
    resets = arrays.get("resets")
    resets = resets.T if call.entry == "GRU" and resets is not None else resets
    states = arrays.get("h0"), resets, arrays.get("h_reset")
    module = oracle_of(call)
    run = module.forward(weights, x, arrays["lengths"], *states, reset_after=reset_after)
    results = {"outputs": run.outputs, "h_last": run.h_last}
    d_outputs, d_h_last = arrays.get("d_outputs"), arrays.get("d_h_last")
    gradients = {}
    if call.entry == "classify":
        features = np.concatenate(list(run.h_last[-call.R :]), -1)
        active, weight, d_logits = (
            np.maximum(features, 0),
            arrays["head.weight"],
            arrays["d_logits"],
        )
        results = {"logits": active @ weight.T + arrays["head.bias"]}
        gradients = {"d_head.weight": d_logits.T @ active, "d_head.bias": d_logits.sum(0)}
        d_outputs, d_h_last = np.zeros_like(run.outputs), np.zeros_like(run.h_last)
        d_h_last[-call.R :] = np.split(d_logits @ weight * (features > 0), call.R, -1)
    elif call.entry == "GRU":
        results["outputs"], d_outputs = (a.swapaxes(0, 1) for a in (run.outputs, d_outputs))
    elif not call.options["return_sequences"]:
        results["outputs"], d_outputs = run.outputs[:0], np.zeros_like(run.outputs)
    if not call.gradients:
        return results, {}
    oracle_gradients = module.backward(run, d_outputs, d_h_last)
    if "h_reset" not in arrays:  # h0 is also the state after a reset
        oracle_gradients["h0"] = oracle_gradients["h0"] + oracle_gradients["h_reset"]
    d_x = gradient_of_rows(call, parameters, distinct, arrays, oracle_gradients)
    if call.entry == "classify":
        oracle_gradients["vectors"] = scatter(arrays["distinct"], d_x, VOCABULARY)
    else:
        oracle_gradients["x"] = d_x.swapaxes(0, 1) if call.entry == "GRU" else d_x
    return results, gradients | {f"d_{name}": value for name, value in oracle_gradients.items()}


def operator_results(call: Call, arrays: dict[str, Array]) -> tuple[dict, dict]:
    H, return_sequences = call.H, call.options["return_sequences"]
    outputs, h_last = np.zeros((call.T, call.B, call.R * H)), np.zeros_like(arrays["h0"])
    gradients: dict[str, Array] = {}
    for i, side in enumerate(map(int, call.options["reverse"])):
        # The oracle computes both directions; one of them is used.
        parameters = {
            f"gru.0.{direction}.{name}": arrays[f"{name}.{i}"]
            for direction in DIRECTIONS
            for name in GRU_PARAMETERS
        }
        weights, x = oracle_inputs(call, parameters, arrays["x"], arrays)
        h0 = np.stack([arrays["h0"][i]] * 2)
        reset_after = call.options["reset_after"]
        resets = arrays.get("resets")
        h_reset = None if resets is None else np.stack([arrays["h_reset"][i]] * 2)
        states = h0, resets, h_reset
        module = oracle_of(call)
        run = module.forward(weights, x, arrays["lengths"], *states, reset_after=reset_after)
        own_columns, columns = slice(side * H, side * H + H), slice(i * H, i * H + H)
        outputs[..., columns], h_last[i] = run.outputs[..., own_columns], run.h_last[side]
        if call.entry == "forward" and not call.gradients:
            continue
        d_outputs, d_h_last = np.zeros_like(run.outputs), np.zeros_like(h0)
        d_h_last[side] = arrays["d_h_last"][i]
        if return_sequences:
            d_outputs[..., own_columns] = arrays["d_outputs"][..., columns]
        oracle_gradients = module.backward(run, d_outputs, d_h_last)
        for name in ("h0", "h_reset")[: 1 if resets is None else 2]:
            gradients.setdefault(f"d_{name}", np.zeros_like(h_last))[i] = oracle_gradients[name][
                side
            ]
        d_x = gradient_of_rows(call, parameters, arrays["x"], arrays, oracle_gradients)
        gradients["d_x"] = gradients.get("d_x", 0) + d_x
        for name in GRU_PARAMETERS:
            gradients[f"d_{name}.{i}"] = oracle_gradients[f"gru.0.{DIRECTIONS[side]}.{name}"]
    if call.entry == "backward" and not call.options["of_x"]:
        gradients["d_x"] = np.zeros(0)
    return {"outputs": outputs if return_sequences else outputs[:0], "h_last": h_last}, gradients


def scatter(index: Array, values: Array, rows: int) -> Array:
    """The gradient of an array from the gradients of the rows that were gathered from it."""
    array = np.zeros((rows, values.shape[-1]))
    np.add.at(array, index, values)
    return array


def find_error(call: Call, results: dict[str, Array]) -> str:
    """The difference from the expected results in one line; empty if there is none."""
    for name, array in expected_results(call).items():
        actual, expected = results[name], array
        if actual.shape != expected.shape or actual.dtype != FLOATS[call.dtype]:
            wanted = f"{call.dtype}{list(expected.shape)}"
            return f"{name} is {actual.dtype}{list(actual.shape)}, not {wanted}"
        if call.expect == "fake":
            continue
        actual = actual.astype(np.float64)
        if call.expect == "NaN":
            actual, expected, row = separate(call, name, actual, expected)
            if not np.isnan(row).all():
                return f"{name} has numbers where NaN is expected"
        if not np.isfinite(actual).all():
            return f"{name} has values that are not finite"
        kind = "bfloat16" if call.options.get("bfloat16") else call.dtype
        error, largest = np.abs(actual - expected).max(initial=0), np.abs(expected).max(initial=0)
        bound = RELATIVE[kind] * largest + ABSOLUTE[kind]
        if name.startswith("d_"):  # a sum over all words
            bound += ABSOLUTE[kind] * (call.T * call.B) ** 0.5
        if call.entry == "classify" and call.dtype.endswith("16"):
            # The head rounds each intermediate result.
            bound = 4 * RELATIVE[call.dtype] * max(largest, 1)
        if error > bound:
            return f"{name} has an error of {error:.1e}; the bound is {bound:.1e}"
    return ""


def separate(call: Call, name: str, actual: Array, expected: Array) -> tuple[Array, Array, Array]:
    """The results and the expected results without the row that has the invalid value; that row."""
    if call.row is None:
        return actual[:0], expected[:0], actual
    batch = {"logits": 0, "h_last": 1, "outputs": 0 if call.entry == "GRU" else 1}[name]
    row = np.take(actual, call.row, batch)
    if name == "outputs":  # an invalid length does not tell which steps are words
        row = row[: call.reference["lengths"][call.row] if call.changes[-1][0] == "tokens" else 0]
    return *(np.delete(each, call.row, batch) for each in (actual, expected)), row


def attempt(call: Call, framework: Framework, show: bool) -> tuple[str, str]:
    """Make a call; return its outcome (valid, raised or failed) and the problem, if any."""
    try:
        results = framework.run(call)
    except Exception as error:
        if show:
            traceback.print_exc()
        return judge_error(call, framework, error)
    if call.expect == "raise":
        return "failed", "raised nothing"
    problem = "" if call.expect == "anything" else find_error(call, results)
    return ("failed", problem) if problem else ("valid", "")


def judge_error(call: Call, framework: Framework, error: Exception) -> tuple[str, str]:
    """The outcome of a call that raised an error."""
    message = " ".join(str(error).split())
    raised, failed = ("raised", ""), ("failed", f"{type(error).__name__}: {message[:200]}")
    if call.expect == "anything":
        return raised
    if call.expect != "raise":
        return failed
    if call.operator:
        return raised if isinstance(error, framework.operator_errors) else failed
    aliases = {"x": ("input", "inputs"), "h0": ("hx",)} if call.entry == "GRU" else {}
    names = {*call.names, *(alias for name in call.names for alias in aliases.get(name, ()))}
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError)
    if call.entry == "GRU" and framework.name == "torch":
        kinds += (RuntimeError,)  # as nn.GRU
    pattern = rf"(?<![\w.])({'|'.join(map(re.escape, names))})(?![\w.]*\w)"
    return raised if isinstance(error, kinds) and re.search(pattern, str(error)) else failed


@contextmanager
def changing(call: Call) -> Iterator[dict[str, Array]]:
    """Copies of the indices and initial states of a call, which a thread overwrites continuously.

    Indices are int32, which the kernels read without a conversion.
    """
    invalid = {"lengths": 2**30, "tokens": 2**30, "distinct": 2**30, "resets": True, "h0": np.nan}
    valid = {n: call.arrays[n] for n in invalid if n in call.arrays}
    shared = {n: v.astype(np.int32 if v.dtype == np.int64 else v.dtype) for n, v in valid.items()}
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for name, array in shared.items():
                array[...] = invalid[name]
                array[...] = valid[name]

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield shared
    finally:
        ended.set()
        thread.join()


def disturb(call: Call, framework: Framework) -> str:
    """Make a call while its arrays change; return the problem, if any."""
    with changing(call) as shared:
        try:
            framework.run(call, shared)
        except (ValueError, IndexError):  # of the kernel, and of an embedding
            pass
        except Exception as error:
            return f"while its arrays change: {type(error).__name__}: {error}"
    return ""


def make_calls(
    reports: Connection, library: Path, name: str, numbers: range, seed: int, errors: Path | None
) -> None:
    """The child process: makes calls and reports each one before it begins and after it ends.

    errors: the file that receives standard error. None: print the calls and their errors.
    """
    if errors:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    kernels.PATH = library
    if not kernels.available():  # otherwise scan would run in place of the kernel
        raise OSError(f"{library} does not load")
    np.seterr(all="ignore")
    sys.setswitchinterval(1e-5)  # for the threads of `changing`
    framework = FRAMEWORKS[name]()
    for number in numbers:
        framework.threads(1 + (number % 8 == 0))  # more threads take longer
        report = {"number": number, "call": "a valid call, for its results | unchanged"}
        reports.send(report)
        call = draw(framework, seed, number)
        report["call"] = str(call)
        reports.send(report)
        show = errors is None
        if show:
            print(number, call, sep=": ", flush=True)
        outcome, problem = attempt(call, framework, show)
        if not problem and call.before and (call.operator or call.expect == "NaN"):
            # A rejected call has no effect on the next one.
            _, problem = attempt(call.before, framework, show)
            problem = problem and f"then, as a valid call: {problem}"
        if not (problem or call.changes) and call.expect == "valid" and call.dtype != "bfloat16":
            problem = disturb(call, framework)
        problem = problem or emulation.fault(kernels.library()) or ""
        changes = [change for _, change in call.changes] or ["unchanged"]
        outcome = "failed" if problem else outcome
        details = {"entry": call.entry, "changes": changes, "outcome": outcome, "problem": problem}
        reports.send(report | details)


@dataclass
class Report:
    """The outcomes of the calls."""

    entries: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(entry, outcome) -> the number of calls."""
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(change, outcome) -> the number of calls."""
    calls: int = 0
    failed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """The common text of similar failures -> the first of them."""

    def add(self, call: dict[str, Any]) -> None:
        """Count a call that ended."""
        self.calls += 1
        self.entries[call["entry"], call["outcome"]] += 1
        for change in call["changes"]:
            kind = re.sub(r"(gru|head)\.\S+", "a parameter", change)
            self.changes[re.sub(r"-?\d+", "#", kind), call["outcome"]] += 1
        if call["outcome"] == "failed":
            self.fail(call, call["problem"])

    def fail(self, call: dict[str, Any], problem: str) -> None:
        """Count a failure."""
        self.failed += 1
        entry, changes = call["call"].partition(" ")[0], call["call"].rpartition("|")[2]
        common = re.sub(r"\d[\d.e+-]*", "#", f"{entry}{changes} {problem}")
        self.failures.setdefault(common, f"{call['number']}: {call['call']}\n    {problem}")

    def print(self) -> None:
        for counts in (self.entries, self.changes):
            print(f"\n{'valid':>8}{'raised':>8}{'failed':>8}")
            for kind in sorted({kind for kind, _ in counts}):
                numbers = [counts[kind, outcome] for outcome in ("valid", "raised", "failed")]
                print("".join(f"{number:8,}" for number in numbers), kind, sep="  ")
        print("", *list(self.failures.values())[:20], sep="\n")


def sanitizer() -> str:
    """The libraries to preload: AddressSanitizer and, for its exceptions, the C++ library.

    Raises OSError if one is missing.
    """
    cxx = compiler()
    if cxx is None:
        raise OSError("no C++ compiler")
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [cxx, f"-print-file-name={name}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        libraries.append(result.stdout.strip())
        if not os.path.isabs(libraries[-1]):
            raise OSError(f"{cxx} has no {name}")
    return ":".join(libraries)


def build_sanitized(folder: Path) -> Path:
    """Build the kernel with AddressSanitizer and, if possible, the emulated matrix unit.

    Optimization would take five times as long to compile, and the calls are small. Raises OSError
    if the kernel cannot be built.
    """
    sanitizer()
    library = build(folder, ["-fsanitize=address", "-g1", *emulation.FLAGS], emulation.AMX)
    if library is None:
        raise OSError("the kernel does not compile with AddressSanitizer")
    return library


def fuzz(
    library: Path,
    framework: str,
    calls: int,
    seed: int = 0,
    *,
    only: int | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Report:
    """Make the calls, or the one with the number `only`, on a kernel of build_sanitized."""
    environment = {
        "LD_PRELOAD": sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=1:allocator_may_return_null=1",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compilation takes most of the time
    }
    context, report, crashes = multiprocessing.get_context("spawn"), Report(), 0
    number, end = (0, calls) if only is None else (only, only + 1)
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors") if only is None else None
        while number < end and crashes < MAX_CRASHES:
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, library, framework, range(number, end), seed, errors)
            process = context.Process(target=make_calls, args=arguments, daemon=True)
            with patch.dict(os.environ, environment):
                process.start()
            sender.close()
            unfinished, hung = receive(receiver, report, log)
            if hung:
                process.kill()
            process.join()
            output = errors.read_text(errors="replace") if errors and errors.exists() else ""
            if unfinished:
                crashes += 1
                report.calls += 1
                crash = describe_crash(process.exitcode, output)
                report.fail(unfinished, f"no answer in {TIMEOUT} s" if hung else crash)
                number = unfinished["number"] + 1
            elif process.exitcode:
                raise RuntimeError(f"the process stopped between two calls:\n{output[-4000:]}")
            else:
                break
    if crashes == MAX_CRASHES:
        report.failures[""] = f"stopped after {crashes} crashes, before call {number:,}"
    return report


def receive(
    reports: Connection, report: Report, log: Callable[[str], None]
) -> tuple[dict[str, Any] | None, bool]:
    """Count the calls that a process reports until it ends or hangs.

    Returns the call that did not end, if any, and whether the process hangs.
    """
    unfinished, logged = None, time.monotonic()
    while reports.poll(TIMEOUT):
        try:
            call = reports.recv()
        except EOFError:
            return unfinished, False
        unfinished = None if "outcome" in call else call
        if unfinished is None:
            report.add(call)
        if time.monotonic() - logged > 30:
            log(f"{call['number']:,} calls")
            logged = time.monotonic()
    return unfinished, True


def describe_crash(status: int | None, output: str) -> str:
    """The cause of a crash in one line."""
    if match := re.search(r"AddressSanitizer: (.*?)(?: on address| \(|$)", output, re.M):
        place = re.search(r"in (\S+) \S*/kernels/(\S+)", output)
        return f"AddressSanitizer: {match[1]}" + (f" in {place[1]} at {place[2]}" if place else "")
    return f"ended with status {status}: {output.strip().rpartition(chr(10))[2]}"


def main(
    framework: Positional[Literal["torch", "jax"]],
    calls: Positional[int] = 20_000,
    seed: int = 0,
    only: int | None = None,
) -> int:
    """Build the kernel, make the calls and print the outcomes.

    Args:
        framework: The framework.
        calls: The number of calls.
        seed: The seed of the calls.
        only: The number of a single call to repeat; its error is printed.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = build_sanitized(Path(folder))
        except OSError as error:
            raise InputError(error) from None
        report = fuzz(library, framework, calls, seed, only=only, log=print)
    report.print()
    seconds, kinds = time.monotonic() - started, len(report.failures)
    failed = f"{report.failed:,} failed in {kinds:,} ways" if kinds else "none failed"
    print(f"{report.calls:,} calls in {seconds:.0f} s, {failed}")
    return kinds > 0


if __name__ == "__main__":
    run_program(main)
