"""Each private function of PyTorch is used in one module, with an equivalent fallback."""

import ast
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from tests import ROOT
from torch_impl import GRU, bfloat16, fused, inference, layers, private

NAMES = (
    "is_transformed",
    "count_dispatch_modes",
    "has_storage",
    "is_batched",
    "is_forward_mode",
    "is_tracing",
)
PRIVATE = {
    torch._C: (
        *("_are_functorch_transforms_active", "_len_torch_dispatch_stack", "_has_storage"),
        "_is_tracing",
    ),
    torch._C._functorch: ("is_legacy_batchedtensor",),
    forward_ad: ("_current_level",),
}


@pytest.fixture
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """torch_impl/private.py, imported while PyTorch lacks all private names."""
    spec = importlib.util.spec_from_file_location("fallbacks", private.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in PRIVATE.items():
            for name in names:
                patch.delattr(owner, name)
        spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "fallbacks", module)  # for torch.compile
    return module


def test_no_other_file_of_the_product_has_private_names_of_pytorch() -> None:
    paths = {path for name in ("torch_impl", "comparison") for path in (ROOT / name).rglob("*.py")}
    for path in paths - {ROOT / "torch_impl" / "private.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", "")
                names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            for name in names:
                assert not (name.startswith(("torch.", "forward_ad.")) and "._" in name), path


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


def is_batched(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    outputs = f(x.requires_grad_())
    directions = torch.stack([torch.ones_like(outputs), outputs.detach()])
    return torch.autograd.grad(outputs, x, directions, is_grads_batched=True)[0]


def twice(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(f(x.requires_grad_()).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(first.sin().sum(), x)[0]


# Calls of a function in all states of PyTorch that the private functions distinguish.
STATES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "eager": lambda f, x: f(x),
    "twice": twice,
    "is_batched": is_batched,
    "dual": dual,
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sin().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "make_fx": lambda f, x: make_fx(f)(x)(2 * x),
    "trace": lambda f, x: torch.jit.trace(f, x)(2 * x),
    "fake": lambda f, x: make_fx(f, None, "fake", True)(x)(2 * x),
}


def values(module: ModuleType, *arrays: Tensor) -> list[bool]:
    states = [
        module.is_transformed(),
        module.count_dispatch_modes(),
        module.is_forward_mode(),
        module.is_tracing(),
    ]
    return [bool(each) for each in states] + [
        known(each) for known in (module.has_storage, module.is_batched) for each in arrays
    ]


@pytest.mark.parametrize("state", STATES)
def test_a_fallback_returns_what_the_private_part_returns(
    state: str, fallbacks: ModuleType
) -> None:
    assert not {id(getattr(private, name)) for name in NAMES} & {*map(id, vars(fallbacks).values())}
    result: list[tuple[list[bool], list[bool]]] = []

    class Double(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            record(gradient)
            return 2 * gradient

    def record(x: Tensor) -> None:
        result.append((values(private, x), values(fallbacks, x)))

    def function(x: Tensor) -> Tensor:
        record(x)
        return 2 * x if state in ("dual", "jvp") else Double.apply(x)

    STATES[state](function, torch.ones(3))
    assert result and all(ours == theirs for ours, theirs in result), result
    plain = [False, False, False, False, True, False]
    assert (state in ("eager", "twice")) == all(ours == plain for ours, _ in result)


@pytest.mark.parametrize("state", [*(name for name in STATES if name != "trace"), "compiled"])
def test_a_layer_computes_the_same_with_the_fallbacks(
    state: str, fallbacks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = GRU(3, 4).requires_grad_(state != "make_fx"), torch.randn(5, 2, 3)
    call = STATES.get(state, lambda f, x: torch.compile(f, backend="eager")(x))
    expected = call(lambda x: layer(x)[0], x.clone())
    for module in (bfloat16, fused, inference, layers):
        for name in NAMES:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(fallbacks, name))
    torch.testing.assert_close(call(lambda x: layer(x)[0], x.clone()), expected)
