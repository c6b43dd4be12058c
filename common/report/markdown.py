"""report.md, made from results.json alone. What came from data is escaped: see markdown_of."""

from pathlib import Path
from urllib.parse import quote

from common.report.content import Block, Sections, introduction
from common.report.schema import Results
from common.report.tables import markdown_of


def write(folder: Path, results: Results, sections: Sections) -> Path:
    """Write report.md into the folder; it shows the figures that are saved in figures/."""
    parts = ["# Comparison", *map(markdown_of, introduction(results))]
    for title, blocks in sections.items():
        if texts := [*filter(None, map(_block, blocks))]:
            parts += [f"## {title}", *texts]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _block(block: Block) -> str:
    match block:
        case "heading", title:
            return f"### {markdown_of(title)}"
        case (("table" | "folded"), table):
            return "\n".join(table.markdown())
        case (("figures" | "grid"), figures):
            shown = [(markdown_of(f.title), quote(f.name)) for f in figures]
            return "\n\n".join(f"{t}\n\n![{t}](figures/{name}.png)" for t, name in shown)
        case "code", text:
            return "\n".join(f"    {line}" for line in text.splitlines())
        case "facts", facts:
            lines = (markdown_of(f"{key}: {value}") for key, value in facts.items())
            return "\n".join(f"- {line}" for line in lines)
        case (("hint" | "explorer"), _):
            return ""
    return markdown_of(block[1])
