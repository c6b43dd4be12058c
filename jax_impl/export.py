"""Export a trained classifier from JAX. Its twin is torch_impl/export.py.

python -m jax_impl.export RUN_DIR --to stablehlo --out model.stablehlo
python -m jax_impl.export RUN_DIR --to onnx --out model.onnx
"""

if __name__ == "__main__":
    from common.program import start

    start("jax", "train")

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from common.cells import LayerCall
from common.inference import export
from common.inference.export import Call
from common.training.run_directory import Run
from jax_impl import predictor
from jax_impl.classifier import CELLS, head, pool
from jax_impl.layers import run


def read_ratios(
    values: Mapping[str, Array], tokens: Int[Array, "T B"], ngrams: int
) -> Float[Array, "T B E"]:
    """The ratios at each word, as Ratios.read in common/data/ngrams.py computes them.

    It requires JAX's x64 mode. An unknown n-gram has the index after the last, at which the ratios
    are zero. Longer n-grams that begin with it have codes above those of all known ones.
    """
    words, place = values["vectors.weight"].shape[0], tokens
    all_ratios: list[Array] = []
    for n in range(1, ngrams + 1):
        codes, ratios = values[f"codes.{n}"], values[f"ratios.{n}"]
        if n > 1:  # the preceding words end a step earlier
            nothing = values[f"codes.{n - 1}"].shape[0]
            before = jnp.pad(place, ((1, 0), (0, 0)), constant_values=nothing)[:-1]
            place = before.astype(jnp.int64) * words + tokens
        code, place = place, jnp.searchsorted(codes, place)
        counts = jnp.pad(codes, (0, 1), constant_values=-1)[place] == code
        place = jnp.where(counts, place, codes.shape[0])
        all_ratios.append(jnp.pad(ratios, ((0, 1), (0, 0)))[place])
    return jnp.concatenate(all_ratios, -1)


class Exported:
    """The exported module: the classifier of a run, from token numbers to logits."""

    def __init__(self, trained: Run) -> None:
        self.config, self.cell = trained.model, CELLS[trained.model.cell]
        self.values = trained.arrays()

    def __call__(self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Float[Array, "B C"]:
        """The logits; NaN for a row with a length or token out of range."""
        config, tokens = self.config, tokens.T
        with jax.enable_x64(True):  # for the codes of n-grams
            values = {name: jnp.asarray(value) for name, value in self.values.items()}
            vectors = values["vectors.weight"]
            x = vectors.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
            if config.ngrams:
                x = jnp.concatenate([x, read_ratios(values, tokens, config.ngrams)], -1)
        flags = config.reset_after, config.pooling != "last"
        call = LayerCall(x, None, (), lengths, None, None, None, *flags)
        outputs, h_last = run(self.cell, values, call, implementation=self.cell.traceable)
        last = h_last[-config.directions :, :, : config.hidden_size]
        features = pool(outputs, last, lengths, config.pooling)
        return head(values, features, relu=config.relu)


def save(trained: Run) -> bytes:
    """Write the classifier of a run to a file for jax.export, for any batch and any length."""
    batch, time = jax.export.symbolic_shape("batch, time")
    example = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, time), (batch,))]
    program = jax.export.export(jax.jit(Exported(trained)), platforms=("cpu", "cuda"))(*example)
    return bytes(program.serialize())


def load(content: bytes) -> Call:
    """Read a file that `save` wrote, for the CPU."""
    call = jax.jit(jax.export.deserialize(bytearray(content)).call)
    cpu = jax.devices("cpu")[0]
    return lambda *arrays: np.asarray(call(*jax.device_put(arrays, cpu)))


if __name__ == "__main__":
    export.main(predictor, "stablehlo", save, load)
