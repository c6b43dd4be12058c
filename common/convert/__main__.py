"""Convert a file of GRU parameters from one layout to another: python -m common.convert --help"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.convert import FORMATS, convert, from_format
from common.convert.files import Arrays, read_tensors, write_tensors
from common.errors import InputError, exit_on_input_error
from common.training.options import parse_options

NAMES = tyro.extras.literal_type_from_choices(FORMATS)
TARGETS = tyro.extras.literal_type_from_choices([*FORMATS, "run"])


@dataclass(frozen=True)
class Options:
    """Convert the parameters of a GRU from one framework's layout to another's.

    Files are .safetensors, .npz or .pt, as their suffix says. The layouts, and which key becomes
    which, are described in docs/layouts.md. Example:

    python -m common.convert model.safetensors mygru.pt --from canonical --to homework

    With --to run, TO_FILE is a run directory, in which both twins predict and train on:

    python -m common.convert mygru.pt runs/mygru --from homework --to run
    --data dlstudio:TRAIN_ARCHIVE,TEST_ARCHIVE --vectors GoogleNews-vectors-negative300.bin.gz
    """

    from_file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FROM_FILE")]
    """The file to read."""
    to_file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TO_FILE")]
    """The file to write; an existing one is replaced."""
    source: Annotated[str, tyro.conf.arg(name="from", constructor=NAMES)]
    """The layout of the file to read."""
    target: Annotated[str, tyro.conf.arg(name="to", constructor=TARGETS)]
    """The layout of the file to write, or run."""
    reset_after: bool | None = None
    """Whether this GRU applies the reset gate after the product with the recurrent weights, which
    no file tells. None stands for what --from computes by default: False for canonical, homework,
    haiku and onnx, True for torch, homework-nn, linen, nnx, keras and equinox."""
    data: str | None = None
    """With --to run: the data set it was trained on, as for training. Its words are kept."""
    vectors: str | None = None
    """With --to run: the word vectors it was trained on, as for training."""
    classes: tuple[str, ...] = ()
    """With --to run: the classes in the order of the outputs, by default that of the data set."""


@exit_on_input_error()
def main() -> None:
    options = parse_options(Options, "python -m common.convert")
    reset_after = options.reset_after
    if reset_after is None:
        reset_after = FORMATS[options.source].reset_kinds[0]
    tensors = read_tensors(options.from_file)
    if options.target == "run":
        _write_run(options, tensors, reset_after)
        return
    try:
        converted = convert(tensors, options.source, options.target, reset_after=reset_after)
    except InputError as error:
        raise InputError(f"{options.from_file}: {error}") from error
    write_tensors(options.to_file, converted)
    print(
        f"{options.to_file}: {len(converted)} tensors in the {options.target} layout, "
        f"reset_after={reset_after}"
    )


def _write_run(options: Options, tensors: Arrays, reset_after: bool) -> None:
    from common.convert.run import write_run  # imports the training loop

    for name in ("data", "vectors"):
        if getattr(options, name) is None:
            raise InputError(f"--to run: needs --{name}, which {options.from_file} does not hold")
    try:
        parameters = from_format(options.source, tensors, reset_after=reset_after)
        write_run(
            options.to_file,
            parameters,
            reset_after=reset_after,
            data=str(options.data),
            vectors=str(options.vectors),
            classes=options.classes,
        )
    except InputError as error:
        raise InputError(f"{options.from_file}: {error}") from error
    print(f"{options.to_file}: a run directory; python -m torch_impl.predict {options.to_file}")


if __name__ == "__main__":
    main()
