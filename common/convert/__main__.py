"""Convert a file of GRU parameters from one layout to another: python -m common.convert --help"""

if __name__ == "__main__":
    from common.program import start

    start("train")

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

    The suffix of a file, .safetensors, .npz or .pt, determines its format. Tensors that belong
    neither to the GRU nor to its classifier are left out and listed. docs/layouts.md describes the
    layouts and the mapping of their keys. Example:

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
    """Whether this GRU applies the reset gate after the product with the recurrent weights. Files
    do not contain this. Default: False for canonical, homework, haiku and onnx, True for torch,
    homework-nn, linen, nnx, keras and equinox."""
    prefix: str | None = None
    """The prefix of the keys of the GRU, such as encoder.gru, if the file has several GRUs."""
    ngrams: int = 0
    """The value of --ngrams of a model trained with its word vectors."""
    data: str | None = None
    """With --to run: the training data set, as for training. Its words are kept."""
    vectors: str | None = None
    """With --to run: the word vectors of the training, as for training."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """With --to run: the classes in the order of the outputs, by default that of the data set."""
    pooling: str = "last"
    """With --to run: the pooling of the classifier, as for training."""
    relu: bool = True
    """With --to run: whether the classifier applies ReLU to the pooled states."""


@exit_on_input_error()
def main() -> None:
    options = parse_options(Options, "python -m common.convert")
    to_file, target = options.to_file, options.target
    kinds = FORMATS[options.source].reset_kinds
    reset_after = kinds[0] if options.reset_after is None else options.reset_after
    tensors = read_tensors(options.from_file)
    try:
        left_out: list[str] = []
        result = convert(
            tensors,
            options.source,
            "canonical" if target == "run" else target,
            reset_after=reset_after,
            ngrams=options.ngrams,
            prefix=options.prefix,
            left_out=left_out,
        )
        if left_out:
            layers = dict.fromkeys(re.sub("[./][^./]*$", "", key) for key in left_out)
            print(f"left out, not part of the GRU: {', '.join(layers)}")
        if target == "run":
            from common.convert.run import write_run  # imports the training loop

            if options.data is None or options.vectors is None:
                raise InputError("--to run: requires --data and --vectors")
            if options.ngrams:
                raise InputError("--to run: does not support --ngrams, the file has no n-grams")
            classifier = options.classes, options.pooling, options.relu
            write_run(to_file, result, reset_after, options.data, options.vectors, *classifier)
            print(f"{to_file}: a run directory; python -m torch_impl.predict {to_file}")
            return
    except InputError as error:
        raise InputError(f"{options.from_file}: {error}") from error
    write_tensors(to_file, result)
    print(f"{to_file}: {len(result)} tensors in the {target} layout, reset_after={reset_after}")


if __name__ == "__main__":
    main()
