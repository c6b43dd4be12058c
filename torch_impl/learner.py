"""What the training loop drives, in PyTorch. Its twin is jax_impl/learner.py."""

import dataclasses
import os
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from common import convert
from common.data.batches import Batch
from common.errors import InputError
from common.params import ModelConfig, init
from common.training.options import TrainConfig
from torch_impl.builtin import BuiltinClassifier
from torch_impl.classifier import CELLS, Classifier, cross_entropy
from torch_impl.layers import canonical
from torch_impl.trace import explain

FRAMEWORK = "torch"
MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}  # in torch.optim.Adam


def make_deterministic() -> None:
    """Have PyTorch compute the same numbers each time on a GPU, too: slower there.

    Raises RuntimeError later on, for an operation that cannot.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def find_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda or mps. Raises InputError where the machine has none."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    if not there[name]:
        raise InputError(f"--device {name}: PyTorch finds no such device on this machine")
    return torch.device(name)


class Learner:
    """A classifier with its loss and its optimizer (Adam).

    parameters: canonical (see common/params.py), by default drawn from the seed. vectors [V, D].
    """

    def __init__(
        self,
        config: ModelConfig,
        training: TrainConfig,
        vectors: Float[np.ndarray, "V D"],
        parameters: Mapping[str, np.ndarray] | None = None,
        dtype: str = "float32",
    ) -> None:
        self.device = find_device(training.device)
        self.implementation = CELLS[config.cell].resolve(config.implementation, self.device.type)
        config = dataclasses.replace(config, implementation=self.implementation)
        if config.builtin:
            self.implementation = "nn.GRU"
        self.compilations = 0
        parameters = parameters or init(config, training.seed, vectors)
        kind = BuiltinClassifier if config.builtin else Classifier
        self.model = kind(config, parameters, vectors, getattr(torch, dtype)).to(self.device)
        self.leaves: list[Tensor] = list(self.model.parameters())
        self.training = training
        self.gradient_norm = torch.zeros((), device=self.device)
        self.load(parameters)

    def step(self, batch: Batch) -> Float[Tensor, ""]:
        """One step of the optimizer on a batch; returns the loss before it.

        Leaves the norm of the gradient, before clipping, in self.gradient_norm.
        """
        loss = self._backward(batch)
        gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]  # all have one
        self.gradient_norm = norm = torch.nn.utils.get_total_norm(gradients)
        if self.training.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.leaves, self.training.clip_norm, norm)
        self._optimizer.step()
        return loss

    def logits(self, batch: Batch) -> Float[np.ndarray, "B C"]:
        """The logits of a batch."""
        with torch.no_grad():
            return self.model(*self._arrays(batch)[:3]).cpu().numpy()

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a batch and its gradient with respect to every parameter."""
        loss = self._backward(batch)
        return loss.item(), self._read("grad")

    def explain(self, batch: Batch) -> dict[str, np.ndarray]:
        """How the model comes to its answers on a batch: see `explain` in torch_impl/trace.py."""
        found = explain(
            {name: torch.from_numpy(p).to(self.device) for name, p in self.parameters().items()},
            self.model.vectors,
            *self._arrays(batch),
            reset_after=self.model.config.reset_after,
        )
        return {name: value.detach().cpu().numpy() for name, value in found.items()}

    def parameters(self) -> dict[str, np.ndarray]:
        """A copy of the parameters under their canonical names."""
        return self._read("data")

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """A copy of Adam's state: step [], first_moment.NAME and second_moment.NAME."""
        step = next(iter(self._optimizer.state.values()))["step"]
        state = {"step": np.array(int(step))}
        for ours, theirs in MOMENTS.items():
            state |= {f"{ours}.{name}": value for name, value in self._read(theirs).items()}
        return state

    def load(
        self,
        parameters: Mapping[str, np.ndarray],
        optimizer_state: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Go on from what `parameters` and `optimizer_state` once returned, in either framework."""
        self._write("data", parameters)
        if optimizer_state is None:
            return
        for ours, theirs in MOMENTS.items():
            self._write(theirs, {name: optimizer_state[f"{ours}.{name}"] for name in parameters})
        for state in self._optimizer.state.values():
            state["step"].fill_(float(optimizer_state["step"]))

    @cached_property
    def _optimizer(self) -> torch.optim.Adam:
        """Made on first use: it imports torch's compiler, for a second that predicting saves."""
        rate, betas, eps = self.training.learning_rate, self.training.betas, self.training.eps
        optimizer = torch.optim.Adam(self.leaves, rate, betas, eps, fused=True)
        for leaf in self.leaves:  # as the first step would
            optimizer.state[leaf] = {
                "step": torch.zeros((), device=self.device),
                **{moment: torch.zeros_like(leaf) for moment in MOMENTS.values()},
            }
        return optimizer

    def _arrays(self, batch: Batch) -> tuple[Tensor, ...]:
        arrays = (batch.distinct, batch.tokens, batch.lengths, batch.labels)
        return tuple(torch.from_numpy(array).to(self.device) for array in arrays)

    def _backward(self, batch: Batch) -> Float[Tensor, ""]:
        *inputs, labels = self._arrays(batch)
        self.model.zero_grad()
        loss = cross_entropy(self.model(*inputs), labels.long())
        loss.backward()
        return loss.detach()

    # What is read and written: "data" or "grad" of the parameters, or one of Adam's moments.
    # nn.GRU's are converted; where the sign of its layout differs from ours, the conversion
    # negates, but squares have none.

    def _read(self, what: str) -> dict[str, np.ndarray]:
        def read(named: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
            return {n: self._find(what, p).cpu().numpy().copy() for n, p in named.items()}

        values = read(canonical(self.model, self.model.names))
        if isinstance(self.model, BuiltinClassifier):
            found = convert.from_format("torch", read(self.model.builtin_names()), reset_after=True)
            squares = what == MOMENTS["second_moment"]
            values |= {name: abs(value) if squares else value for name, value in found.items()}
        return values

    def _write(self, what: str, values: Mapping[str, np.ndarray]) -> None:
        named, values = canonical(self.model, self.model.names), dict(values)
        if isinstance(self.model, BuiltinClassifier):
            of_gru = {name: value for name, value in values.items() if name.startswith("gru.")}
            found = convert.to_format("torch", of_gru, reset_after=True)
            squares = what == MOMENTS["second_moment"]
            values |= {name: abs(value) if squares else value for name, value in found.items()}
            named |= self.model.builtin_names()
        for name, parameter in named.items():
            self._find(what, parameter).copy_(torch.from_numpy(values[name]))

    def _find(self, what: str, parameter: Tensor) -> Tensor:
        if what in ("data", "grad"):
            return getattr(parameter, what)
        return self._optimizer.state[parameter][what]
