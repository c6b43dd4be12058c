"""report.md, made from results.json alone."""

from pathlib import Path

from common.report.content import Block, Sections, introduction
from common.report.schema import Results


def write(folder: Path, results: Results, sections: Sections) -> Path:
    """Write report.md into the folder; it shows the figures that are saved in figures/."""
    parts = ["# Comparison", *introduction(results)]
    for title, blocks in sections.items():
        if texts := [*filter(None, map(_block, blocks))]:
            parts += [f"## {title}", *texts]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _block(block: Block) -> str:
    match block:
        case "heading", title:
            return f"### {title}"
        case (("table" | "folded"), table):
            return "\n".join(table.markdown())
        case (("figures" | "grid"), figures):
            return "\n\n".join(f"{f.title}\n\n![{f.title}](figures/{f.name}.png)" for f in figures)
        case "code", text:
            return "\n".join(f"    {line}" for line in text.splitlines())
        case "facts", facts:
            return "\n".join(f"- {key}: {value}" for key, value in facts.items())
        case (("hint" | "explorer"), _):
            return ""
    return block[1]
