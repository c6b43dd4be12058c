"""Export a trained classifier to a file that runs without this project: the export programs.

A JSON file beside it describes the conversion of a text to token numbers: docs/export.md.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import Float32, Int, Int32

from common import files
from common.data.text import specification
from common.errors import InputError, exit_on_input_error
from common.extras import require
from common.inference import model
from common.inference.predictor import Framework
from common.training.options import parse_options
from common.training.run_directory import Run, load_run

FORMAT = 1  # of the JSON file
# Relative to the largest logit: a thousand times the rounding error, far below a fault's.
_LARGEST_DIFFERENCE = 1e-3

Call = Callable[[Int32[np.ndarray, "B T"], Int32[np.ndarray, " B"]], Float32[np.ndarray, "B C"]]
"""The exported model, read again: logits from tokens (any values at padding) and lengths."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Export a trained classifier to a file that runs without this project.

    Its input is token numbers. The JSON file that is written beside it, FILE.json for FILE.onnx,
    describes the conversion of a text; docs/export.md has programs in Python and JavaScript.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The run directory of a trained model."""
    to: str
    """onnx (ONNX Runtime) or the framework's own: torch (torch.export), stablehlo (jax.export)."""
    out: Path
    """The file to write; an existing one is replaced."""
    int8: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --to onnx: store word vectors in int8, by ONNX Runtime's dynamic quantization."""


def main(
    framework: Framework, name: str, save: Callable[[Run], bytes], load: Callable[[bytes], Call]
) -> None:
    """The command line of `python -m torch_impl.export`, and of jax_impl's.

    name: the framework's own format, which `save` writes and `load` reads.
    """
    with exit_on_input_error():
        package = framework.__name__.rpartition(".")[0]
        options = parse_options(ExportOptions, f"python -m {package}.export")
        out, beside = check(options, name)
        run = load_run(options.run_dir)
        # All formats compute in float32.
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="float32"))
        if options.to == "onnx":
            from common.inference import onnx_graph  # onnx is an optional package

            content = onnx_graph.save(run, int8=options.int8)
            exported = onnx_graph.load(content)
        else:
            content = save(run)
            exported = load(content)
        difference = largest_difference(framework, run, exported)
        compared = f"its logits differ from {package}'s by {difference:.0e} of the largest"
        if not (difference <= _LARGEST_DIFFERENCE or options.int8):  # also true for NaN
            raise InputError(f"{out}: not written, for {compared}")
        for path, written in ((beside, files.to_json(description(run))), (out, content)):
            with files.writing(path):
                files.replace(path, written)
            print(f"{path}: {len(written):,} bytes")
        print(f"checked: {compared}")


def check(options: ExportOptions, name: str) -> tuple[Path, Path]:
    """The file to write and the JSON file beside it. Raises InputError for invalid options."""
    out = options.out
    if options.to not in (name, "onnx"):
        raise InputError(f"--to {options.to}: expected {name} or onnx")
    if options.int8 and options.to != "onnx":
        raise InputError("--int8: goes with --to onnx alone")
    if options.to == "onnx":
        require("export", what="--to onnx: ")
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"{out.parent} is no folder"
        raise InputError(f"--out {out}: {what}")
    beside = out.with_suffix(".json")
    if beside == out:
        raise InputError(f"--out {out}: is the name of the JSON file beside the model")
    return out, beside


def description(run: Run) -> dict[str, Any]:
    """The content of the JSON file."""
    return {
        "format": FORMAT,
        "classes": run.classes,
        "max_length": run.options.max_length,
        "tokenizer": specification(),
        "vocabulary": run.vocabulary,
    }


def padded(
    texts: Sequence[Int[np.ndarray, " words"]],
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, " B"]]:
    """Token numbers of texts as tokens and lengths; T is at least 1."""
    lengths = np.array([*map(len, texts)], np.int32)
    tokens = np.zeros((len(texts), max(lengths.max(), 1)), np.int32)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(texts)
    return tokens, lengths


def largest_difference(framework: Framework, run: Run, exported: Call) -> float:
    """The largest difference between the exported model's logits and the framework's, relative to
    the largest of these.

    The texts consist of the first words of the vocabulary, with which most n-grams begin, in
    batches of one and of several.
    """
    rng, words = np.random.default_rng(0), run.vocabulary[:300]
    texts = [" ".join(rng.choice(words, n)) for n in (60, 0, 1, 2, 7, 60, 33)]
    trained = model.Model(framework, run, "cpu")
    read = [ids[-trained.limit :] for ids in trained.encode(texts)]
    expected = trained.logits(texts)
    actual = np.concatenate([exported(*padded(some)) for some in (read[:1], read[1:])])
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
