"""What the training loop drives, in PyTorch. Its twin is jax_impl/learner.py."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from common import convert
from common.data.batches import Batch
from common.errors import InputError
from common.params import ModelConfig, init
from common.training.options import TrainConfig
from torch_impl.builtin import BuiltinClassifier
from torch_impl.classifier import Classifier, cross_entropy
from torch_impl.gru import canonical, resolve
from torch_impl.trace import explain

FRAMEWORK = "torch"


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
        self.implementation = resolve(config.implementation, self.device.type)
        config = dataclasses.replace(config, implementation=self.implementation)
        if config.builtin:
            self.implementation = "nn.GRU"
        self.compilations = 0
        parameters = parameters or init(config, training.seed, vectors)
        kind = BuiltinClassifier if config.builtin else Classifier
        self.model = kind(config, parameters, vectors, getattr(torch, dtype)).to(self.device)
        # torch.optim.Adam keeps the same and calls the same function, but its way there takes as
        # long as the function itself.
        self.leaves: list[Tensor] = list(self.model.parameters())
        self.moments = {
            leaf: (torch.zeros_like(leaf), torch.zeros_like(leaf)) for leaf in self.leaves
        }
        self.steps = [torch.zeros((), device=self.device) for _ in self.leaves]
        first, second = map(list, zip(*self.moments.values(), strict=True))
        beta1, beta2 = training.betas
        self.adam = partial(
            adam,
            self.leaves,
            exp_avgs=first,
            exp_avg_sqs=second,
            state_steps=self.steps,
            max_exp_avg_sqs=[],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=training.learning_rate,
            weight_decay=0,
            eps=training.eps,
            maximize=False,
        )
        self.clip_norm = training.clip_norm
        self.gradient_norm = torch.zeros((), device=self.device)
        self.load(parameters)

    def step(self, batch: Batch) -> Float[Tensor, ""]:
        """One step of the optimizer on a batch; returns the loss before it.

        Leaves the norm of the gradient, before clipping, in self.gradient_norm.
        """
        loss = self._backward(batch)
        # The loss depends on every parameter: none is without a gradient.
        gradients = cast("list[Tensor]", [leaf.grad for leaf in self.leaves])
        self.gradient_norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.leaves, self.clip_norm, self.gradient_norm)
        with torch.no_grad():
            self.adam(gradients)
        return loss

    def logits(self, batch: Batch) -> Float[np.ndarray, "B C"]:
        """The logits of a batch."""
        with torch.no_grad():
            return self._logits(batch).cpu().numpy()

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a batch and its gradient with respect to every parameter."""
        loss = self._backward(batch)
        return loss.item(), self._read(lambda parameter: parameter.grad)

    def explain(self, batch: Batch) -> dict[str, np.ndarray]:
        """How the model comes to its answers on a batch: see `explain` in torch_impl/trace.py."""
        inputs = (batch.distinct, batch.tokens, batch.lengths, batch.labels)
        found = explain(
            {name: torch.from_numpy(p).to(self.device) for name, p in self.parameters().items()},
            self.model.vectors,
            *(torch.from_numpy(array).to(self.device) for array in inputs),
            reset_after=self.model.config.reset_after,
        )
        return {name: value.detach().cpu().numpy() for name, value in found.items()}

    def parameters(self) -> dict[str, np.ndarray]:
        """A copy of the parameters under their canonical names."""
        return self._read(lambda parameter: parameter)

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """A copy of Adam's state: step [], first_moment.NAME and second_moment.NAME."""
        first = self._read(lambda parameter: self.moments[parameter][0])
        second = self._read(lambda parameter: self.moments[parameter][1], squares=True)
        return {
            "step": np.array(int(self.steps[0])),
            **{f"first_moment.{name}": value for name, value in first.items()},
            **{f"second_moment.{name}": value for name, value in second.items()},
        }

    def load(
        self,
        parameters: Mapping[str, np.ndarray],
        optimizer_state: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Go on from what `parameters` and `optimizer_state` once returned, in either framework."""
        self._write(parameters, lambda parameter: parameter)
        if optimizer_state is None:
            return
        first = {name: optimizer_state[f"first_moment.{name}"] for name in parameters}
        second = {name: optimizer_state[f"second_moment.{name}"] for name in parameters}
        self._write(first, lambda parameter: self.moments[parameter][0])
        self._write(second, lambda parameter: self.moments[parameter][1], squares=True)
        for step in self.steps:
            step.fill_(float(optimizer_state["step"]))

    def _logits(self, batch: Batch) -> Float[Tensor, "B C"]:
        arrays = (batch.distinct, batch.tokens, batch.lengths)
        return self.model(*(torch.from_numpy(array).to(self.device) for array in arrays))

    def _backward(self, batch: Batch) -> Float[Tensor, ""]:
        labels = torch.from_numpy(batch.labels).to(self.device, torch.int64)
        for leaf in self.leaves:
            leaf.grad = None
        loss = cross_entropy(self._logits(batch), labels)
        loss.backward()
        return loss.detach()

    def _read(
        self, value_of: Callable[[Tensor], Any], squares: bool = False
    ) -> dict[str, np.ndarray]:
        def read(named: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
            return {n: value_of(p).detach().cpu().numpy().copy() for n, p in named.items()}

        values = read(canonical(self.model, self.model.names))
        if isinstance(self.model, BuiltinClassifier):
            found = convert.from_format("torch", read(self.model.builtin_names()), reset_after=True)
            values |= {name: abs(value) if squares else value for name, value in found.items()}
        return values

    def _write(
        self,
        values: Mapping[str, np.ndarray],
        value_of: Callable[[Tensor], Any],
        squares: bool = False,
    ) -> None:
        # Where a layout's sign differs from ours, the conversion negates: not so for squares.
        named, values = canonical(self.model, self.model.names), dict(values)
        if isinstance(self.model, BuiltinClassifier):
            of_gru = {name: value for name, value in values.items() if name.startswith("gru.")}
            found = convert.to_format("torch", of_gru, reset_after=True)
            values |= {name: abs(value) if squares else value for name, value in found.items()}
            named |= self.model.builtin_names()
        with torch.no_grad():
            for name, parameter in named.items():
                value_of(parameter).copy_(torch.from_numpy(values[name]))
