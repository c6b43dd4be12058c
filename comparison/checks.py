"""The parity checks of `python compare.py`, in a process of their own, beside the trainings."""

from dataclasses import dataclass

import jax_impl.learner
import torch_impl.learner
from common import files
from common.errors import exit_on_input_error
from common.training.options import TrainConfig, parse_options
from comparison import parity, twins
from comparison.implementations import Implementation, jax_gru, torch_gru


@dataclass(frozen=True)
class ChecksConfig(TrainConfig):
    """Check the twins on a real batch; writes the rows, as in results.json, to the file --out."""

    frameworks: tuple[str, ...] = ("torch", "jax")
    """Whose implementation is checked against the oracle."""
    models: tuple[str, ...] = ("gru", "bigru")
    """Which of the twins' models."""
    oracle: bool = False
    """Also check what is trained, and nn.GRU, against the oracle, on real reviews."""


def main() -> None:
    """Run the command line; that a check fails stands in the file alone."""
    with exit_on_input_error():
        options = parse_options(ChecksConfig, "python -m comparison.checks")
        assert options.out is not None
        rows = []
        if options.oracle:
            print("checking what is trained against the float64 oracle", flush=True)
            rows += parity.run(trained(options), [parity.real(False), parity.real(True)])
        print("checking the twins' parity on a real batch", flush=True)
        rows += twins.check(options, options.models, print)
        with files.writing(options.out):
            files.write_json(options.out, rows)


def trained(options: ChecksConfig) -> list[Implementation]:
    """What each framework trains with on its device, and nn.GRU."""
    found = []
    if "torch" in options.frameworks:
        kind = torch_impl.learner.find_device(options.device).type
        found.append(torch_gru(torch_impl.learner.resolve(options.implementation, kind)))
    if "jax" in options.frameworks:
        kind = jax_impl.learner.find_device(options.device).platform
        found.append(jax_gru(jax_impl.learner.resolve(options.implementation, kind)))
    return [*found, parity.NN_GRU]


if __name__ == "__main__":
    main()
