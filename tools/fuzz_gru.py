"""Calls of the GRU by the thousand, right ones and wrong ones, on a kernel with AddressSanitizer.

    python -m tools.fuzz_gru {torch,jax} [CALLS] [--seed SEED] [--only NUMBER]

A right call must give the numbers of common/oracle.py, and so must its gradients; with products in
bfloat16, those of the oracle that rounds their factors. The kernel's matrix unit (AMX) is emulated,
so that it is fuzzed on every processor with AVX-512. A wrong call must
raise ValueError or TypeError and name the argument. A right call is then made again while another
thread writes to the memory of its indices and first states: any result or error will do, but not a
read of other memory. Each call is drawn from (seed, number) alone: --only makes one again, and
shows what it raised. The calls are made in a process of their own, which writes down what it is
about to do: one that crashes or hangs is a failure like any other, and another process goes on.
"""

from __future__ import annotations

import argparse
import json
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
from pathlib import Path
from typing import Any

import numpy as np

from common import kernels, oracle
from common.kernels.build import build, compiler
from common.params import DIRECTIONS, GRU_PARAMETERS
from tools import emulation
from tools.fuzz_gru_calls import FLOATS, VOCABULARY, Array, Call, draw, is_float
from tools.fuzz_gru_frameworks import FRAMEWORKS, Framework
from tools.rounding_oracle import product, rounding_oracle

# How far results may be off: a share of the array's largest number, and so much in any case.
RELATIVE = {"float32": 1e-6, "float64": 2e-15, "bfloat16": 2**-8, "float16": 2**-11}
ABSOLUTE = {"float32": 1e-6, "float64": 2e-15, "bfloat16": 1e-6, "float16": 1e-6}
CRASHES, PATIENCE = 50, 300  # after so many crashes, stop; a process silent for so long hangs


def truth(call: Call) -> dict[str, Array]:
    """What a right call returns, by name; the gradient of an array is d_ and its name."""
    given = {n: v.astype(np.float64) if is_float(v) else v for n, v in call.given.items()}
    results, gradients = operator_truth(call, given) if call.operator else layer_truth(call, given)
    if call.entry == "backward":
        return gradients
    wanted = {f"d_{name}" for name in call.arrays if name not in call.frozen}
    return results | {name: value for name, value in gradients.items() if name in wanted}


def oracle_of(call: Call) -> Any:
    """The oracle, or the one with products in bfloat16."""
    return rounding_oracle(call.K is None) if call.options.get("bfloat16") else oracle


def read_by(call: Call, parameters: dict, rows: Array, given: dict) -> tuple[dict, Array]:
    """Parameters and inputs of the oracle, of an input [T, B, D], or of rows and tokens.

    With tokens, products in bfloat16 round the gradients of rows, not those of words. So the inputs
    say which row is read, and the weights are the product of the rows.
    """
    if call.K is None:
        return parameters, rows
    if not call.options.get("bfloat16"):
        return parameters, rows[given["tokens"]]
    own = {n: product(rows, W.T).T for n, W in parameters.items() if n.endswith("weight_ih")}
    return parameters | own, np.eye(call.K)[given["tokens"]]


def gradient_of_rows(
    call: Call, parameters: dict, rows: Array, given: dict, found: dict[str, Array]
) -> Array:
    """The gradient of the inputs that read_by was given; that of x is no longer found."""
    d_x = found.pop("x")
    if call.K is None:
        return d_x
    if not call.options.get("bfloat16"):
        return scatter(given["tokens"], d_x, call.K)
    d_rows = np.zeros_like(rows)
    for name in (each for each in parameters if each.endswith("weight_ih")):
        d_read = found[name]
        found[name] = product(d_read, rows)
        d_rows += product(d_read.T, parameters[name])
    return d_rows


def layer_truth(call: Call, given: dict[str, Array]) -> tuple[dict, dict]:
    distinct = given["vectors"][given["distinct"]] if call.entry == "classify" else given["x"]
    if call.entry == "GRU":
        distinct = distinct.swapaxes(0, 1)
    parameters = {name: value for name, value in given.items() if name.startswith("gru.")}
    read, x = read_by(call, parameters, distinct, given)
    reset_after = call.options["reset_after"]
    resets = given.get("resets")
    resets = resets.T if call.entry == "GRU" and resets is not None else resets
    states = given.get("h0"), resets, given.get("h_reset")
    module = oracle_of(call)
    run = module.forward(read, x, given["lengths"], *states, reset_after=reset_after)
    results = {"outputs": run.outputs, "h_last": run.h_last}
    d_outputs, d_h_last = given.get("d_outputs"), given.get("d_h_last")
    gradients = {}
    if call.entry == "classify":
        features = np.concatenate(list(run.h_last[-call.R :]), -1)
        active, weight, d_logits = np.maximum(features, 0), given["head.weight"], given["d_logits"]
        results = {"logits": active @ weight.T + given["head.bias"]}
        gradients = {"d_head.weight": d_logits.T @ active, "d_head.bias": d_logits.sum(0)}
        d_outputs, d_h_last = np.zeros_like(run.outputs), np.zeros_like(run.h_last)
        d_h_last[-call.R :] = np.split(d_logits @ weight * (features > 0), call.R, -1)
    elif call.entry == "GRU":
        results["outputs"], d_outputs = (a.swapaxes(0, 1) for a in (run.outputs, d_outputs))
    elif not call.options["return_sequences"]:
        results["outputs"], d_outputs = run.outputs[:0], np.zeros_like(run.outputs)
    if not call.gradients:
        return results, {}
    found = module.backward(run, d_outputs, d_h_last)
    if "h_reset" not in given:  # h0 is both
        found["h0"] = found["h0"] + found["h_reset"]
    d_x = gradient_of_rows(call, parameters, distinct, given, found)
    if call.entry == "classify":
        found["vectors"] = scatter(given["distinct"], d_x, VOCABULARY)
    else:
        found["x"] = d_x.swapaxes(0, 1) if call.entry == "GRU" else d_x
    return results, gradients | {f"d_{name}": value for name, value in found.items()}


def operator_truth(call: Call, given: dict[str, Array]) -> tuple[dict, dict]:
    H, return_sequences = call.H, call.options["return_sequences"]
    outputs, h_last = np.zeros((call.T, call.B, call.R * H)), np.zeros_like(given["h0"])
    gradients: dict[str, Array] = {}
    for i, side in enumerate(map(int, call.options["reverse"])):
        # The oracle goes both ways: one is looked at.
        parameters = {
            f"gru.0.{direction}.{name}": given[f"{name}.{i}"]
            for direction in DIRECTIONS
            for name in GRU_PARAMETERS
        }
        read, x = read_by(call, parameters, given["x"], given)
        h0 = np.stack([given["h0"][i]] * 2)
        reset_after = call.options["reset_after"]
        resets = given.get("resets")
        h_reset = None if resets is None else np.stack([given["h_reset"][i]] * 2)
        states = h0, resets, h_reset
        module = oracle_of(call)
        run = module.forward(read, x, given["lengths"], *states, reset_after=reset_after)
        mine, its = slice(side * H, side * H + H), slice(i * H, i * H + H)
        outputs[..., its], h_last[i] = run.outputs[..., mine], run.h_last[side]
        if call.entry == "forward" and not call.gradients:
            continue
        d_outputs, d_h_last = np.zeros_like(run.outputs), np.zeros_like(h0)
        d_h_last[side] = given["d_h_last"][i]
        if return_sequences:
            d_outputs[..., mine] = given["d_outputs"][..., its]
        found = module.backward(run, d_outputs, d_h_last)
        for name in ("h0", "h_reset")[: 1 if resets is None else 2]:
            gradients.setdefault(f"d_{name}", np.zeros_like(h_last))[i] = found[name][side]
        d_x = gradient_of_rows(call, parameters, given["x"], given, found)
        gradients["d_x"] = gradients.get("d_x", 0) + d_x
        for name in GRU_PARAMETERS:
            gradients[f"d_{name}.{i}"] = found[f"gru.0.{DIRECTIONS[side]}.{name}"]
    if call.entry == "backward" and not call.options["of_x"]:
        gradients["d_x"] = np.zeros(0)
    return {"outputs": outputs if return_sequences else outputs[:0], "h_last": h_last}, gradients


def scatter(index: Array, values: Array, rows: int) -> Array:
    """The gradient of an array, given that of the rows taken from it."""
    found = np.zeros((rows, values.shape[-1]))
    np.add.at(found, index, values)
    return found


def fault(call: Call, got: dict[str, Array]) -> str:
    """What is wrong with the results, in a line, or nothing."""
    for name, expected in truth(call).items():
        have, want = got[name], expected
        if have.shape != want.shape or have.dtype != FLOATS[call.dtype]:
            return f"{name} is {have.dtype}{list(have.shape)}, not {call.dtype}{list(want.shape)}"
        if call.expect == "fake":
            continue
        have = have.astype(np.float64)
        if call.expect == "NaN":
            have, want, poisoned = apart(call, name, have, want)
            if not np.isnan(poisoned).all():
                return f"{name} has numbers where NaN has to be"
        if not np.isfinite(have).all():
            return f"{name} has numbers that are not finite"
        kind = "bfloat16" if call.options.get("bfloat16") else call.dtype
        error, largest = np.abs(have - want).max(initial=0), np.abs(want).max(initial=0)
        bound = RELATIVE[kind] * largest + ABSOLUTE[kind]
        if name.startswith("d_"):  # sums over all words
            bound += ABSOLUTE[kind] * (call.T * call.B) ** 0.5
        if call.entry == "classify" and call.dtype.endswith("16"):
            bound = 4 * RELATIVE[call.dtype] * max(largest, 1)  # the head rounds after every step
        if error > bound:
            return f"{name} is off by {error:.1e}, may be by {bound:.1e}"
    return ""


def apart(call: Call, name: str, have: Array, want: Array) -> tuple[Array, Array, Array]:
    """The results, and what is wanted, without the row that a wrong value is in; and that row."""
    if call.row is None:
        return have[:0], want[:0], have
    batch = {"logits": 0, "h_last": 1, "outputs": 0 if call.entry == "GRU" else 1}[name]
    row = np.take(have, call.row, batch)
    if name == "outputs":  # of a wrong length it is not known which steps are words
        row = row[: call.given["lengths"][call.row] if call.changes[-1][0] == "tokens" else 0]
    return *(np.delete(each, call.row, batch) for each in (have, want)), row


def attempt(call: Call, framework: Framework, show: bool) -> tuple[str, str]:
    """What came of a call: right, raised or failed, and what is wrong with that."""
    try:
        got = framework.run(call)
    except Exception as error:
        if show:
            traceback.print_exc()
        return refused(call, framework, error)
    if call.expect == "raise":
        return "failed", "raised nothing"
    problem = "" if call.expect == "anything" else fault(call, got)
    return ("failed", problem) if problem else ("right", "")


def refused(call: Call, framework: Framework, error: Exception) -> tuple[str, str]:
    """What to think of an error."""
    told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if call.expect == "anything":
        return "raised", ""
    if call.expect != "raise":
        return "failed", told
    if call.operator:
        return ("raised", "") if isinstance(error, framework.refusals) else ("failed", told)
    its = {"x": ("input", "inputs"), "h0": ("hx",)} if call.entry == "GRU" else {}
    all_names = {*call.names, *(n for name in call.names for n in its.get(name, ()))}
    names = "|".join(map(re.escape, all_names))
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError)
    if call.entry == "GRU" and framework.name == "torch":
        kinds += (RuntimeError,)  # as nn.GRU
    if not isinstance(error, kinds) or not re.search(
        rf"(?<![\w.])({names})(?![\w.]*\w)", str(error)
    ):
        return "failed", told
    return "raised", ""


@contextmanager
def changing(call: Call) -> Iterator[dict[str, Array]]:
    """Copies of the indices and first states of a call, which a thread changes all the while.

    Indices are int32, which the kernels read without a conversion.
    """
    wild = {"lengths": 2**30, "tokens": 2**30, "distinct": 2**30, "resets": True, "h0": np.nan}
    calm = {n: call.arrays[n] for n in wild if n in call.arrays}
    shared = {n: v.astype(np.int32 if v.dtype == np.int64 else v.dtype) for n, v in calm.items()}
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for name, array in shared.items():
                array[...] = wild[name]
                array[...] = calm[name]

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield shared
    finally:
        ended.set()
        thread.join()


def disturb(call: Call, framework: Framework) -> str:
    """What is wrong with a call while its arrays change, or nothing."""
    with changing(call) as shared:
        try:
            framework.run(call, shared)
        except (ValueError, IndexError):  # a kernel's, and an embedding's
            pass
        except Exception as error:
            return f"while its arrays change: {type(error).__name__}: {error}"
    return ""


def make_calls(options: argparse.Namespace) -> None:
    """What the process under AddressSanitizer does: a record of every call, before and after."""
    kernels.PATH = Path(options.library)
    if not kernels.available():  # scan would make the calls instead, and prove nothing
        raise OSError(f"{options.library} does not load")
    np.seterr(all="ignore")
    sys.setswitchinterval(1e-5)  # for the threads of `changing`
    framework = FRAMEWORKS[options.framework]()
    record = os.open(options.record, os.O_WRONLY | os.O_APPEND)

    def write(**said: Any) -> None:
        os.write(record, json.dumps(said).encode() + b"\n")

    for number in range(options.start, options.calls):
        framework.threads(1 + (number % 8 == 0))  # more cost more than they save
        write(number=number, call="a right call, for its results | unchanged")
        call = draw(framework, options.seed, number)
        write(number=number, call=str(call))
        if options.show:
            print(number, call, sep=": ", flush=True)
        outcome, problem = attempt(call, framework, options.show)
        if not problem and call.before and (call.operator or call.expect == "NaN"):
            # What was refused has left nothing behind.
            _, problem = attempt(call.before, framework, options.show)
            outcome = "failed" if problem else outcome
            problem = problem and f"then, with nothing wrong: {problem}"
        if not (problem or call.changes) and call.expect == "right" and call.dtype != "bfloat16":
            problem = disturb(call, framework)
            outcome = "failed" if problem else outcome
        if not problem and (problem := emulation.fault(kernels.library()) or ""):
            outcome = "failed"
        changes = [what for _, what in call.changes] or ["unchanged"]
        write(entry=call.entry, changes=changes, outcome=outcome, problem=problem)


@dataclass
class Report:
    """What came of the calls."""

    entries: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(entry, outcome) -> how often."""
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(what was changed, outcome) -> how often."""
    calls: int = 0
    failed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """What they have in common -> the first of these failures."""

    def add(self, before: dict, after: dict) -> None:
        """Count a call that ended."""
        self.calls += 1
        self.entries[after["entry"], after["outcome"]] += 1
        for change in after["changes"]:
            what = re.sub(r"(gru|head)\.\S+", "a parameter", change)
            self.changes[re.sub(r"-?\d+", "#", what), after["outcome"]] += 1
        if after["outcome"] == "failed":
            self.fail(before, after["problem"])

    def fail(self, before: dict, problem: str) -> None:
        """Count a failure."""
        self.failed += 1
        entry, changes = before["call"].partition(" ")[0], before["call"].rpartition("|")[2]
        common = re.sub(r"\d[\d.e+-]*", "#", f"{entry}{changes} {problem}")
        self.failures.setdefault(common, f"{before['number']}: {before['call']}\n    {problem}")

    def read(self, record: Path) -> dict | None:
        """Count what a process has written down; returns the call that did not end, if any."""
        before = None
        for line in record.read_text().splitlines():
            said = json.loads(line)
            if "outcome" in said and before:
                self.add(before, said)
                before = None
            else:
                before = said
        return before

    def print(self) -> None:
        for counts in (self.entries, self.changes):
            print(f"\n{'right':>8}{'raised':>8}{'failed':>8}")
            for what in sorted({what for what, _ in counts}):
                numbers = [counts[what, outcome] for outcome in ("right", "raised", "failed")]
                print("".join(f"{number:8,}" for number in numbers), what, sep="  ")
        print("", *list(self.failures.values())[:20], sep="\n")


def sanitizer() -> str:
    """What to preload: AddressSanitizer, and the C++ library, whose exceptions it looks after.

    Raises OSError where there is none.
    """
    cxx = compiler()
    if cxx is None:
        raise OSError("no C++ compiler")
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [cxx, f"-print-file-name={name}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        found.append(result.stdout.strip())
        if not os.path.isabs(found[-1]):
            raise OSError(f"{cxx} has no {name}")
    return ":".join(found)


def build_sanitized(folder: Path) -> Path:
    """The kernel with AddressSanitizer and the matrix unit emulated, if that is possible. Raises
    OSError where it cannot be had.

    To optimise it would take five times as long as to compile it, and the calls are small.
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
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Make the calls, or one of them alone, on a kernel that build_sanitized has built."""
    environment = os.environ | {
        "LD_PRELOAD": sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=1:allocator_may_return_null=1",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is what takes the time
    }
    report = Report()
    number, end, crashes = (0, calls, 0) if only is None else (only, only + 1, 0)
    with tempfile.TemporaryDirectory() as folder:
        record, errors = Path(folder, "record"), Path(folder, "errors")
        while number < end and crashes < CRASHES:
            record.write_bytes(b"")
            command = [sys.executable, "-m", "tools.fuzz_gru", framework, str(end)]
            command += ["--seed", str(seed), "--start", str(number)]
            command += ["--library", str(library), "--record", str(record)]
            command += ["--show"] * (only is not None)
            with errors.open("wb") as stream:
                stderr = stream if only is None else None
                process = subprocess.Popen(command, env=environment, stderr=stderr)
                hung = wait(process, record, number, say)
            unfinished = report.read(record)
            said = errors.read_text(errors="replace")
            if unfinished:
                crashes += 1
                report.calls += 1
                problem = f"no answer in {PATIENCE} s" if hung else crash(process.returncode, said)
                report.fail(unfinished, problem)
                number = unfinished["number"] + 1
            elif process.returncode:
                raise RuntimeError(f"the process stopped between two calls:\n{said[-4000:]}")
            else:
                break
    if crashes == CRASHES:
        report.failures[""] = f"stopped after {crashes} crashes, before call {number:,}"
    return report


def wait(process: subprocess.Popen, record: Path, first: int, say: Callable[[str], None]) -> bool:
    """Until the process ends; True if it had to be killed, having written nothing for long."""
    size = 0
    changed = told = time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if record.stat().st_size > size:
            size, changed = record.stat().st_size, now
        if now - changed > PATIENCE:
            process.kill()
            process.wait()
            return True
        if now - told > 30:
            say(f"{first + record.read_bytes().count(b'outcome'):,} calls")
            told = now
    return False


def crash(status: int, said: str) -> str:
    """What a process died of, in a line."""
    if found := re.search(r"AddressSanitizer: (.*?)(?: on address| \(|$)", said, re.M):
        at = re.search(r"in (\S+) \S*/kernels/(\S+)", said)
        return f"AddressSanitizer: {found[1]}" + (f" in {at[1]} at {at[2]}" if at else "")
    return f"ended with status {status}: {said.strip().rpartition(chr(10))[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("calls", type=int, nargs="?", default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="make this call alone")
    # What this program tells the process that it starts.
    for name in ("--library", "--record"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--show", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        make_calls(options)
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = build_sanitized(Path(folder))
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        how = {"only": options.only, "say": print}
        report = fuzz(library, options.framework, options.calls, options.seed, **how)
    report.print()
    seconds, ways = time.monotonic() - started, len(report.failures)
    failed = f"{report.failed:,} failed in {ways:,} ways" if ways else "none failed"
    print(f"{report.calls:,} calls in {seconds:.0f} s, {failed}")
    sys.exit(ways > 0)


if __name__ == "__main__":
    main()
