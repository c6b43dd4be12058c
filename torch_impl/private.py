"""The private parts of PyTorch that the layer uses, each with a fallback on public ones.

A fallback is slower and gives the same results. The private functions only make short calls faster.
The twin in JAX needs no private functions.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Untransformed(torch.autograd.Function):
    """A function that torch.func refuses, because it has no setup_context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


def runs(function: Callable[..., object], *arguments: Any) -> bool:
    """Whether a call raises no RuntimeError."""
    try:
        function(*arguments)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


def sees_a_mode() -> bool:
    """Whether a dispatch mode fakes or traces tensors. Other modes, such as profilers, are not
    detected, so they do not observe calls of the kernel."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return type(torch.empty(0)) is not Tensor or get_proxy_mode() is not None


def read_level() -> bool:
    return forward_ad._current_level >= 0


def makes_duals() -> bool:
    """Whether forward mode is active, which a call of make_dual shows. True in torch.compile, which
    cannot trace that call; the caller then uses `scan`, which has all derivatives."""
    zero = torch.zeros(())
    return torch.compiler.is_compiling() or runs(forward_ad.make_dual, zero, zero)


def private(name: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """A function of PyTorch, or the fallback where this version of PyTorch does not have it."""
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        return fallback


transformed = private(
    "_C._are_functorch_transforms_active", lambda: not runs(Untransformed.apply, torch.empty(0))
)
"""Whether this runs under a transformation of torch.func: grad, vmap, jvp ..."""
dispatch_modes = private("_C._len_torch_dispatch_stack", sees_a_mode)
"""The number of active dispatch modes, such as those that fake or trace tensors."""
is_tracing = private("_C._is_tracing", torch.jit.is_tracing)
"""Whether torch.jit.trace records."""
has_storage = private("_C._has_storage", lambda array: runs(array.untyped_storage))
"""Whether a tensor has memory of its own: a wrapper of another tensor has none."""
batched = private(
    "_C._functorch.is_legacy_batchedtensor",
    lambda array: type(array) is Tensor and not transformed() and not has_storage(array),
)
"""Whether a tensor is one of several gradients of torch.autograd.grad (is_grads_batched)."""
forward_mode = read_level if hasattr(forward_ad, "_current_level") else makes_duals
"""Whether derivatives are being computed in forward mode, by torch.func or torch.autograd."""
