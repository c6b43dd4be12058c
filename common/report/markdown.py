"""report.md, made from results.json alone."""

from pathlib import Path

from common.report.content import Block, Figures, introduction, sections
from common.report.schema import Results


def write(folder: Path, results: Results, found: Figures) -> Path:
    """Write report.md into the folder; it shows the figures `found`, as saved in figures/."""
    environment = results.environment
    parts = ["# Comparison", f"    {environment['command']}", *introduction(results)]
    for section in sections(results, found):
        parts.append(f"## {section.title}")
        parts += filter(None, map(_block, section.blocks))
    parts.append("## Environment")
    parts.append(
        "\n".join(f"- {key}: {value}" for key, value in environment.items() if key != "command")
    )
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
            shown = (f"{f.title}\n\n![{f.title}](figures/{f.name}.png)" for f in figures)
            return "\n\n".join(shown)
        case "code", text:
            return "\n".join(f"    {line}" for line in text.splitlines())
        case "hint", _:
            return ""
    return block[1]
