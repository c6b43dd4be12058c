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


def succeeds(function: Callable[..., object], *arguments: Any) -> bool:
    """Whether a call raises no RuntimeError."""
    try:
        function(*arguments)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


def fakes_or_traces() -> bool:
    """Whether a dispatch mode fakes or traces tensors. Other modes, such as profilers, are not
    detected, so they do not observe calls of the kernel."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return type(torch.empty(0)) is not Tensor or get_proxy_mode() is not None


def has_forward_level() -> bool:
    return forward_ad._current_level >= 0


def can_make_dual() -> bool:
    """Whether forward mode is active, which a call of make_dual shows. True in torch.compile, which
    cannot trace that call; the caller then uses `scan`, which has all derivatives."""
    zero = torch.zeros(())
    return torch.compiler.is_compiling() or succeeds(forward_ad.make_dual, zero, zero)


def find_private(name: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """A function of PyTorch, or the fallback where this version of PyTorch does not have it."""
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        return fallback


is_transformed = find_private(
    "_C._are_functorch_transforms_active", lambda: not succeeds(Untransformed.apply, torch.empty(0))
)
"""Whether this runs under a transformation of torch.func: grad, vmap, jvp ..."""
count_dispatch_modes = find_private("_C._len_torch_dispatch_stack", fakes_or_traces)
"""The number of active dispatch modes, such as those that fake or trace tensors."""
is_tracing = find_private("_C._is_tracing", torch.jit.is_tracing)
"""Whether torch.jit.trace records."""
has_storage = find_private("_C._has_storage", lambda array: succeeds(array.untyped_storage))
"""Whether a tensor has memory of its own: a wrapper of another tensor has none."""
is_batched = find_private(
    "_C._functorch.is_legacy_batchedtensor",
    lambda array: type(array) is Tensor and not is_transformed() and not has_storage(array),
)
"""Whether a tensor is one of several gradients of torch.autograd.grad (is_grads_batched)."""
is_forward_mode = has_forward_level if hasattr(forward_ad, "_current_level") else can_make_dual
"""Whether derivatives are being computed in forward mode, by torch.func or torch.autograd."""
