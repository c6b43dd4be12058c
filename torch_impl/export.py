"""Export a trained classifier from PyTorch. Its twin is jax_impl/export.py.

python -m torch_impl.export RUN_DIR --to torch --out model.pt2
python -m torch_impl.export RUN_DIR --to onnx --out model.onnx
"""

if __name__ == "__main__":
    from common.program import start

    start("torch", "train")

import io
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.cells import LayerCall
from common.inference import export
from common.inference.export import Call
from common.training.run_directory import Run
from torch_impl import predictor
from torch_impl.classifier import CELLS, head, pool
from torch_impl.layers import canonical, run, within
from torch_impl.scanned import with_scan


def read_ratios(
    values: Mapping[str, Tensor], tokens: Int[Tensor, "T B"], ngrams: int
) -> Float[Tensor, "T B E"]:
    """The ratios at each word, as Ratios.read in common/data/ngrams.py computes them.

    An unknown n-gram has the index after the last, at which the ratios are zero. Longer n-grams
    that begin with it have codes above those of all known ones.
    """
    words, place = values["vectors.weight"].shape[0], tokens
    all_ratios: list[Tensor] = []
    for n in range(1, ngrams + 1):
        codes, ratios = values[f"codes.{n}"], values[f"ratios.{n}"]
        if n > 1:  # the preceding words end a step earlier
            nothing = values[f"codes.{n - 1}"].shape[0]
            before = F.pad(place, (0, 0, 1, 0), value=nothing)[:-1]
            place = before * words + tokens
        code, place = place, torch.searchsorted(codes, place)
        counts = F.pad(codes, (0, 1), value=-1)[place] == code
        place = torch.where(counts, place, codes.shape[0])
        all_ratios.append(F.embedding(place, F.pad(ratios, (0, 0, 0, 1))))
    return torch.cat(all_ratios, -1)


class Exported(nn.Module):
    """The exported module: the classifier of a run, from token numbers to logits."""

    def __init__(self, trained: Run) -> None:
        super().__init__()
        self.config = trained.model
        self.cell = with_scan(CELLS[trained.model.cell])
        values = trained.arrays()
        self.names = tuple(values)
        for name, value in values.items():
            self.register_buffer(name.replace(".", "_"), torch.tensor(value))

    def forward(
        self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C"]:
        """The logits. A length above T is treated as T, one below 0 as 0."""
        config, values, steps = self.config, canonical(self, self.names), tokens.shape[1]
        lengths = lengths.clamp(0, steps)
        tokens = torch.where(within(lengths, steps), tokens.T, 0).contiguous()
        x = F.embedding(tokens, values["vectors.weight"])
        if config.ngrams:
            x = torch.cat([x, read_ratios(values, tokens, config.ngrams)], -1)
        flags = config.reset_after, config.pooling != "last"
        call = LayerCall(x, None, (), lengths, None, None, None, *flags)
        outputs, h_last = run(self.cell, values, call, implementation="scan")
        last = h_last[-config.directions :, :, : config.hidden_size]
        features = pool(outputs, last, lengths, config.pooling)
        return head(values, features, relu=config.relu)


@torch.no_grad()
def save(trained: Run) -> bytes:
    """Write the classifier of a run to a file for torch.export, for any batch and any length."""
    example = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32)
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    shapes = {"tokens": {0: batch, 1: time}, "lengths": {0: batch}}
    program = torch.export.export(Exported(trained), example, dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def load(content: bytes) -> Call:
    """Read a file that `save` wrote."""
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda tokens, lengths: module(*map(torch.from_numpy, (tokens, lengths))).numpy()


if __name__ == "__main__":
    export.main(predictor, "torch", save, load)
