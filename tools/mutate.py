"""Random single changes of the program: the default tests have to find those that change behaviour.

    python -m tools.mutate --count 200 --seed 0
    python -m tools.mutate --count 50 --paths torch_impl common/kernels/gru.cpp

The first run measures which tests execute which lines (coverage.py, some ten minutes), and keeps
the measurement in the cache until a file changes. Each mutant is then a copy of the working tree
with one change, in which the default tests that execute the changed line run, the fastest first,
until one fails. For C++, whose lines coverage.py does not see, they are those of CPP_TESTS.

A survivor either needs a test or behaves as the original does, which its reader has to decide.
"""

import ast
import hashlib
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
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from xml.etree import ElementTree

from common.data.cache import cached
from common.errors import InputError, exit_on_input_error
from common.training.options import parse_options
from tools.planted_faults import JOBS, ROOT, copy_tree

KERNEL = "common/kernels"
PRODUCT = ("torch_impl", "jax_impl", "common", "comparison")
CPP_TESTS = {
    f"{KERNEL}/cuda": ("tests/gpu",),
    f"{KERNEL}/xla": ("tests/jax_impl", "tests/layers", "tests/parity"),
    f"{KERNEL}/tensors.cpp": ("tests/torch_impl", "tests/layers", "tests/parity"),
    KERNEL: ("tests/kernel", "tests/torch_impl", "tests/jax_impl", "tests/layers", "tests/parity"),
}
"""The tests of C++ files: those of the first key that a file's name starts with."""
TIME_LIMIT = 60  # seconds for one test; a mutant that hangs is found
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
    """Change the program at random places; print a table of the changes that no test finds."""

    count: int = 200
    """How many mutants; all that there are, if these are fewer."""
    seed: int = 0
    """Seed of the choice among them."""
    paths: tuple[str, ...] = (*PRODUCT,)
    """Files and folders of the repository whose mutants are drawn."""


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
        """Whether it parses, as something else than the source does."""
        if not self.file.endswith(".py"):
            return True
        try:
            return ast.dump(ast.parse(self.changed(source))) != ast.dump(ast.parse(source))
        except SyntaxError:  # the text of an argument in parentheses, say
            return False

    def line(self, source: bytes) -> int:
        return source.count(b"\n", 0, self.start) + 1

    def shown(self, source: bytes) -> str:
        """The line before and after, as Markdown."""
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
    """Mutants of the files and folders, in random order. Raises InputError for a path without."""
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


def run(tree: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of Python in a copy of the tree, with temporary files beside it."""
    temporary = tree.parent / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    own = {"PYTHONPATH": str(tree), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    own["GRU_TWINS_CACHE"] = str(tree.parent / "cache")
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return result.returncode, result.stdout


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def measure(tree: Path, into: Path) -> None:
    """Run the default tests once: which lines they execute, how long they take, which ones fail."""
    (tree / ".coveragerc").write_text(COVERAGE.replace("{tree}", str(tree)))
    tests = ["-n", str(JOBS), "-o", "junit_family=xunit1", f"--junitxml={into / 'tests.xml'}"]
    lines = ["--cov", "--cov-config=.coveragerc", "--cov-context=test", "--cov-report="]
    status, output = run(tree, *PYTEST, *tests, *lines, COVERAGE_FILE=str(into / "coverage"))
    print(output.rpartition("short test summary")[2], flush=True)
    if status not in (0, 1):
        raise InputError(f"the tests cannot be run without a change either: {output[-2000:]}")
    (into / "tree").write_text(str(tree))


@dataclass(frozen=True)
class Measured:
    """What the default tests do without a change."""

    seconds: dict[str, float]
    """Test functions that pass, and the time that all their cases take."""
    reached: dict[str, dict[int, set[str]]]
    """Test functions that execute a line, by file and line; line 0: those that execute any."""

    def tests(self, file: str, line: int) -> list[str]:
        """The test functions that execute a line, the fastest first."""
        if file.endswith(".py"):
            lines = self.reached[file]
            of = lines[line] or lines[0]  # what runs at import belongs to no test
        else:
            rooms = next(tests for key, tests in CPP_TESTS.items() if file.startswith(key))
            of = {test for test in self.seconds if test.startswith(rooms)}
        return sorted(of & self.seconds.keys(), key=self.seconds.__getitem__)


def read(folder: Path) -> Measured:
    """What `measure` has left in a folder."""
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
    found_by: str  # what failed first; empty for a survivor
    tests: int  # functions that execute the line
    seconds: float


def try_out(mutant: Mutant, tests: Sequence[str], tree: Path) -> Outcome:
    """Run the tests in the tree with the change, and take the change back."""
    begin = time.monotonic()
    path, library, names = tree / mutant.file, tree / KERNEL / "libgru.so", tree.parent / "tests"
    original, built = path.read_bytes(), library.read_bytes()
    path.write_bytes(mutant.changed(original))
    names.write_text("\n".join(tests))
    status, found = 0, ""
    if not mutant.file.endswith(".py"):
        status, _ = run(tree, "-m", "common.kernels.build")
        found = "the compiler" if status else ""
    if tests and not status:
        limit = f"faulthandler_timeout={TIME_LIMIT}"
        status, output = run(tree, *PYTEST, "-x", "-n0", "-o", limit, f"@{names}")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        found = failed[1] if failed else f"exit status {status}" if status else ""
    path.write_bytes(original)
    library.write_bytes(built)
    return Outcome(found, len(tests), time.monotonic() - begin)


def table(outcomes: dict[Mutant, Outcome]) -> str:
    """How many are found, of all, of each kind and in each file; and the survivors one by one."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for mutant, outcome in outcomes.items():
        for group in ("", mutant.kind, mutant.file):
            groups[group].append(bool(outcome.found_by))
    lines = ["| of | mutants | found |", "| --- | ---: | ---: |"]
    lines += [
        f"| {each or 'all'} | {len(groups[each])} | {sum(groups[each])} |"
        for each in sorted(groups)
    ]
    lines += ["", "| survivor | kind | change | tests |", "| --- | --- | --- | ---: |"]
    survivors = (mutant for mutant, outcome in outcomes.items() if not outcome.found_by)
    for mutant in sorted(survivors, key=lambda each: (each.file, each.start)):
        source = (ROOT / mutant.file).read_bytes()
        change = mutant.shown(source).replace("|", "\\|")
        where, tests = f"{mutant.file}:{mutant.line(source)}", outcomes[mutant].tests
        lines.append(f"| {where} | {mutant.kind} | {change} | {tests} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with exit_on_input_error():
        options = parse_options(Options, "python -m tools.mutate")
        chosen = draw(options.paths, options.count, options.seed)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
            first = Path(folder, "0/tree")
            copy_tree(first)
            if (ROOT / "../shared").exists():
                Path(folder, "0/shared").symlink_to((ROOT / "../shared").resolve())
            status, output = run(first, "-m", "common.kernels.build")
            if status:
                raise InputError(f"the kernel cannot be built: {output}")
            files = sorted(path for path in first.rglob("*") if path.suffix in LANGUAGES)
            key = {"of": hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()}
            measured = read(cached("mutate", key, partial(measure, first)))
            trees: SimpleQueue[Path] = SimpleQueue()
            for i in range(JOBS):
                if i:
                    shutil.copytree(first.parent, Path(folder, str(i)), symlinks=True)
                trees.put(Path(folder, str(i), "tree"))

            def outcome(mutant: Mutant) -> Outcome:
                line = mutant.line((ROOT / mutant.file).read_bytes())
                tree = trees.get()
                try:
                    return try_out(mutant, measured.tests(mutant.file, line), tree)
                finally:
                    trees.put(tree)

            outcomes: dict[Mutant, Outcome] = {}
            for mutant, each in zip(chosen, pool.map(outcome, chosen), strict=True):
                outcomes[mutant] = each
                source = (ROOT / mutant.file).read_bytes()
                print(f"{len(outcomes)} of {len(chosen)}: {mutant.file}:{mutant.line(source)}")
                print(f"    {mutant.kind}: {mutant.shown(source)}")
                print(f"    {each.found_by or 'SURVIVES'} ({each.seconds:.0f} s)", flush=True)
        print(table(outcomes))


if __name__ == "__main__":
    main()
