"""Compare the GRU text classifiers in PyTorch and in JAX/Flax.

python compare.py                        train all models, check parity, write a report
python compare.py parity                 every implementation against the float64 oracle
python compare.py speed                  every GRU that runs here: tokens a second, latencies
python compare.py gpu                    the first ten minutes on an NVIDIA GPU (docs/gpu.md)
python compare.py questions              does gating help, does reading both ways, handwriting?
python compare.py tune                   search for better options, on held-out reviews
python compare.py report DIR             write the report again from DIR/results.json
python compare.py --help
"""

if __name__ in ("__main__", "__mp_main__"):  # the second is that of the processes of `speed`
    from common.program import start

    # These processes measure PyTorch with its defaults; trainings run in programs of their own.
    start("torch", "jax", "train", "report", limit_spinning=False)

import dataclasses
import os
import platform
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import tyro
from rich.console import Console

from common import files
from common.errors import InputError, exit_on_input_error, masked
from common.linear import run as linear
from common.report import schema, tables
from common.report.schema import Check, Results, Run
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

if TYPE_CHECKING:
    from comparison.processes import Place
    from comparison.runs import Training

PACKAGES = ("torch", "jax", "jaxlib", "flax", "optax", "numpy", "gensim", "scikit-learn")
# Other cells are for the questions alone.
TWINS = {name: tuple(m for m in models if m.endswith("gru")) for name, models in MODELS.items()}
DRAW = ("compare", "report")  # python -m compare report DIR
COMPARED = {**TWINS, linear.FRAMEWORK: (linear.NAME,)}


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """Compare the GRU text classifiers in PyTorch and in JAX/Flax.

    all and accuracy train the models, and a linear one to hold them against, each in a process of
    its own, and check the twins' parity on a real batch; all also checks what it trains against the
    oracle, on real reviews; parity checks every implementation, on all cases of the parity suite;
    speed times every GRU that runs here, in training and in inference; gpu compiles, checks and
    times the kernel for NVIDIA GPUs on the one that is here; questions trains the models with
    several seeds and answers the homework's questions; tune searches for the learning rate,
    sizes and rates of dropout with the lowest loss on held-out training reviews, of the first of
    --frameworks and --models; report writes the report of an earlier comparison.
    """

    part: Annotated[
        Literal["all", "accuracy", "parity", "speed", "gpu", "questions", "tune", "report"],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[PART]"),
    ] = "all"
    """What to do: all, accuracy, parity, speed, gpu, questions, tune or report."""
    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]")] = None
    """For report: the folder, as --out."""
    model: tyro.conf.Suppress[str] = "gru"
    resume: tyro.conf.Suppress[Path | None] = None
    frameworks: tuple[str, ...] = tuple(COMPARED)
    """Which frameworks."""
    models: tuple[str, ...] = (linear.NAME, *TWINS["torch"])
    """Which models; the nn. ones are PyTorch's own layer, linear is scikit-learn's."""
    grid: Literal["short", "full"] = "short"
    """For speed: a few sizes, or all of B 1 to 256, T 50 to 1,000, H 64 to 512."""
    jobs: Count | None = None
    """How many models are trained at a time, each on its share of the cores; None for one a core
    (on a GPU, and where cores cannot be shared out, one). 1 for times that all cores give."""
    on: Literal["local", "slurm", "dask"] = "local"
    """Where models are trained: here, as jobs of Slurm, or by the Dask that DASK_SCHEDULER_ADDRESS
    names (docs/scale.md)."""
    slurm: tuple[str, ...] = ()
    """With --on slurm: options of sbatch, as partition=long time=60."""
    seeds: Count = 5
    """For questions: with how many seeds each model is trained, --seed and the ones after it."""
    trials: Count = 20
    """For tune: how many trials there shall be; the same command with more goes on."""
    storage: str | None = None
    """For tune: where the trials are kept, a URL of a database as Optuna has it; OUT/trials.sqlite3
    by default. Processes and machines that name the same one share the work."""
    out: Path | None = Path("results")
    """The folder for results.json, report.html, report.md, figures and run directories."""

    def check(self) -> None:
        # tune holds out reviews by itself.
        held_out = self.validation_size or int(self.part == "tune")
        super(CompareConfig, dataclasses.replace(self, validation_size=held_out)).check()
        if self.slurm and self.on != "slurm":
            raise InputError(f"--slurm {' '.join(self.slurm)}: needs --on slurm")
        if self.on != "local":
            from comparison import processes

            processes.check(processes.Place(self.on, slurm=self.slurm))
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
    """Run the command line; exit status 1 where a parity check fails."""
    with exit_on_input_error():
        options = parse_options(CompareConfig, "python compare.py")
        options.check()
        assert options.out is not None
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        if options.part == "report":
            folder = options.folder or options.out
            print(write_report(folder, schema.read(folder / "results.json")))
            return
        with run_directory.lock(options.out):
            failed = compare(options, options.out, console)
        sys.exit(1 if failed else 0)


def compare(options: CompareConfig, out: Path, console: Console) -> bool:
    """Do the parts that were asked for, write results.json and, in a child process, the report.

    Returns whether a parity check failed.
    """
    path = out / "results.json"
    results = schema.read(path) if path.exists() else Results({"command": ""})
    results.environment = environment()
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
            results.speed = found = speed.measure(tasks, console.print)
            console.print(*tables.tasks(found.rows, tables.TIMED))
            console.print(tables.lengths(found), tables.recipe(found))
            console.print(*tables.tasks(found.inference, tables.LATENCY), tables.calls(found))
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
        console.print("[red]parity check failed:[/red]", end=" ")
        console.print(msgspec.json.encode(check).decode(), markup=False, soft_wrap=True)
    if count := len(results.parity):
        console.print(f"{count - len(failed)} of {count} parity checks passed")
    if excesses := tables.excesses(results.parity):
        console.print(excesses, markup=False, soft_wrap=True)
    if drawn:
        console.print(f"report: {out / 'report.html'}", markup=False, soft_wrap=True)
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
    results.speed = found = speed.measure(gpu.TASKS, console.print, "cuda", gpu.chosen)
    console.print(*tables.tasks(found.rows, tables.ON_GPU))
    gpu.sanitize(console.print)


def accuracy(options: CompareConfig, out: Path, results: Results, console: Console) -> None:
    """Train the models and check parity; fills in results."""
    from common.training.data import load_texts
    from comparison import live, runs
    from comparison.processes import Job

    plain, chosen = options.plain(), trainings(options, out, console)
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        console.print(line, markup=False, soft_wrap=True)

    load_texts(plain, tell)
    folders = {training.name: training.folder for training in chosen}
    twins = tuple(name for name in options.frameworks if name in TWINS)
    both = tuple(model for model in options.models if model in TWINS["jax"]) if twins else ()
    checked = twins and (both or options.part == "all")

    def say(name: str, line: str) -> None:
        if line not in told:  # every process loads the data, of which `tell` has told
            board.say(name, folders.get(name, path), line)

    def done(name: str, run: Run | None) -> None:
        if run:
            board.finish(name, f"{run.accuracy:.2%}", f"{run.tokens_per_second:,.0f}")
        else:
            board.finish(name, "done")

    with (
        tempfile.TemporaryDirectory(prefix=".parity-", dir=out) as name,
        live.Board(console, [*folders, *(["parity"] if checked else [])]) as board,
    ):
        path = Path(name, "rows.json")
        arguments = [*to_arguments(dataclasses.replace(plain, out=path)), "--models", *both]
        arguments += ["--frameworks", *twins]
        arguments += ["--oracle" if options.part == "all" else "--no-oracle"]
        beside = [Job("parity", "comparison.checks", tuple(arguments))] if checked else []
        results.runs = runs.train(chosen, place(options), say, done, beside=beside)
        rows = schema.convert(files.read_json(path), list[Check], path) if checked else []
    # A GRU's, if there is one: it says more.
    results.data = min(chosen, key=lambda each: each.framework == linear.FRAMEWORK).data()
    if recurrent := [run for run in results.runs if run.framework in TWINS]:
        from comparison import explorer

        console.print("explaining a few test reviews word by word")
        results.explorer = explorer.explore(plain, recurrent)
    if len(twins) == len(TWINS):
        quickest = PRESETS["quick"]["learning_rate"] if plain.clip_norm else 0.0
        if plain.learning_rate <= max(quickest, TrainConfig.learning_rate):
            rows += [runs.check_losses(out, model) for model in both]
        rows += [runs.check_accuracy(results.runs, model) for model in both]
    suite = [row for row in rows if row.models[1] == "oracle"]
    if options.part == "accuracy":
        rows += [row for row in results.parity if row.models[1] == "oracle"]
    results.parity = rows
    console.print(tables.summary(results.runs), *tables.oracle(suite))


def trainings(options: CompareConfig, out: Path, console: Console) -> "list[Training]":
    """What to train: each model in each framework that has it. Raises InputError if none has."""
    from comparison import runs

    plain = options.plain()
    chosen = [
        runs.Training.of(framework, model, plain, out / f"{framework}-{model}")
        for model in options.models
        for framework in options.frameworks
        if model in COMPARED[framework]
    ]
    if not chosen:
        there = "; ".join(f"{name} has {', '.join(COMPARED[name])}" for name in options.frameworks)
        raise InputError(f"--models {' '.join(options.models)}: {there}")
    missing = [m for m in options.models if not any(m in COMPARED[f] for f in options.frameworks)]
    if missing:
        console.print(f"left out, for want of their framework: {', '.join(missing)}")
    return chosen


def place(options: CompareConfig) -> "Place":
    """Where to train models, and how many at a time."""
    from comparison.processes import Place, default_max_jobs

    # Not asked of PyTorch, which takes a second to import: it is only about a default.
    gpu = any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg"))
    max_jobs = 1 if options.device != "cpu" and gpu else default_max_jobs()
    return Place(options.on, options.jobs or max_jobs, options.slurm, options.out)


def answer_questions(options: CompareConfig, results: Results, console: Console) -> None:
    """Train with several seeds and answer the homework's questions; fills in results."""
    from comparison import questions  # which imports both frameworks

    names = [
        f"{framework} {model}"
        for framework in options.frameworks
        for model in (*options.models, "rnn")
        if model in COMPARED[framework] or (framework, model) == ("torch", "rnn")
    ]

    say = partial(console.print, markup=False, soft_wrap=True)
    found = questions.measure(options.plain(), names, options.seeds, place(options), say)
    results.questions = found
    console.print(tables.pairs(found.comparisons))
    for pair in found.comparisons:
        say(f"{pair.title}: {pair.conclusion}")
    if found.vanishing and found.gates:
        console.print(tables.vanishing(found.vanishing), *tables.gates(found.gates))
        say(f"Vanishing gradients: {found.vanishing.conclusion}")
        say(f"Irrelevant words: {found.gates.conclusion}")


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

    say = partial(console.print, markup=False, soft_wrap=True)
    found = tuning.tune(framework, plain, storage, options.trials, place(options), say)
    results.tuning = found
    console.print(tables.trials(found))
    say(found.command or "no trial was completed")


def write_report(folder: Path, results: Results) -> Path:
    """Write report.html, report.md and the figures; returns the path of the page.

    All is drawn before anything in the folder is replaced, so that what goes wrong leaves no half.
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
    """What the numbers depend on besides the code."""
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
