"""The parity checks of `python compare.py`, in a process of their own, beside the trainings."""

from dataclasses import dataclass

import jax_impl.learner
import torch_impl.learner
from common import checkpoint
from common.config import TrainConfig, parse_options
from common.errors import exit_on_input_error
from comparison import parity, twins
from comparison.implementations import jax_gru, torch_gru


@dataclass(frozen=True)
class ChecksConfig(TrainConfig):
    """Check the twins on a real batch; writes the rows, as in results.json, to the file --out."""

    models: tuple[str, ...] = ("gru", "bigru")
    """Which models."""
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
            trained = [
                torch_gru(torch_impl.learner.resolve(options.implementation)),
                jax_gru(jax_impl.learner.resolve(options.implementation)),
                parity.NN_GRU,
            ]
            rows += parity.run(trained, [parity.real(False), parity.real(True)])
        print("checking the twins' parity on a real batch", flush=True)
        rows += twins.check(options, options.models, print)
        with checkpoint.writing(options.out):
            checkpoint.write_json(options.out, rows)


if __name__ == "__main__":
    main()
