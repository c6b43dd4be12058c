"""Convert a file of GRU parameters from one layout to another: python -m common.convert --help"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.convert import FORMATS, convert
from common.convert.files import read_tensors, write_tensors
from common.errors import InputError, exit_on_input_error
from common.training.options import parse_options

NAMES = tyro.extras.literal_type_from_choices(FORMATS)
TARGETS = tyro.extras.literal_type_from_choices([*FORMATS, "run"])


@dataclass(frozen=True)
class Options:
    """Convert the parameters of a GRU from one framework's layout to another's.

    Files are .safetensors, .npz or .pt, as their suffix says. What is no part of the GRU or of its
    classifier is left out, and listed. The layouts, and which key becomes which, are described in
    docs/layouts.md. Example:

    python -m common.convert model.safetensors my.pt --from canonical --to torch

    With --to run, TO_FILE is a run directory, in which both twins predict and train on:

    python -m common.convert mygru.pt runs/mygru --from homework --to run
    --data dlstudio:TRAIN_ARCHIVE,TEST_ARCHIVE --vectors GoogleNews-vectors-negative300.bin.gz
    """

    from_file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FROM_FILE")]
    """The file to read."""
    to_file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TO_FILE")]
    """The file to write; an existing one is replaced."""
    source: Annotated[str, tyro.conf.arg(name="from", constructor=NAMES, metavar="LAYOUT")]
    """The layout of the file to read: canonical, torch, homework, homework-nn, linen, nnx, keras,
    equinox, haiku or onnx."""
    target: Annotated[str, tyro.conf.arg(name="to", constructor=TARGETS, metavar="LAYOUT")]
    """The layout of the file to write: one of these, or run."""
    reset_after: bool | None = None
    """Whether this GRU applies the reset gate after the product with the recurrent weights, which
    no file tells. None stands for what --from computes by default: False for canonical, homework,
    haiku and onnx, True for torch, homework-nn, linen, nnx, keras and equinox."""
    prefix: str | None = None
    """Of several GRUs in the file, the one whose keys begin so, as in encoder.gru."""
    ngrams: int = 0
    """Of a model trained with --ngrams and its word vectors: what --ngrams was."""
    data: str | None = None
    """With --to run: the data set it was trained on, as for training. Its words are kept."""
    vectors: str | None = None
    """With --to run: the word vectors it was trained on, as for training."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """With --to run: the classes in the order of the outputs, by default that of the data set."""
    pooling: str = "last"
    """With --to run: what its classifier reads, as for training."""
    relu: bool = True
    """With --to run: whether it applies ReLU to that."""


@exit_on_input_error()
def main() -> None:
    options = parse_options(Options, "python -m common.convert")
    to_file, target = options.to_file, options.target
    kinds = FORMATS[options.source].reset_kinds
    reset_after = kinds[0] if options.reset_after is None else options.reset_after
    tensors = read_tensors(options.from_file)
    try:
        wanted = "canonical" if target == "run" else target
        left_out: list[str] = []
        result = convert(
            tensors,
            options.source,
            wanted,
            reset_after=reset_after,
            ngrams=options.ngrams,
            prefix=options.prefix,
            left_out=left_out,
        )
        if left_out:
            layers = dict.fromkeys(re.sub("[./][^./]*$", "", key) for key in left_out)
            print(f"left out, being no part of the GRU: {', '.join(layers)}")
        if target == "run":
            from common.convert.run import write_run  # imports the training loop

            if options.data is None or options.vectors is None:
                raise InputError("--to run: needs --data and --vectors, which it does not hold")
            if options.ngrams:
                raise InputError("--to run: a model with --ngrams reads counts it does not hold")
            how = options.classes, options.pooling, options.relu
            write_run(to_file, result, reset_after, options.data, options.vectors, *how)
            print(f"{to_file}: a run directory; python -m torch_impl.predict {to_file}")
            return
    except InputError as error:
        raise InputError(f"{options.from_file}: {error}") from error
    write_tensors(to_file, result)
    print(f"{to_file}: {len(result)} tensors in the {target} layout, reset_after={reset_after}")


if __name__ == "__main__":
    main()
