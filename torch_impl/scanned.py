"""Recurrences that torch.export and torch.onnx.export record for any number of time steps.

In JAX, jax.lax.scan serves all uses, so this file has no twin.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from common.cells import Cell, LayerCall, Recurrence
from torch_impl.layers import LayerOutput, Restart, Weights, by_direction, gather, project


def exportable(cell: Cell) -> Cell:
    """The cell; while torch.onnx.export traces, with `scanned` as its only recurrence.

    ONNX has no operator for this project's kernel. torch.export without ONNX keeps the kernel.
    """
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return with_scan(cell)
    return cell


def with_scan(cell: Cell) -> Cell:
    """The cell with `scanned` as its only recurrence."""
    return replace(cell, recurrences={"scan": Recurrence(scanned(cell.step))})


def scanned(step: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Callable[..., LayerOutput]:
    """`loop` for any number of time steps, with torch.export's scan operator, a prototype.

    torch.export and torch.onnx.export record it as one operation.
    """

    def direction(
        call: LayerCall,
        mask: Bool[Tensor, "T B 1"],
        weights: Weights,
        h: Float[Tensor, "B H"],
        restart: Restart | None,
        *,
        reverse: bool,
    ) -> tuple[Float[Tensor, "B H"], Float[Tensor, "T B H"]]:
        weight_ih, weight_hh, bias_ih, *hidden = weights
        # The inputs of the operator must not share memory with its initial state.
        begin, h_reset = (torch.zeros_like(mask), h) if restart is None else restart

        def one(h: Tensor, a: Tensor, live: Tensor, begin: Tensor, *read: Any) -> Any:
            h = torch.where(begin, read[0], h)
            after, _ = step(a, h, *read[1 : 2 + len(hidden)], reset_after=call.reset_after)
            h = torch.where(live, after, h)
            return h, h.clone()  # not the same tensor twice

        along = [gather(project(call.x, weight_ih, bias_ih), call.tokens, mask), mask, begin]
        along = [each.flip(0) for each in along] if reverse else along
        read = (h_reset.clone(), weight_hh, *hidden)
        if not isinstance(h.shape[0], int):  # AOTInductor needs the symbol for it
            read += (h.shape[0],)
        h, states = torch.ops.higher_order.scan(one, [h], along, read)
        return h, states.flip(0) if reverse else states

    return partial(by_direction, direction)
