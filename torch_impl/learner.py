"""The training steps in PyTorch, for the training loop. Its twin is jax_impl/learner.py."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.func import functional_call

from common import convert
from common.data.batches import Batch
from common.params import NO_MASKS, ModelConfig, init
from common.training import learner
from common.training.dropout import masks
from common.training.learner import Arrays
from common.training.options import TrainConfig
from common.training.recipe import PLAIN, Recipe, learning_rate, weight_of
from common.training.world import ALONE, World
from torch_impl.builtin import BuiltinClassifier
from torch_impl.classifier import CELLS, Reduction, cross_entropy
from torch_impl.layers import canonical
from torch_impl.predictor import Predictor, find_device

FRAMEWORK = "torch"
MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}  # in torch.optim.Adam


def make_deterministic() -> None:
    """Make PyTorch deterministic on a GPU, too, where this is slower.

    An operation that has no deterministic version raises RuntimeError when it is called.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def join() -> AbstractContextManager[World]:
    """A context with the other workers, which torchrun has started."""
    from torch_impl import world  # needed only with workers

    return world.join()


def check(options: TrainConfig) -> None:
    """Raise InputError if the device, or a recurrence for these options, is not available."""
    find_device(options.device)
    CELLS[options.cell].resolve(options.implementation, None, options.dtype)


class Learner(Predictor, learner.Learner):
    """The learner of common/training/learner.py in PyTorch."""

    def __init__(
        self,
        config: ModelConfig,
        training: TrainConfig,
        vectors: Float[np.ndarray, "V D"],
        parameters: Arrays | None = None,
        dtype: str = "float32",
        recipe: Recipe = PLAIN,
        world: World = ALONE,
    ) -> None:
        parameters = parameters or init(config, training.seed, vectors)
        super().__init__(config, parameters, vectors, training.device, dtype)
        self.compilations = 0
        # The trained word vectors (None if they are frozen), and the rows that a step changes.
        self.vectors: nn.Parameter | None = getattr(self.model, "vectors_weight", None)
        self.rows = nn.Parameter()
        self.leaves: list[Tensor] = [
            self.rows if leaf is self.vectors else leaf for leaf in self.model.parameters()
        ]
        self.training, self.recipe, self.taken = training, recipe, 0
        weights = recipe.class_weights
        self.class_weights = None if weights is None else self._tensor(np.array(weights))
        self.gradient_norm = torch.zeros((), device=self.device)
        self.world, self.stop_requests, self.exchange = world, torch.zeros(()), None
        if (shares := training.shares or 1) > 1:
            from torch_impl.world import Exchange

            self.exchange = Exchange(world, shares)

    def step(self, *shares: Batch, stop_requested: bool = False) -> Float[Tensor, ""]:
        loss, rows = self._gradients(shares, stop_requested)
        gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]  # all have one
        # For so few tensors, foreach is slower.
        self.gradient_norm = norm = torch.nn.utils.get_total_norm(gradients, foreach=False)
        if self.training.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.leaves, self.training.clip_norm, norm)
        if self.training.scheduled:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(self.training, self.recipe, self.taken)
        if self.vectors is None:
            self._optimizer.step()
        else:
            self._step_rows(self.vectors, torch.from_numpy(rows).long().to(self.device))
        self.taken += 1
        return loss

    def gradients(self, *shares: Batch) -> tuple[float, dict[str, np.ndarray]]:
        loss, rows = self._gradients(shares, dropping=False)
        if self.vectors is not None and self.rows.grad is not None:
            gradient = torch.zeros_like(self.vectors)
            gradient[torch.from_numpy(rows).to(self.device)] = self.rows.grad[: len(rows)]
            self.vectors.grad = gradient
        return loss.item(), self._read("gradients")

    @cached_property
    def _optimizer(self) -> torch.optim.Adam:
        """Created on first use, because it imports torch's compiler, which takes a second."""
        rate, betas, eps = self.training.learning_rate, self.training.betas, self.training.eps
        optimizer = torch.optim.Adam(self.leaves, rate, betas, eps, fused=True)
        # The state that torch.optim would create at the first step.
        for leaf in [*self.leaves, *(() if self.vectors is None else (self.vectors,))]:
            optimizer.state[leaf] = {
                "step": torch.zeros((), device=self.device),
                **{moment: torch.zeros_like(leaf) for moment in MOMENTS.values()},
            }
        return optimizer

    def _gradients(
        self, shares: Sequence[Batch], stop_requested: bool = False, dropping: bool = True
    ) -> tuple[Float[Tensor, ""], Int32[np.ndarray, " K"]]:
        """The loss of a batch and the rows of trained word vectors that its gradients belong to.

        The gradients are stored in the leaves. Their rows beyond the returned ones are padding.
        """
        if self.exchange is None:
            [batch] = shares
            return self._share(batch, dropping=dropping), batch.distinct[: batch.num_distinct]
        rows = np.zeros(0, np.int32)
        places: list[Any] = [None] * len(shares)
        if self.vectors is not None:
            named = [share.distinct[: share.num_distinct] for share in shares]
            rows, places = self.world.union(named)
        mine = []
        for share, place in zip(shares, places, strict=True):
            loss = self._share(share, "sum", dropping)
            counts = loss.new_tensor([weight_of(share.labels, self.recipe), stop_requested])
            gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
            if place is not None:
                gradients = self._among(gradients, torch.from_numpy(place), len(rows))
            mine.append(self._flat(loss, counts, gradients))
        if self.vectors is not None:
            self.rows.grad = None  # of another size
            self.rows.data = self.vectors.detach()[torch.from_numpy(rows).to(self.device)]
        return self._split(self.exchange(mine)), rows

    def _share(
        self, batch: Batch, reduction: Reduction = "mean", dropping: bool = True
    ) -> Float[Tensor, ""]:
        dropped = masks(self.model.config, self.training, batch, self.taken) if dropping else {}
        return self._backward(batch, dropped, reduction)

    def _among(self, gradients: list[Tensor], place: Int[Tensor, " K"], size: int) -> list[Tensor]:
        """The gradients, with that of the word vectors scattered to `size` rows, at `place`."""
        number = next(i for i, leaf in enumerate(self.leaves) if leaf is self.rows)
        part = gradients[number]
        whole = part.new_zeros(size, part.shape[1])
        whole[place.to(self.device)] = part[: len(place)]
        return [*gradients[:number], whole, *gradients[number + 1 :]]

    def _flat(
        self, loss: Float[Tensor, ""], counts: Float[Tensor, "2"], gradients: list[Tensor]
    ) -> Float[Tensor, " P"]:
        """All values, concatenated to one vector."""
        return torch.cat([loss[None], counts, *(each.ravel() for each in gradients)])

    def _split(self, total: Float[Tensor, " P"]) -> Float[Tensor, ""]:
        """The mean loss from the sum of `_flat` vectors; stores the mean gradients in the
        leaves."""
        sizes = [leaf.numel() for leaf in self.leaves]
        loss, weight, self.stop_requests, *gradients = total.split([1, 1, 1, *sizes])
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient.view_as(leaf).div_(weight)
        return (loss / weight)[0]

    def _backward(
        self, batch: Batch, dropped: Arrays = NO_MASKS, reduction: Reduction = "mean"
    ) -> Float[Tensor, ""]:
        distinct, *inputs = self._arrays(batch)
        labels = torch.from_numpy(batch.labels).to(self.device)
        for leaf in self.leaves:
            leaf.grad = None
        dropping = {name: self._tensor(mask) for name, mask in dropped.items()}
        arguments = *inputs, dropping, self._ratios(batch)
        if self.vectors is None:
            logits = self.model(distinct, *arguments)
        else:
            self.rows.data = self.vectors.detach()[distinct]
            instead: dict[str, Tensor] = {"vectors_weight": self.rows}
            distinct = torch.arange(len(distinct), device=self.device)
            logits = functional_call(self.model, instead, (distinct, *arguments))
        loss = cross_entropy(logits, labels.long(), self.class_weights, reduction)
        loss.backward()
        return loss.detach()

    def _step_rows(self, vectors: Tensor, rows: Int[Tensor, " K"]) -> None:
        """A step that changes only these rows of the word vectors and of their moments."""
        whole, part = self._optimizer.state[vectors], self._optimizer.state[self.rows]
        assert self.rows.grad is not None
        self.rows.data, self.rows.grad = self.rows.data[: len(rows)], self.rows.grad[: len(rows)]
        for moment in MOMENTS.values():
            part[moment] = whole[moment][rows]
        self._optimizer.step()
        vectors.detach()[rows] = self.rows.detach()
        for moment in MOMENTS.values():
            whole[moment][rows] = part[moment]

    # nn.GRU's parameters and moments are converted. The conversion negates where the layouts differ
    # in sign, which second moments, as squares, must not follow.

    def _read(self, kind: str) -> dict[str, np.ndarray]:
        values = {name: value.cpu().numpy().copy() for name, value in self._tensors(kind).items()}
        if self.model.config.builtin:
            ngrams = self.model.config.ngrams
            values = convert.from_format("torch", values, reset_after=True, ngrams=ngrams)
        return {n: abs(v) for n, v in values.items()} if kind == "second_moment" else values

    def _write(self, kind: str, values: Arrays) -> None:
        if self.model.config.builtin:
            ngrams = self.model.config.ngrams
            values = convert.to_format("torch", values, reset_after=True, ngrams=ngrams)
        for name, tensor in self._tensors(kind).items():
            value = torch.from_numpy(values[name])
            tensor.copy_(value.abs() if kind == "second_moment" else value)
        for state in self._optimizer.state.values() if kind in MOMENTS else ():
            state["step"].fill_(self.taken)

    def _tensors(self, kind: str) -> dict[str, Tensor]:
        named = canonical(self.model, self.model.names)
        if isinstance(self.model, BuiltinClassifier):
            named |= self.model.builtin_names()
        if part := {"parameters": "data", "gradients": "grad"}.get(kind):
            return {name: getattr(parameter, part) for name, parameter in named.items()}
        moment = MOMENTS[kind]
        return {name: self._optimizer.state[parameter][moment] for name, parameter in named.items()}
