"""Draw the figures of a finished run again.

python -m common.report RUN_DIR
"""

if __name__ == "__main__":
    from common.program import start

    start("train", "report")

import sys
from pathlib import Path

from common import files
from common.errors import InputError, exit_on_input_error
from common.report import figures
from common.report.schema import Config, Metrics, convert


@exit_on_input_error()
def main() -> None:
    """The command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise InputError("usage: python -m common.report RUN_DIR")
    draw(Path(sys.argv[1]))


def draw(folder: Path) -> None:
    """Replace the folder figures/ of a run directory, once all figures are drawn.

    Raises InputError for a config.json or metrics.json that is missing or damaged, and where the
    figures cannot be written.
    """
    config = convert(files.read_json(folder / "config.json"), Config, folder / "config.json")
    path = folder / "metrics.json"
    run = convert(files.read_json(path), Metrics, path)
    if problem := run.problem(config.classes):
        raise InputError(f"{path}: {problem}")
    target = folder / "figures"
    with files.writing(target), files.aside(target) as new:
        new.mkdir()
        figures.draw_run(new, run, config.classes, config.options.preset)
        files.remove(target)


if __name__ == "__main__":
    main()
