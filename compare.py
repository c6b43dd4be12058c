"""Compare the GRU text classifiers in PyTorch and in JAX/Flax.

python compare.py                        train all models, check parity, write a report
python compare.py parity                 every implementation against the float64 oracle
python compare.py speed                  every GRU that runs here: tokens a second, latencies
python compare.py gpu                    the first ten minutes on an NVIDIA GPU (docs/gpu.md)
python compare.py questions              the benefit of gates, of both directions, of our own GRU
python compare.py tune                   search for better options, on held-out reviews
python compare.py report DIR             write the report again from DIR/results.json
python compare.py --help
"""

if __name__ in ("__main__", "__mp_main__"):  # the latter in the processes of `speed`
    from common.program import start

    # These processes measure PyTorch with its defaults; trainings are separate programs.
    start("torch", "jax", "train", "report", limit_spinning=False)

import dataclasses
import os
import platform
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import tyro
from rich.console import Console

from common import files
from common.errors import InputError, exit_on_input_error, masked
from common.linear import run as linear
from common.report import schema, tables
from common.report.schema import Check, Results
from common.training import run_directory
from common.training.options import (
    MODELS,
    PRESETS,
    Count,
    TrainConfig,
    parse_options,
    program,
    to_arguments,
)
from comparison import live, processes, runs
from comparison.processes import Job, Place

PACKAGES = ("torch", "jax", "jaxlib", "flax", "optax", "numpy", "gensim", "scikit-learn")
# Only the questions need other cells.
TWINS = {name: tuple(m for m in models if m.endswith("gru")) for name, models in MODELS.items()}
DRAW = ("compare", "report")  # python -m compare report DIR
COMPARED = {**TWINS, linear.FRAMEWORK: (linear.NAME,)}


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """Compare the GRU text classifiers in PyTorch and in JAX/Flax.

    all and accuracy train the models, and a linear one as a baseline, each in its own process, and
    check the parity of the twins on a real batch; all also checks the trained implementations
    against the oracle, on real reviews. parity checks every implementation, on all cases of the
    parity suite. speed times every GRU on this machine, in training and in inference. gpu compiles,
    checks and times the kernel for NVIDIA GPUs on the GPU of this machine. questions trains the
    models with several seeds and answers the homework's questions. tune searches for the learning
    rate, sizes and rates of dropout with the lowest loss on held-out training reviews, of the first
    of --frameworks and --models. report writes the report of an earlier comparison.
    """

    part: Annotated[
        Literal["all", "accuracy", "parity", "speed", "gpu", "questions", "tune", "report"],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[PART]"),
    ] = "all"
    """The part to run: all, accuracy, parity, speed, gpu, questions, tune or report."""
    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]")] = None
    """For report: the folder, as --out."""
    model: tyro.conf.Suppress[str] = "gru"
    resume: tyro.conf.Suppress[Path | None] = None
    frameworks: tuple[str, ...] = tuple(COMPARED)
    """The frameworks."""
    models: tuple[str, ...] = (linear.NAME, *TWINS["torch"])
    """The models; those that start with nn. are PyTorch's own layer, linear is scikit-learn's."""
    grid: Literal["short", "full"] = "short"
    """For speed: a few sizes, or all of B 1 to 256, T 50 to 1,000, H 64 to 512."""
    jobs: Count | None = None
    """The number of models that are trained at the same time, each on its share of the cores; None
    for one per core (one on a GPU, and where a process cannot be bound to cores). With 1, training
    times are those on all cores."""
    on: Literal["local", "slurm", "dask"] = "local"
    """Where models are trained: on this machine, as jobs of Slurm, or by the Dask scheduler that
    DASK_SCHEDULER_ADDRESS names (docs/scale.md)."""
    slurm: tuple[str, ...] = ()
    """With --on slurm: options of sbatch, such as partition=long time=60."""
    seeds: Count = 5
    """For questions: the number of seeds of each model, from --seed upwards."""
    trials: Count = 20
    """For tune: the total number of trials; the same command with a larger number continues."""
    storage: str | None = None
    """For tune: where trials are stored, a URL of a database in Optuna's form; OUT/trials.sqlite3
    by default. Processes and machines with the same storage share the work."""
    out: Path | None = Path("results")
    """The folder for results.json, report.html, report.md, figures and run directories."""

    def check(self) -> None:
        # tune itself holds out reviews.
        held_out = self.validation_size or int(self.part == "tune")
        super(CompareConfig, dataclasses.replace(self, validation_size=held_out)).check()
        if self.slurm and self.on != "slurm":
            raise InputError(f"--slurm {' '.join(self.slurm)}: needs --on slurm")
        if self.on != "local":
            processes.check(Place(self.on, slurm=self.slurm))
        if self.folder is not None and self.part != "report":
            raise InputError(f"{self.folder}: only report takes a folder; the others take --out")
        for name, chosen, known in (
            ("--frameworks", self.frameworks, tuple(COMPARED)),
            ("--models", self.models, CompareConfig.models),
        ):
            if not chosen or not {*chosen} <= {*known}:
                some = ", ".join(known)
                raise InputError(f"{name} {' '.join(chosen)}: expected some of {some}")


def main() -> None:
    """Run the command line; exit status 1 if a parity check fails."""
    with exit_on_input_error():
        options = parse_options(CompareConfig, "python compare.py")
        options.check()
        assert options.out is not None
        # Texts, such as names of models, have no markup.
        width = None if sys.stdout.isatty() else 120
        console = Console(width=width, highlight=False, markup=False)
        if options.part == "report":
            folder = options.folder or options.out
            print(write_report(folder, schema.read(folder / "results.json")))
            return
        with run_directory.lock(options.out):
            failed = compare(options, options.out, console)
        sys.exit(1 if failed else 0)


def compare(options: CompareConfig, out: Path, console: Console) -> bool:
    """Run a part, write results.json and, in a child process, the report.

    Returns whether a parity check failed.
    """
    path = out / "results.json"
    results = schema.read(path) if path.exists() else Results({"command": ""})
    gpu = results.environment.get("gpu")
    results.environment = environment()
    if gpu and options.part != "speed":  # results.speed was measured on this GPU
        results.environment["gpu"] = gpu
    match options.part:
        case "parity":
            from comparison import parity

            console.print("checking every implementation against the float64 oracle")
            rows = parity.run()
            console.print(*tables.oracle(rows))
            results.parity = [row for row in results.parity if row.models[1] != "oracle"] + rows
        case "speed":
            from comparison import speed

            tasks = speed.FULL if options.grid == "full" else speed.SHORT
            results.speed = measured = speed.measure(tasks, console.print)
            console.print(*tables.tasks(measured.rows, tables.TIMED))
            console.print(tables.lengths(measured), tables.recipe(measured))
            console.print(*tables.tasks(measured.inference, tables.LATENCY), tables.calls(measured))
        case "gpu":
            on_gpu(results, console)
        case "questions":
            answer_questions(options, results, console)
        case "tune":
            tune(options, out, results, console)
        case "all" | "accuracy":
            accuracy(options, out, results, console)
    schema.write(path, results)
    drawn = run_directory.draw(out, DRAW)
    failed = [check for check in results.parity if not check.passed]
    for check in failed:
        console.print("parity check failed:", style="red", end=" ")
        console.out(msgspec.json.encode(check).decode())
    if count := len(results.parity):
        console.print(f"{count - len(failed)} of {count} parity checks passed")
    if excesses := tables.excesses(results.parity):
        console.out(excesses)
    if drawn:
        console.out(f"report: {out / 'report.html'}")
    return bool(failed)


def on_gpu(results: Results, console: Console) -> None:
    """Compile, check and time the kernel for GPUs; fills in results."""
    from comparison import gpu, speed

    name = gpu.device_name()
    if name is None:
        raise InputError("gpu: PyTorch or JAX finds no CUDA device here")
    console.print(name)
    rows = gpu.check("cuda", console.print)
    names = {row.models[0] for row in rows}
    results.parity = [row for row in results.parity if row.models[0] not in names] + rows
    if not all(row.passed for row in rows):
        return
    results.environment["gpu"] = name
    results.speed = measured = speed.measure(gpu.TASKS, console.print, "cuda", gpu.chosen)
    console.print(*tables.tasks(measured.rows, tables.ON_GPU))
    gpu.sanitize(console.print)


def accuracy(options: CompareConfig, out: Path, results: Results, console: Console) -> None:
    """Train the models and check parity; fills in results."""
    from common.training.data import load_texts

    plain, chosen = options.plain(), trainings(options, out, console)
    known: list[str] = []  # every training loads the data and prints the same lines

    def print_line(line: str) -> None:
        known.append(line)
        console.out(line)

    load_texts(plain, print_line)
    twins = tuple(name for name in options.frameworks if name in TWINS)
    both = tuple(model for model in options.models if model in TWINS["jax"]) if twins else ()
    checked = twins and (both or options.part == "all")
    folders = {training.name: training.folder for training in chosen}
    with (
        tempfile.TemporaryDirectory(prefix=".parity-", dir=out) as name,
        live.Board(console, folders | ({"parity": out} if checked else {}), known) as board,
    ):
        path = Path(name, "rows.json")
        arguments = [*to_arguments(dataclasses.replace(plain, out=path)), "--models", *both]
        arguments += ["--frameworks", *twins]
        arguments += ["--oracle" if options.part == "all" else "--no-oracle"]
        others = [Job("parity", "comparison.checks", tuple(arguments))] if checked else []
        results.runs = runs.train(chosen, place(options), board.on_line, board.on_end, others)
        rows = schema.convert(files.read_json(path), list[Check], path) if checked else []
    # Prefer the data of a GRU, which has more details.
    results.data = min(chosen, key=lambda each: each.framework == linear.FRAMEWORK).data()
    if recurrent := [run for run in results.runs if run.framework in TWINS]:
        from comparison import explorer

        console.print("explaining a few test reviews word by word")
        results.explorer = explorer.explore(plain, recurrent)
    if len(twins) == len(TWINS):
        largest_rate = PRESETS["quick"]["learning_rate"] if plain.clip_norm else 0.0
        if plain.learning_rate <= max(largest_rate, TrainConfig.learning_rate):
            rows += [runs.check_losses(out, model) for model in both]
        rows += [runs.check_accuracy(results.runs, model) for model in both]
    suite = [row for row in rows if row.models[1] == "oracle"]
    if options.part == "accuracy":
        rows += [row for row in results.parity if row.models[1] == "oracle"]
    results.parity = rows
    console.print(tables.summary(results.runs), *tables.oracle(suite))


def trainings(options: CompareConfig, out: Path, console: Console) -> list[runs.Training]:
    """Each model in each framework that has it. Raises InputError if there is none."""
    plain = options.plain()
    chosen = [
        runs.Training.of(framework, model, plain, out / f"{framework}-{model}")
        for model in options.models
        for framework in options.frameworks
        if model in COMPARED[framework]
    ]
    if not chosen:
        models = "; ".join(f"{name} has {', '.join(COMPARED[name])}" for name in options.frameworks)
        raise InputError(f"--models {' '.join(options.models)}: {models}")
    missing = [m for m in options.models if not any(m in COMPARED[f] for f in options.frameworks)]
    if missing:
        console.print(f"left out, because no chosen framework has them: {', '.join(missing)}")
    return chosen


def place(options: CompareConfig) -> Place:
    """Where models are trained, and how many at the same time."""
    # Device files show whether there is a GPU; importing PyTorch would take a second.
    gpu = any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg"))
    max_jobs = 1 if options.device != "cpu" and gpu else processes.default_max_jobs()
    return Place(options.on, options.jobs or max_jobs, options.slurm, options.out)


def answer_questions(options: CompareConfig, results: Results, console: Console) -> None:
    """Train with several seeds and answer the homework's questions; fills in results."""
    from comparison import questions  # imports both frameworks

    names = [
        f"{framework} {model}"
        for framework in options.frameworks
        for model in (*options.models, "rnn")
        if model in COMPARED[framework] or (framework, model) == ("torch", "rnn")
    ]
    where = place(options)
    answers = questions.measure(options.plain(), names, options.seeds, where, console.out)
    results.questions = answers
    console.print(tables.pairs(answers.comparisons))
    for pair in answers.comparisons:
        console.out(f"{pair.title}: {pair.conclusion}")
    if answers.vanishing and answers.gates:
        console.print(tables.vanishing(answers.vanishing), *tables.gates(answers.gates))
        console.out(f"Vanishing gradients: {answers.vanishing.conclusion}")
        console.out(f"Irrelevant words: {answers.gates.conclusion}")


def tune(options: CompareConfig, out: Path, results: Results, console: Console) -> None:
    """Search for better options; fills in results."""
    from comparison import tuning

    framework = options.frameworks[0]
    if framework not in TWINS:
        raise InputError(f"--frameworks {framework}: tune is for {' and '.join(TWINS)}")
    model = next((m for m in options.models if m != linear.NAME), linear.NAME)
    if model not in TWINS[framework]:
        raise InputError(f"--models {model}: tune is for {', '.join(TWINS[framework])}")
    plain = dataclasses.replace(options.plain(), model=model)
    storage = options.storage or f"sqlite:///{out / 'trials.sqlite3'}"
    where = place(options)
    study = tuning.tune(framework, plain, storage, options.trials, where, console.out)
    results.tuning = study
    console.print(tables.trials(study))
    console.out(study.command or "no trial was completed")


def write_report(folder: Path, results: Results) -> Path:
    """Write report.html, report.md and the figures; returns the path of the page.

    Nothing in the folder is replaced until everything is drawn, so an error leaves the old report.
    """
    from common.report import content, html, markdown
    from comparison import twins

    sections = content.sections(results)
    with (
        files.writing(folder),
        tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as name,
    ):
        new = Path(name)
        (new / "figures").mkdir()
        for figure in content.shown(sections):
            figure.save(new / "figures" / f"{figure.name}.png")
        markdown.write(new, results, sections)
        html.write(new, results, {**sections, "Twins": twins.section()})
        (folder / "figures").mkdir(exist_ok=True)
        for path in new.rglob("*.*"):
            path.replace(folder / path.relative_to(new))
    return folder / "report.html"


def environment() -> dict[str, str | int]:
    """The command, and everything else that the results depend on, except the code."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    processor = re.search("^model name.*: (.+)", cpuinfo, re.MULTILINE)
    return {
        # A --storage may have a password.
        "command": masked(shlex.join([*program("python compare.py").split(), *sys.argv[1:]])),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor[1] if processor else platform.processor(),
        "cores": os.cpu_count() or 1,
        **{name: version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    main()
