"""gru.py and scan.py of the twins side by side, with marked differences.

The page is docs/twins.md; report.html has it as a section.

python -m comparison.twins               write docs/twins.md
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from html import escape
from itertools import groupby, zip_longest
from pathlib import Path
from textwrap import TextWrapper

from common import files
from common.errors import exit_on_input_error
from common.report.content import Block
from common.report.tables import Table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "twins.md"
TWINS = {"torch": "PyTorch", "jax": "JAX"}
FILES = ("gru", "scan")
HEADER = (*TWINS.values(), "difference")
NOTHING = "—"
WIDTH = 52  # characters of a column: two of them fit GitHub's page
# PyTorch's code, JAX's code for the same operation, and the difference that they illustrate.
DIFFERENCES = (
    (
        "F.linear(h, U_z, c_z)",
        "h @ U_z.T + c_z",
        "PyTorch executes each call separately and therefore has functions that combine several "
        "operations (linear, addmm, lerp). XLA compiles JAX's operators together.",
    ),
    (
        "torch.sigmoid",
        "jax.nn.sigmoid",
        "NumPy's functions, such as tanh, are in jax.numpy under NumPy's names; other functions of "
        "neural networks are in jax.nn.",
    ),
    (
        "a.chunk(3, dim=-1)",
        "jnp.split(a, 3, axis=-1)",
        "A method of the tensor corresponds to a function of the array, and dim to axis.",
    ),
    (
        "a.split([2 * size, size], dim=-1)",
        "jnp.split(a, [2 * size], axis=-1)",
        "PyTorch's split takes the sizes of the parts; NumPy's and JAX's split takes the indices "
        "at which to split. The argument 3 means parts of size 3 in PyTorch, three parts in JAX.",
    ),
    (
        "torch.cat([bias_hh[: 2 * size], torch.zeros_like(c_n)])",
        "jnp.where(jnp.arange(3 * size) < 2 * size, bias_hh, 0)",
        "Concatenation and masking give the same values. XLA fuses the elementwise mask with the "
        "next operation.",
    ),
    (
        "torch.where(live[t], after, h)",
        "jnp.where(live, after, h)",
        "Both frameworks select a value for each row without a branch, so that the rows of a batch "
        "can differ in length.",
    ),
    (
        "for t in reversed(range(len(live)))",
        "jax.lax.scan(one, h, (*inputs, mask, begin), reverse=reverse)",
        "PyTorch runs a Python loop, which jax.jit would unroll over all time steps. scan compiles "
        "the step once, as a function from a state and the inputs of a time step to the next state "
        "and an output.",
    ),
    (
        "h = states[t] =",
        "return h, h",
        "PyTorch assigns in place. JAX's arrays are immutable: scan stacks the second h of all "
        "time steps, as torch.stack stacks the list.",
    ),
    (
        "else h.new_zeros(0, *h.shape)",
        NOTHING,
        "torch.stack rejects an empty list; scan over zero steps returns an empty array.",
    ),
    (
        NOTHING,
        "jax.checkpoint_policies.dots_saveable",
        "PyTorch saves all that the backward pass needs. In JAX, this policy saves the matrix "
        "products only, and the backward pass recomputes the rest, which is faster here.",
    ),
    (
        "Raises ValueError",
        "under jax.jit, no error is raised",
        "PyTorch knows the values of lengths and tokens at the call. Under jax.jit the values are "
        "unknown while Python traces, so rows with a value out of range become NaN.",
    ),
)
SUMMARY = "The table translates PyTorch to JAX."
LISTING = (
    "The functions of both files follow, without docstrings. Differences are marked, except the "
    "name of the array type. A gap means that the line has no counterpart."
)


@dataclass(frozen=True)
class Part:
    """A function, or the statements between two functions, in both twins."""

    name: str
    about: str
    """The first paragraph of the docstring, which the table omits."""
    table: str
    """HTML without classes and styles, which GitHub would remove."""


def source(framework: str, file: str) -> str:
    """The text of a file of a twin."""
    return (ROOT / f"{framework}_impl" / f"{file}.py").read_text(encoding="utf-8")


def neutral(text: str) -> str:
    """The text with the same name for the array type in both twins."""
    return text.replace("Array", "Tensor")


def parts() -> list[Part]:
    """The parts of the files in order, without the docstrings of the modules."""
    return [
        Part(name, about, table(ours.splitlines(), theirs.splitlines()))
        for file in FILES
        for (name, about, ours), (_, _, theirs) in zip(
            *(_parts(framework, file) for framework in TWINS), strict=True
        )
    ]


def _parts(framework: str, file: str) -> Iterator[tuple[str, str, str]]:
    """Name, first paragraph of the docstring and text without the docstring of each part."""

    def name(node: ast.stmt) -> str:
        if isinstance(node, ast.FunctionDef):
            return node.name
        imports = isinstance(node, ast.Import | ast.ImportFrom)
        return f"imports of {file}.py" if imports else "recurrences"

    text = source(framework, file)
    first, *nodes = ast.parse(text).body
    end = first.end_lineno
    for title, group in groupby(nodes, name):
        *_, node = group
        start, end = end, node.end_lineno
        part, about = "\n".join(text.splitlines()[start:end]).strip("\n"), ""
        if isinstance(node, ast.FunctionDef):
            about = str(ast.get_docstring(node)).partition("\n\n")[0]
            part = part.replace(f"    {ast.get_source_segment(text, node.body[0])}\n", "")
        yield title, about, part


def table(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """HTML of the lines side by side, with marked differences."""
    lines: list[tuple[str, ...]] = []
    for pair in _aligned(ours, theirs):
        lines += zip_longest(*map(_folded, pair, _marks(*pair)), fillvalue="")
    head = "".join(f"<th>{name}</th>" for name in TWINS.values())
    # On a line of its own, pre may hold empty lines in Markdown.
    cells = [
        "<td>\n\n<pre>\n" + "\n".join(column) + "\n</pre>\n</td>"
        for column in zip(*lines, strict=True)
    ]
    return "\n".join(
        ["<table>", f"<thead><tr>{head}</tr></thead>", "<tr>", *cells, "</tr>", "</table>"]
    )


def _aligned(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[str, str]]:
    """The lines in order, in the most similar pairs; a line without a counterpart has ""."""

    @cache
    def best(i: int, j: int) -> tuple[float, list[tuple[str, str]]]:
        if i == len(ours) or j == len(theirs):
            return 0, [*((line, "") for line in ours[i:]), *(("", line) for line in theirs[j:])]
        alike = _compared(ours[i], theirs[j]).ratio()
        choices = [
            (alike - 0.5, (ours[i], theirs[j]), best(i + 1, j + 1)),  # less alike, better alone
            (0, (ours[i], ""), best(i + 1, j)),
            (0, ("", theirs[j]), best(i, j + 1)),
        ]
        gain, pair, (total, rest) = max(choices, key=lambda choice: choice[0] + choice[2][0])
        return gain + total, [pair, *rest]

    return best(0, 0)[1]


def _words(line: str) -> list[str]:
    return re.findall(r"\s+|[\w.]+\s*|.\s*", line)


def _compared(ours: str, theirs: str) -> SequenceMatcher:
    return SequenceMatcher(None, _words(neutral(ours)), _words(neutral(theirs)), autojunk=False)


def _marks(ours: str, theirs: str) -> tuple[list[bool], list[bool]]:
    """For each character of both lines, whether it differs from the other line."""
    left, right = _words(ours), _words(theirs)
    marks: tuple[list[bool], list[bool]] = ([], [])
    for kind, a, b, c, d in _compared(ours, theirs).get_opcodes():
        for of_line, words in zip(marks, (left[a:b], right[c:d]), strict=True):
            for word in words:
                of_line.extend([kind != "equal" and not word.isspace()] * len(word))
    return marks


def _folded(text: str, marks: Sequence[bool]) -> Iterator[str]:
    """HTML of a line, wrapped to the width of a column."""
    fold = TextWrapper(WIDTH, break_long_words=False, break_on_hyphens=False)
    fold.subsequent_indent = indent = " " * (len(text) - len(text.lstrip()) + 8)
    end = 0
    for part in fold.wrap(text) or [""]:
        words = part.removeprefix(indent) if end else part
        start = text.index(words, end)
        line, end = indent if end else "", start + len(words)
        for differs, group in groupby(range(start, end), marks.__getitem__):
            piece = escape("".join(text[i] for i in group), quote=False)
            line += f"<mark>{piece}</mark>" if differs else piece
        yield line


def markdown() -> str:
    """docs/twins.md."""
    rows = "\n".join(f"| `{ours}` | `{theirs}` | {why} |" for ours, theirs, why in DIFFERENCES)
    texts = (text for part in parts() for text in (f"## {part.name}", part.about, part.table))
    tables = "\n\n".join(filter(None, texts))
    return f"""# The twins side by side

    python -m comparison.twins

This command writes this page from gru.py and scan.py in [torch_impl](../torch_impl) and
[jax_impl](../jax_impl). {SUMMARY}

| {" | ".join(HEADER)} |
|---|---|---|
{rows}

{LISTING.replace("marked", "<mark>marked</mark>")}

{tables}
"""


def section() -> list[Block]:
    """The section of report.html."""
    return [
        ("note", SUMMARY),
        ("table", Table("Differences", HEADER, DIFFERENCES, names=3)),
        ("note", LISTING),
        ("twins", parts()),
    ]


@exit_on_input_error()
def main() -> None:
    """Write docs/twins.md."""
    with files.writing(PAGE):
        files.replace(PAGE, markdown().encode())


if __name__ == "__main__":
    main()
