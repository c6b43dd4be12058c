"""The raw files of the Multi-Domain Sentiment Dataset (Blitzer, Dredze and Pereira, ACL 2007).

    amazon:DIR        DIR/CATEGORY/{positive,negative}.review

The files resemble XML but have no root element, unescaped ampersands and several encodings; every
tag is on its own line. A review is its title, which is often conclusive, and its text; the archives
of DLStudio omit the title.
"""

from collections.abc import Iterator
from pathlib import Path

from common.data.sources import files
from common.data.sources.dataset import Dataset, Example
from common.errors import InputError

CLASSES = ("negative", "positive")
_ENDS = (b"</title>", b"</review_text>")


def load(spec: str) -> Dataset:
    """All categories and both classes, without a split."""
    (folder,), _ = files.parse(spec)
    paths = sorted(path for label in CLASSES for path in folder.glob(f"*/{label}.review"))
    if not paths:
        layout = " and ".join(f"CATEGORY/{label}.review" for label in reversed(CLASSES))
        raise InputError(f"{folder}: expected {layout} in it")

    def examples() -> Iterator[Example]:
        for path in paths:
            label, category = path.stem, path.parent.name
            yield from (Example(text, label, category) for text in _texts(path))

    return Dataset(spec, examples, CLASSES, state=files.state(paths))


def _texts(path: Path) -> Iterator[str]:
    """Title and text of every review of a file."""
    count = review_line = 0
    parts: dict[bytes, str] = {}  # the parts of a review, by their end tags
    text: list[bytes] | None = None  # the lines of the part that is being read
    with files.open_file(path) as file:
        for number, line in files.lines(file, path):
            tag = line.strip() if line.startswith(b"<") else b""
            if tag == b"<review>":
                if review_line:
                    break
                review_line = number
            elif tag == b"</review>":
                title, body = map(parts.get, _ENDS)
                if not (review_line and body) or text is not None:
                    raise InputError(f"{path}: line {number:,}: the end of a review without a text")
                yield f"{title}\n{body}" if title else body
                count, review_line, parts = count + 1, 0, {}
            elif text is None:
                text = [] if tag in (b"<title>", b"<review_text>") else None
            elif tag in _ENDS:
                parts[tag], text = files.decode(b"".join(text)).strip(), None
            else:
                text.append(line)
    if review_line:
        raise InputError(f"{path}: line {review_line:,}: a review without an end")
    if not count:
        raise InputError(f"{path}: no review in it")
