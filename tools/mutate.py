"""Makes random single changes of the program, and lists those that no default test detects.

    python -m tools.mutate --count 200 --seed 0
    python -m tools.mutate --count 50 --paths torch_impl common/kernels/gru.cpp

The first run measures with coverage.py which tests execute which lines (some ten minutes), and
keeps the result in the cache until a file changes. Each mutant is a copy of the working tree with
one change. The default tests that execute the changed line run until one fails: the fast tests
first, and of these the files that have detected the most mutants in the least time. Because
coverage.py does not measure C++, its mutants run the tests of CPP_TESTS. A test that also fails
without the change is excluded.

A person must decide whether a survivor lacks a test or behaves as the original program does.
"""

import ast
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from xml.etree import ElementTree

from common.cache import cached
from common.errors import InputError, exit_on_input_error
from common.training.options import Count, Positive, check_numbers, parse_options
from tools.planted_faults import BUILD, ENVIRONMENT, JOBS, ROOT, copy_tree, python

KERNEL = "common/kernels"
PRODUCT = ("torch_impl", "jax_impl", "common", "comparison")
CPP_TESTS = {
    f"{KERNEL}/cuda": ("tests/gpu",),
    KERNEL: ("tests/kernel", "tests/layers", "tests/parity"),
}
"""The tests of C++ files: those of the first key that a file's name starts with."""
TEXT_TESTS = "tests/kernel/test_planted_faults_apply.py"  # detects changed text, not behaviour
TIME_LIMIT = 20  # seconds for one test, plus ten times its duration; a hanging mutant is detected
FEW = 4  # files of tests that run before all others are imported
COVERAGE = """[run]
source = {tree}
omit = {tree}/tests/*, {tree}/tools/*, {tree}/benchmarks/*
patch = subprocess
context = ${PYTEST_CURRENT_TEST-}
"""  # pytest sets that variable, which the programs that a test starts inherit

SWAPS = {
    "comparison": {
        **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
        **{"is": "is not", "is not": "is", "in": "not in", "not in": "in"},
    },
    "arithmetic": {
        **{"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "%": "*", "**": "*"},
        **{"<<": ">>", ">>": "<<", "&": "|"},
    },
    "boolean": {"and": "or", "or": "and"},
}
CPP_SWAPS = {
    "comparison": {" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > "}
    | {" == ": " != ", " != ": " == "},
    "arithmetic": {" + ": " - ", " - ": " + ", " * ": " + ", " / ": " * "}
    | {" += ": " -= ", " -= ": " += ", "std::min": "std::max", "std::max": "std::min"},
    "boolean": {" && ": " || ", " || ": " && "},
    "constant": {"true": "false", "false": "true"},
}


@dataclass(frozen=True)
class Options:
    """Change the program at random places; print a table of the changes that no test detects."""

    count: Count = 200
    """How many mutants; all that there are, if these are fewer."""
    seed: int = 0
    """Seed of the choice among them."""
    paths: tuple[str, ...] = (*PRODUCT,)
    """Files and folders of the repository whose mutants are drawn."""
    budget: Positive | None = None
    """How many seconds the tests of one mutant may take. A mutant that no test has found by then
    is listed as not decided. No limit by default."""


@dataclass(frozen=True)
class Mutant:
    """The bytes from `start` to `end` of `file` become `new`."""

    file: str
    kind: str
    start: int
    end: int
    new: bytes

    def changed(self, source: bytes) -> bytes:
        return source[: self.start] + self.new + source[self.end :]

    def is_valid(self, source: bytes) -> bool:
        """Whether the changed file parses, and its syntax tree differs from the original one."""
        if not self.file.endswith(".py"):
            return True
        try:
            return ast.dump(ast.parse(self.changed(source))) != ast.dump(ast.parse(source))
        except SyntaxError:  # for example, the text of an argument in parentheses
            return False

    def line(self, source: bytes) -> int:
        return source.count(b"\n", 0, self.start) + 1

    def shown(self, source: bytes) -> str:
        """The line before and after the change, as Markdown."""
        at = self.line(source) - 1
        before, after = (text.split(b"\n")[at] for text in (source, self.changed(source)))
        return f"`{before.decode().strip()}` → `{after.decode().strip()}`"


def python_mutants(file: str, source: bytes) -> Iterator[Mutant]:
    """All mutants of a Python file, by its syntax tree. Annotations and docstrings stay."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        first, last = starts[node.lineno - 1], starts[node.end_lineno - 1]  # type: ignore[attr-defined]
        return first + node.col_offset, last + node.end_col_offset  # type: ignore[attr-defined]

    def operator(kind: str, left: ast.AST, right: ast.AST) -> Iterator[Mutant]:
        start, end = span(left)[1], span(right)[0]
        words = "|".join(map(re.escape, sorted(SWAPS[kind], key=len, reverse=True)))
        if match := re.search(words.encode(), source[start:end]):
            new = SWAPS[kind][match[0].decode()].encode()
            yield Mutant(file, kind, start + match.start(), start + match.end(), new)

    def of(node: ast.AST) -> Iterator[Mutant]:
        match node:
            case ast.Compare(left=left, comparators=[right, *_]):
                yield from operator("comparison", left, right)
            case ast.BinOp(left=left, right=right) | ast.AugAssign(target=left, value=right):
                yield from operator("arithmetic", left, right)
            case ast.BoolOp(values=[left, right, *_]):
                yield from operator("boolean", left, right)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield Mutant(file, "boolean", span(node)[0], span(operand)[0], b"")
            case ast.Constant(value=bool(value)):
                yield Mutant(file, "constant", *span(node), str(not value).encode())
            case ast.Constant(value=int(value)):
                yield Mutant(file, "constant", *span(node), str(value + 1).encode())
            case ast.Constant(value=float(value)):
                yield Mutant(file, "constant", *span(node), str(value * 2 or 1.0).encode())
            case ast.Call(args=arguments, keywords=keywords):
                ordered = sorted([*arguments, *keywords], key=span)
                for i, argument in enumerate(ordered):
                    start, end = span(argument)
                    if i:
                        start = span(ordered[i - 1])[1]
                    elif len(ordered) > 1:
                        end = span(ordered[1])[0]
                    if isinstance(argument, ast.keyword):
                        yield Mutant(file, "dropped keyword argument", start, end, b"")
                if len(arguments) > 1:
                    (a, b), (c, d) = span(arguments[0]), span(arguments[1])
                    swapped = source[c:d] + source[b:c] + source[a:b]
                    yield Mutant(file, "swapped arguments", a, d, swapped)
        match node:
            case (
                ast.Expr(value=ast.Call())
                | ast.AugAssign()
                | ast.Raise()
                | ast.Delete()
                | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
            ):
                yield Mutant(file, "dropped statement", *span(node), b"pass")

    def walk(node: ast.AST) -> Iterator[Mutant]:
        yield from of(node)
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                    yield from walk(child)

    return walk(ast.parse(source))


def cpp_mutants(file: str, source: bytes) -> Iterator[Mutant]:
    """All mutants of a C++ file, line by line. Comments, strings and directives stay."""
    begin = 0
    source = re.sub(
        rb"/\*.*?\*/", lambda match: re.sub(rb"[^\n]", b" ", match[0]), source, flags=re.S
    )
    for line in source.splitlines(keepends=True):
        code = line.decode("latin-1").partition("//")[0]
        code = re.sub(r'"(\\.|[^"\\])*"', lambda match: "\0" * len(match[0]), code)
        changes = [
            (kind, *match.span(), new)
            for kind, swaps in CPP_SWAPS.items()
            for old, new in swaps.items()
            for match in re.finditer(rf"\b{old}\b" if old.isidentifier() else re.escape(old), code)
        ]
        changes += [
            ("constant", *match.span(), str(int(match[0]) + 1))
            for match in re.finditer(r"(?<![\w.])\d+(?![\w.'])", code)
        ]
        statement = r"\s+(?!return\b)([\w:.>-]+\(.*\)|[\w.>\[\]-]+ [-+*/|&]?= .*);$"
        if match := re.match(statement, code):
            changes.append(("dropped statement", *match.span(1), ""))
        if not code.lstrip().startswith("#"):
            for kind, start, end, new in changes:
                yield Mutant(file, kind, begin + start, begin + end, new.encode())
        begin += len(line)


LANGUAGES = {".py": python_mutants, ".cpp": cpp_mutants, ".h": cpp_mutants}


def draw(paths: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Mutants of files and folders, in random order. Raises InputError for a path without any."""
    every: list[Mutant] = []
    for path in paths:
        whole = ROOT / path
        files = [whole] if whole.is_file() else sorted(whole.rglob("*"))
        of = [
            mutant
            for each in files
            if each.suffix in LANGUAGES
            for mutant in LANGUAGES[each.suffix](
                each.relative_to(ROOT).as_posix(), each.read_bytes()
            )
        ]
        if not of:
            raise InputError(f"--paths {path}: no Python or C++ file of the repository")
        every += of
    random.Random(seed).shuffle(every)
    valid = (mutant for mutant in every if mutant.is_valid((ROOT / mutant.file).read_bytes()))
    return list(islice(valid, count))


def environment(tree: Path, **more: str) -> dict[str, str]:
    """The environment of programs in a copy of the tree; deletes its temporary files."""
    temporary = tree.parent / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    own = {"PYTHONPATH": str(tree), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    return own | {"GRU_TWINS_CACHE": str(tree.parent / "cache")} | more


def run(tree: Path, *arguments: str, **more: str) -> tuple[int, str]:
    """Exit status and output of Python in a copy of the tree."""
    return python(tree, *arguments, environment=environment(tree, **more), seconds=None)


PYTEST = ("-q", "-p", "no:cacheprovider")


def measure(tree: Path, into: Path) -> None:
    """Run the default tests once, and record their lines, durations and failures."""
    (tree / ".coveragerc").write_text(COVERAGE.replace("{tree}", str(tree)))
    tests = ["-n", str(JOBS), "-o", "junit_family=xunit1", f"--junitxml={into / 'tests.xml'}"]
    lines = ["--cov", "--cov-config=.coveragerc", "--cov-context=test", "--cov-report="]
    of = {"COVERAGE_FILE": str(into / "coverage")}
    status, output = run(tree, "-m", "pytest", *PYTEST, *tests, *lines, **of)
    print(output.rpartition("short test summary")[2], flush=True)
    if status not in (0, 1):
        raise InputError(f"the tests cannot be run without a change either: {output[-2000:]}")
    (into / "tree").write_text(str(tree))


@dataclass(frozen=True)
class Measured:
    """The default tests without a change."""

    seconds: dict[str, float]
    """Test functions that pass, and the time that all their cases take."""
    reached: dict[str, dict[int, set[str]]]
    """Test functions that execute a line, by file and line; line 0: those that execute any."""
    finds: Counter[str] = field(default_factory=Counter)
    """How many mutants each test function and each file of tests has found."""
    failing: set[str] = field(default_factory=set)
    """Test functions that fail without a change when they run alone."""

    def tests(self, file: str, line: int) -> list[str]:
        """The test functions that execute a line, in the order in which they run.

        First those below a second, then those below ten, then the others; each time file by file,
        for a file's tests share fixtures.
        """
        if file.endswith(".py"):
            lines = self.reached[file]
            # A line that runs at import belongs to no test.
            of = lines[line] or lines[0] or {*self.seconds}
        else:
            rooms = next(tests for key, tests in CPP_TESTS.items() if file.startswith(key))
            of = {test for test in self.seconds if test.startswith(rooms)}
            of -= {test for test in of if test.startswith(TEXT_TESTS)}
        of = (of & self.seconds.keys()) - self.failing
        ranks = {each: math.floor(math.log10(max(self.seconds[each], 0.1))) for each in of}
        files: Counter[tuple[int, str]] = Counter()
        for each, rank in ranks.items():
            files[rank, each.partition("::")[0]] += self.seconds[each]

        def order(test: str) -> tuple[int, float, str, float]:
            rank, path = ranks[test], test.partition("::")[0]
            cost = files[rank, path] / (1 + self.finds[path])
            return rank, cost, path, self.seconds[test] / (1 + self.finds[test])

        return sorted(of, key=order)


def read(folder: Path) -> Measured:
    """The results of `measure` in a folder."""
    import coverage

    seconds: Counter[str] = Counter()
    failed = set()
    for case in ElementTree.parse(folder / "tests.xml").iter("testcase"):
        name = f"{case.get('file')}::{case.get('name', '').partition('[')[0]}"
        seconds[name] += float(case.get("time", 0))
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(name)
    data = coverage.CoverageData(str(folder / "coverage"))
    data.read()
    tree = Path((folder / "tree").read_text())
    reached: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in data.measured_files():
        lines = reached[Path(name).relative_to(tree).as_posix()]
        for line, contexts in data.contexts_by_lineno(name).items():
            # "path::function[case]|run", or as PYTEST_CURRENT_TEST has it
            of = {
                match[0] for each in contexts if (match := re.match(r"tests/[\w/]+\.py::\w+", each))
            }
            lines[line] |= of
            lines[0] |= of
    return Measured({name: each for name, each in seconds.items() if name not in failed}, reached)


@dataclass(frozen=True)
class Outcome:
    found_by: str  # the first failure; empty for a survivor
    tests: int  # functions that execute the line
    seconds: float
    is_decided: bool = True  # False if the budget was used up


def parts(tests: list[str]) -> list[list[str]]:
    """The tests of the first files and all others; pytest imports all files before it begins."""
    files = [test.partition("::")[0] for test in tests]
    first = list(dict.fromkeys(files))[:FEW]
    length = sum(1 for _ in takewhile(first.__contains__, files))
    return [part for part in (tests[:length], tests[length:]) if part]


class Tree:
    """A copy of the working tree, and the process that runs its tests (tools/pytest_server.py)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        plugins = {name: ENVIRONMENT[name] for name in ENVIRONMENT if name.startswith("PYTEST")}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tools.pytest_server"],
            cwd=path,
            env=os.environ | environment(path, **plugins, PYTEST_ADDOPTS=""),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pytest(self, *arguments: str, **limits: Any) -> tuple[int | None, str]:
        """The exit status, or None after the time limit, and the output."""
        environment(self.path)
        request = [*PYTEST, *arguments], limits.get("each", {}), limits.get("seconds")
        assert self.server.stdin and self.server.stdout
        print(json.dumps(request), file=self.server.stdin, flush=True)
        status = json.loads(self.server.stdout.readline())
        return status, (self.path.parent / "output").read_text(errors="replace")

    def try_out(self, mutant: Mutant, measured: Measured, budget: float | None) -> Outcome:
        """Run the tests with the change, and revert it."""
        begin = time.monotonic()
        path, library = self.path / mutant.file, self.path / KERNEL / "libgru.so"
        original, built, times = path.read_bytes(), library.read_bytes(), path.stat()
        tests = measured.tests(mutant.file, mutant.line(original))
        path.write_bytes(mutant.changed(original))
        # Python compares the time in whole seconds and the size with those of the compiled file.
        os.utime(path, (times.st_atime, times.st_mtime + 2))
        status: int | None = 0
        result = ""
        if not mutant.file.endswith(".py"):
            status, _ = run(self.path, *BUILD)
            result = "the compiler" if status else ""
        limits = {test: TIME_LIMIT + 10 * measured.seconds[test] for test in tests}
        end = time.monotonic() + (budget or math.inf)
        for part in parts(tests):
            if status != 0:
                break
            left = max(end - time.monotonic(), 0) if budget else None
            status, output = self.pytest("-x", *part, each=limits, seconds=left)
            failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
            result = failed[1] if failed else f"exit status {status}" if status else ""
        path.write_bytes(original)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if not mutant.file.endswith(".py"):
            library.write_bytes(built)
        function = result.partition("[")[0]
        if function in tests:
            if not measured.finds[function] and self.pytest(function)[0]:
                print(f"fails without a change, and is left out: {function}", flush=True)
                measured.failing.add(function)
                return self.try_out(mutant, measured, budget)
            measured.finds.update([function, function.partition("::")[0]])
        is_decided = bool(result) or status is not None
        return Outcome(result, len(tests), time.monotonic() - begin, is_decided)


def table(outcomes: dict[Mutant, Outcome]) -> str:
    """How many are found, of all, of each kind and in each file; the survivors one by one; and
    those that the budget left undecided."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for mutant, outcome in outcomes.items():
        for group in ("", mutant.kind, mutant.file):
            groups[group].append(outcome)
    lines = ["| of | mutants | found | not decided |", "| --- | ---: | ---: | ---: |"]
    for group, members in sorted(groups.items()):
        result = sum(bool(each.found_by) for each in members)
        undecided = sum(not each.is_decided for each in members)
        lines.append(f"| {group or 'all'} | {len(members)} | {result} | {undecided} |")
    for title, is_decided in (("survivor", True), ("not decided", False)):
        lines += ["", f"| {title} | kind | change | tests |", "| --- | --- | --- | ---: |"]
        for mutant in sorted(outcomes, key=lambda each: (each.file, each.start)):
            outcome = outcomes[mutant]
            if outcome.found_by or outcome.is_decided != is_decided:
                continue
            source = (ROOT / mutant.file).read_bytes()
            change = mutant.shown(source).replace("|", "\\|")
            where = f"{mutant.file}:{mutant.line(source)}"
            lines.append(f"| {where} | {mutant.kind} | {change} | {outcome.tests} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with exit_on_input_error():
        options = parse_options(Options, "python -m tools.mutate")
        check_numbers(options)
        chosen = draw(options.paths, options.count, options.seed)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
            first = Path(folder, "0/tree")
            copy_tree(first)
            if (ROOT / "../shared").exists():
                Path(folder, "0/shared").symlink_to((ROOT / "../shared").resolve())
            status, output = run(first, *BUILD)
            if status:
                raise InputError(f"the kernel cannot be built: {output}")
            files = sorted(path for path in first.rglob("*") if path.suffix in LANGUAGES)
            key = {"of": hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()}
            measured = read(cached("mutate", key, partial(measure, first)))
            trees: SimpleQueue[Tree] = SimpleQueue()
            for i in range(JOBS):
                if i:
                    shutil.copytree(first.parent, Path(folder, str(i)), symlinks=True)
                trees.put(tree := Tree(Path(folder, str(i), "tree")))
                if not i:
                    tree.pytest("--collect-only")

            def outcome(mutant: Mutant) -> Outcome:
                tree = trees.get()
                try:
                    return tree.try_out(mutant, measured, options.budget)
                finally:
                    trees.put(tree)

            outcomes: dict[Mutant, Outcome] = {}
            for mutant, each in zip(chosen, pool.map(outcome, chosen), strict=True):
                outcomes[mutant] = each
                source = (ROOT / mutant.file).read_bytes()
                print(f"{len(outcomes)} of {len(chosen)}: {mutant.file}:{mutant.line(source)}")
                print(f"    {mutant.kind}: {mutant.shown(source)}")
                result = each.found_by or ("SURVIVES" if each.is_decided else "NOT DECIDED")
                print(f"    {result} ({each.seconds:.0f} s)", flush=True)
        print(table(outcomes))


if __name__ == "__main__":
    main()
