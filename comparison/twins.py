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
HEADER = (*TWINS.values(), "an instance of")
NOTHING = "—"
WIDTH = 52  # characters of a column: two of them fit GitHub's page
# Code of one twin, the other's code for it, and what that is an instance of.
DIFFERENCES = (
    (
        "F.linear(h, U_z, c_z)",
        "h @ U_z.T + c_z",
        "PyTorch computes each call by itself, and so has calls that do several things at once: "
        "linear, addmm, lerp. JAX has operators, which XLA compiles together.",
    ),
    (
        "torch.sigmoid",
        "jax.nn.sigmoid",
        "What NumPy has is in jax.numpy under NumPy's name, as tanh; what neural networks need "
        "besides is in jax.nn.",
    ),
    (
        "a.chunk(3, dim=-1)",
        "jnp.split(a, 3, axis=-1)",
        "A tensor's method is a function of the array, dim is axis.",
    ),
    (
        "a.split([2 * size, size], dim=-1)",
        "jnp.split(a, [2 * size], axis=-1)",
        "A trap: PyTorch's split takes the sizes of the parts, NumPy's and JAX's the places to cut "
        "at. A 3 is the size of each part in PyTorch, the number of parts in JAX.",
    ),
    (
        "torch.cat([bias_hh[: 2 * size], torch.zeros_like(c_n)])",
        "jnp.where(jnp.arange(3 * size) < 2 * size, bias_hh, 0)",
        "Cut and joined, or masked: the same numbers. XLA joins what is done element by element to "
        "what is done next.",
    ),
    (
        "torch.where(live[t], after, h)",
        "jnp.where(live, after, h)",
        "The same in both: a choice for each row without a branch, so that rows of a batch can "
        "differ in length.",
    ),
    (
        "for t in reversed(range(len(live)))",
        "jax.lax.scan(one, h, (*inputs, mask, begin), reverse=reverse)",
        "PyTorch runs a loop of Python's. jax.jit would write the step into its program once for "
        "each time step; scan compiles it once, as a function from the state, and what belongs to "
        "the time step, to the next state and what is to be kept.",
    ),
    (
        "h = states[t] =",
        "return h, h",
        "In place, or as a function: nothing can be written to an array of JAX. scan puts the "
        "second h of all steps into one array, as torch.stack does with the list.",
    ),
    (
        "else h.new_zeros(0, *h.shape)",
        NOTHING,
        "torch.stack takes no empty list; scan over no steps returns an array of none.",
    ),
    (
        NOTHING,
        "jax.checkpoint_policies.dots_saveable",
        "What the backward pass needs, PyTorch keeps. JAX is told to keep the products alone and "
        "to compute the rest again, which is faster here.",
    ),
    (
        "Raises ValueError",
        "under jax.jit, nothing can be raised",
        "PyTorch has the values of lengths and tokens when it is called. Under jax.jit there are "
        "none yet when Python runs: a row where they are out of range becomes NaN.",
    ),
)
FOR_WHOM = "A table to translate by, for one who ports from PyTorch to JAX or back. In short:"
IN_FULL = (
    "In full, function by function, without the docstrings. What differs is marked, but for the "
    "name of the type of arrays; a gap is what the other alone has."
)


@dataclass(frozen=True)
class Part:
    """A function, or what stands between two, in both twins."""

    name: str
    about: str
    """The first paragraph of the docstring; the table is without it."""
    table: str
    """HTML that GitHub shows, too, which lets through neither classes nor styles."""


def source(framework: str, file: str) -> str:
    """The text of a file of a twin."""
    return (ROOT / f"{framework}_impl" / f"{file}.py").read_text(encoding="utf-8")


def neutral(text: str) -> str:
    """With one name for the type of arrays, which differs throughout."""
    return text.replace("Array", "Tensor")


def parts() -> list[Part]:
    """The files from top to bottom, without the docstrings of the modules."""
    return [
        Part(name, about, table(ours.splitlines(), theirs.splitlines()))
        for file in FILES
        for (name, about, ours), (_, _, theirs) in zip(
            *(_parts(framework, file) for framework in TWINS), strict=True
        )
    ]


def _parts(framework: str, file: str) -> Iterator[tuple[str, str, str]]:
    """Name, first paragraph of the docstring, and text without it."""

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
    """Lines side by side, what differs marked."""
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
    """The lines in their order, in pairs as alike as can be; a line opposite none has ""."""

    @cache
    def best(i: int, j: int) -> tuple[float, list[tuple[str, str]]]:
        if i == len(ours) or j == len(theirs):
            return 0, [*((line, "") for line in ours[i:]), *(("", line) for line in theirs[j:])]
        alike = _compared(ours[i], theirs[j]).ratio()
        ways = [
            (alike - 0.5, (ours[i], theirs[j]), best(i + 1, j + 1)),  # less alike, better alone
            (0, (ours[i], ""), best(i + 1, j)),
            (0, ("", theirs[j]), best(i, j + 1)),
        ]
        gain, pair, (total, rest) = max(ways, key=lambda way: way[0] + way[2][0])
        return gain + total, [pair, *rest]

    return best(0, 0)[1]


def _words(line: str) -> list[str]:
    return re.findall(r"\s+|[\w.]+\s*|.\s*", line)


def _compared(ours: str, theirs: str) -> SequenceMatcher:
    return SequenceMatcher(None, _words(neutral(ours)), _words(neutral(theirs)), autojunk=False)


def _marks(ours: str, theirs: str) -> tuple[list[bool], list[bool]]:
    """For each character of two lines, whether the other has something else there."""
    left, right = _words(ours), _words(theirs)
    marks: tuple[list[bool], list[bool]] = ([], [])
    for kind, a, b, c, d in _compared(ours, theirs).get_opcodes():
        for found, words in zip(marks, (left[a:b], right[c:d]), strict=True):
            for word in words:
                found.extend([kind != "equal" and not word.isspace()] * len(word))
    return marks


def _folded(text: str, marks: Sequence[bool]) -> Iterator[str]:
    """A line in lines that fit the column, in HTML."""
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

writes this page from gru.py and scan.py in [torch_impl](../torch_impl) and
[jax_impl](../jax_impl).

{FOR_WHOM}

| {" | ".join(HEADER)} |
|---|---|---|
{rows}

{IN_FULL.replace("marked", "<mark>marked</mark>")}

{tables}
"""


def section() -> list[Block]:
    """The section of report.html."""
    return [
        ("note", FOR_WHOM),
        ("table", Table("In short", HEADER, DIFFERENCES, names=3)),
        ("note", IN_FULL),
        ("twins", parts()),
    ]


@exit_on_input_error()
def main() -> None:
    """Write docs/twins.md."""
    with files.writing(PAGE):
        files.replace(PAGE, markdown().encode())


if __name__ == "__main__":
    main()
