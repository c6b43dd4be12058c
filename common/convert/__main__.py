"""Convert a file of GRU parameters from one layout to another: python -m common.convert --help"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.config import parse_options
from common.convert import FORMATS, convert
from common.convert.files import read_tensors, write_tensors
from common.errors import InputError, exit_on_input_error

NAMES = tyro.extras.literal_type_from_choices(FORMATS)


@dataclass(frozen=True)
class Options:
    """Convert the parameters of a GRU from one framework's layout to another's.

    Files are .safetensors, .npz or .pt, as their suffix says. The layouts, and which key becomes
    which, are described in docs/layouts.md. Example:

    python -m common.convert model.safetensors mygru.pt --from canonical --to homework
    """

    from_file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FROM_FILE")]
    """The file to read."""
    to_file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TO_FILE")]
    """The file to write; an existing one is replaced."""
    source: Annotated[str, tyro.conf.arg(name="from", constructor=NAMES)]
    """The layout of the file to read."""
    target: Annotated[str, tyro.conf.arg(name="to", constructor=NAMES)]
    """The layout of the file to write."""
    reset_after: bool | None = None
    """Whether this GRU applies the reset gate after the product with the recurrent weights, which
    no file tells. None stands for what --from computes by default: False for canonical, homework,
    haiku and onnx, True for torch, linen, nnx, keras and equinox."""


@exit_on_input_error()
def main() -> None:
    options = parse_options(Options, "python -m common.convert")
    reset_after = options.reset_after
    if reset_after is None:
        reset_after = FORMATS[options.source].reset_kinds[0]
    tensors = read_tensors(options.from_file)
    try:
        converted = convert(tensors, options.source, options.target, reset_after=reset_after)
    except InputError as error:
        raise InputError(f"{options.from_file}: {error}") from error
    write_tensors(options.to_file, converted)
    print(
        f"{options.to_file}: {len(converted)} tensors in the {options.target} layout, "
        f"reset_after={reset_after}"
    )


if __name__ == "__main__":
    main()
