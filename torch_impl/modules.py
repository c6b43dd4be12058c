"""The GRU as modules of PyTorch, drop-ins for torch.nn.GRU and torch.nn.GRUCell, and any cell.

Its counterpart is jax_impl/modules.py. Each module has the arguments of its own framework's layers;
docs/layer.md compares them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from common.arguments import (
    check_bool,
    check_canonical,
    check_same_dtype,
    check_shape,
    check_sizes,
)
from common.cells import Cell, LayerCall
from common.params import DIRECTIONS, GRU_PARAMETERS, cell_shapes
from torch_impl.gru import CELL
from torch_impl.inference import try_inference_kernel
from torch_impl.layers import as_array, canonical, run
from torch_impl.scan import hoist, hoisted_step
from torch_impl.scanned import exportable


class GRU(nn.RNNBase):
    """torch.nn.GRU with the equations of gru.py, faster on a CPU: its constructor, call and names.

    Keyword arguments in addition to those of nn.GRU:

        reset_after     whether the reset gate acts after the product with U_n. True, the default,
                        computes nn.GRU: the parameters have its names, gates, signs and initial
                        values, and the state_dicts are interchangeable. False computes the GRU of
                        Cho et al. (2014), which nn.GRU cannot; the parameters are the canonical
                        ones (common/params.py), with underscores for dots.
        implementation  "auto", "loop", "scan", "cuda" or "fused": see RECURRENCES in gru.py.

    Example:
        outputs, h_n = GRU(300, 128, batch_first=True)(x, lengths=[7, 5, 2])
    """

    def __init__(
        self, *args: Any, reset_after: bool = True, implementation: str = "auto", **kwargs: Any
    ) -> None:
        """Raises as nn.GRU, and InputError, a ValueError, for an unknown implementation."""
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        check_bool(reset_after=reset_after)
        CELL.resolve(implementation, None)
        super().__init__("GRU", *args, **kwargs)  # not nn.GRU.__init__, which torch.compile refuses
        self.reset_after = reset_after
        self.implementation = implementation
        sides = DIRECTIONS[: 2 if self.bidirectional else 1]
        places = [f"gru.{i}.{side}." for i in range(self.num_layers) for side in sides]
        self._canonical = [[place + name for name in GRU_PARAMETERS] for place in places]
        if not reset_after:
            for ours, own in zip(self._canonical, self._all_weights, strict=True):
                named = zip(own, ours, strict=False)  # without biases, there are fewer of its own
                own[:] = [rename(self, old, new.replace(".", "_")) for old, new in named]
            self._flat_weights_names = [name for names in self._all_weights for name in names]
            self._init_flat_weights()

    @classmethod
    def from_canonical(
        cls,
        parameters: Mapping[str, np.ndarray | Tensor],
        *,
        reset_after: bool,
        batch_first: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        implementation: str = "auto",
    ) -> Self:
        """A GRU with these canonical parameters; parameters of other layers are ignored.

        reset_after: as in their training; the parameters do not tell. dtype: by default, that of
        the parameters.

        Raises ValueError for a parameter that is missing, unknown or of a wrong shape, TypeError
        for mixed dtypes.
        """
        D, H, layers, bidirectional = check_canonical(parameters)
        values = {
            name: p.detach() if isinstance(p, Tensor) else torch.from_numpy(np.array(p))
            for name, p in parameters.items()
        }
        dtype = dtype or values["gru.0.forward.weight_ih"].dtype
        options: dict[str, Any] = {"reset_after": reset_after, "implementation": implementation}
        more = (True, batch_first, dropout, bidirectional)
        gru = cls(D, H, layers, *more, device=device, dtype=dtype, **options)
        with torch.no_grad():
            for ours, own in zip(gru._canonical, gru._all_weights, strict=True):
                for its, name in zip(ours, own, strict=True):
                    value = values[its]
                    getattr(gru, name).copy_(to_nn_gru(value) if reset_after else value)
        return gru

    def canonical(self) -> dict[str, Tensor]:
        """The canonical parameters, the argument of `gru`, as differentiable functions of the
        module's."""
        parameters: dict[str, Tensor] = {}
        for ours, own in zip(self._canonical, self._all_weights, strict=True):
            arrays = [getattr(self, name) for name in own]
            if not self.bias:
                arrays += [arrays[0].new_zeros(3 * self.hidden_size)] * 2
            if self.reset_after:
                arrays = list(map(from_nn_gru, arrays))
            parameters.update(zip(ours, arrays, strict=True))
        return parameters

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Float[Tensor, "L*R B H"] | None = None,
        *,
        lengths: Any = None,
        resets: Tensor | None = None,
        h_reset: Float[Tensor, "L*R B H"] | None = None,
    ) -> tuple[Any, Tensor]:
        """(outputs, h_n) of input [T, B, D], [B, T, D] if batch_first, or [T, D], or packed.

        Keyword arguments in addition to those of nn.GRU: lengths [B], integers in any order (a
        tensor or a list), the number of time steps of each row, after which the outputs are zero;
        resets, bool, of the shape of input without D, true where a sequence begins within a row,
        which starts from h_reset, by default hx, by default zero: see `gru`. Neither is allowed
        with a PackedSequence.

        Raises as nn.GRU, RuntimeError and ValueError, and as `gru`.
        """
        if isinstance(input, PackedSequence):
            if any(each is not None for each in (lengths, resets, h_reset)):
                raise ValueError("lengths, resets, h_reset: expected none beside a PackedSequence")
            return self._packed(input, hx)
        if not self.batch_first and type(input) is Tensor and input.dim() == 3 and len(input):
            call = LayerCall(input, None, (), lengths, hx, resets, h_reset, self.reset_after)
            if (result := self._try_inference_kernel(call)) is not None:
                return result
        x, batch = as_array("input", input), 0 if self.batch_first else 1
        if x.dim() not in (2, 3):
            raise ValueError(f"input: Expected input to be 2D or 3D, got {x.dim()}D instead")
        if resets is not None:
            check_shape("resets", as_array("resets", resets), *x.shape[:-1])
        if x.dim() == 2:  # a batch of one
            states = []
            for name, state in (("hx", hx), ("h_reset", h_reset)):
                if state is not None and as_array(name, state).dim() != 2:
                    raise RuntimeError(
                        f"{name}: For unbatched 2-D input, hx should also be 2-D but got "
                        f"{state.dim()}-D tensor"
                    )
                states.append(state if state is None else state.unsqueeze(1))
            lengths = lengths if lengths is None else integers("lengths", lengths).reshape(-1)
            resets = resets if resets is None else resets.unsqueeze(batch)
            options = {"lengths": lengths, "resets": resets, "h_reset": states[1]}
            outputs, h_n = self.forward(x.unsqueeze(batch), states[0], **options)
            return outputs.squeeze(batch), h_n.squeeze(1)
        self._check(x, None, hx=hx, h_reset=h_reset)
        if self.batch_first:
            x, resets = x.transpose(0, 1), resets if resets is None else resets.transpose(0, 1)
        if lengths is not None:
            lengths = integers("lengths", lengths)
            if lengths.is_meta and not x.is_meta:  # any other device serves as well
                raise ValueError(f"lengths: expected it on {x.device}, found meta")
            lengths = lengths.to(x.device)
        call = LayerCall(x, None, (), lengths, hx, resets, h_reset, self.reset_after)
        outputs, h_n = self._run(call, self._drop)
        return outputs.transpose(0, 1) if self.batch_first else outputs, h_n

    def _packed(self, packed: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        """The layers of a PackedSequence, whose words are the distinct inputs, each indexed
        once."""
        sizes, device = packed.batch_sizes, packed.data.device
        if (sizes.diff() > 0).any():
            raise ValueError("input: expected a PackedSequence whose batch_sizes do not grow")
        self._check(packed.data, sizes, hx=hx)

        def drop(x: Tensor) -> Tensor:
            """Dropout as in nn.GRU, which draws no numbers for padding."""
            return x.masked_scatter(is_word[..., None], self._drop(x[is_word]))

        is_word = (torch.arange(int(sizes[0]), device=sizes.device) < sizes[:, None]).to(device)
        tokens = (is_word.flatten().cumsum(0) - 1).clamp(min=0).view(is_word.shape)
        hx = hx if hx is None else self.permute_hidden(hx, packed.sorted_indices)
        lengths, after = is_word.sum(dim=0), self.reset_after
        call = LayerCall(packed.data, tokens, (), lengths, hx, reset_after=after)
        outputs, h_n = self._run(call, drop)
        h_n = self.permute_hidden(h_n, packed.unsorted_indices)
        return PackedSequence(outputs[is_word], *packed[1:]), h_n

    def _check(self, x: Tensor, sizes: Tensor | None, **states: Tensor | None) -> None:
        """Raise the errors of nn.GRU for these arguments, with the name of the argument."""
        weight = getattr(self, self._all_weights[0][0])
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                "input: input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {x.shape[-1]}"
            )
        if x.device != weight.device:
            raise RuntimeError(
                "input: Input and parameter tensors are not at the same device, found input tensor "
                f"at {x.device} and parameter tensor at {weight.device}"
            )
        if x.dtype != weight.dtype and not autocast_at(x):
            raise ValueError(
                f"input: RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        for name, state in states.items():
            if state is not None:
                expected = self.get_expected_hidden_size(x, sizes)
                message = name + ": Expected hidden size {}, got {}"
                self.check_hidden_size(as_array(name, state), expected, message)
                if state.device != x.device:
                    raise RuntimeError(
                        f"{name}: Input and hidden tensors are not at the same device, found input "
                        f"tensor at {x.device} and hidden tensor at {state.device}"
                    )
                if state.dtype != x.dtype and not autocast_at(x):
                    check_same_dtype(name, state, "input", x)
        if sizes is None and x.shape[1 if self.batch_first else 0] == 0:
            raise RuntimeError("input: Expected sequence length to be larger than 0 in RNN")

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout between layers."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def _try_inference_kernel(self, call: LayerCall) -> tuple[Tensor, Tensor] | None:
        """try_inference_kernel with the module's own parameters: reordering them would take longer
        than the computation of a short text."""
        if torch.is_grad_enabled() or not self.bias or (self.training and self.dropout):
            return None
        if self.implementation not in ("auto", "fused"):
            return None
        weights = [self._parameters.get(name) for name in self._flat_weights_names]
        of_each = len(weights) // self.num_layers
        layers = [weights[i : i + of_each] for i in range(0, len(weights), of_each)]
        return try_inference_kernel(layers, call, self.reset_after)

    def _run(self, call: LayerCall, between: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """`run` of the parameters; without lengths, every row has all steps."""
        result = self._try_inference_kernel(call)
        if result is not None:
            return result
        if call.lengths is None:
            x = call.x
            call = call._replace(lengths=torch.full(x.shape[1:2], x.shape[0], device=x.device))
        parameters, options = self.canonical(), {"implementation": self.implementation}
        return run(exportable(CELL), parameters, call, between, **options)

    def extra_repr(self) -> str:
        """As nn.GRU, with the further arguments that differ from their defaults."""
        return super().extra_repr() + own_repr(self.reset_after, self.implementation)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if not of_other_kind(self.reset_after, "weight_ih_l0", state_dict, prefix, args[-1]):
            super()._load_from_state_dict(state_dict, prefix, *args)


class GRUCell(nn.GRUCell):
    """torch.nn.GRUCell with the equations of gru.py: a single time step.

    With reset_after=True, the default, it computes torch.nn.GRUCell. With reset_after=False, which
    torch.nn.GRUCell cannot compute, it has the parameters of a GRU with one layer, and the
    state_dicts are interchangeable.

    Example:
        h = GRUCell(300, 128)(x, h)
    """

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        """Raises as nn.GRUCell."""
        check_bool(reset_after=reset_after)
        super().__init__(*args, **kwargs)
        self.reset_after = reset_after
        if not reset_after:
            for name in GRU_PARAMETERS:
                rename(self, name, f"gru_0_forward_{name}")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state [B, H], or [H], of input [B, D], or [D], and the state hx, or zero.

        Raises as nn.GRUCell, or ValueError and TypeError, for invalid arguments.
        """
        if self.reset_after:
            return super().forward(input, hx)
        x = as_array("input", input)
        if x.dim() == 1:
            return self.forward(x[None], hx if hx is None else as_array("hx", hx)[None])[0]
        weights = [getattr(self, f"gru_0_forward_{name}") for name in GRU_PARAMETERS]
        H, dtype = self.hidden_size, weights[0].dtype
        h = x.new_zeros(x.shape[0], H) if hx is None else as_array("hx", hx)
        if autocast_at(x):  # computed in the dtype of the parameters, as in nn.GRUCell
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.to(dtype), h.to(dtype))
        if x.dim() != 2 or x.shape[1] != self.input_size or h.shape != (x.shape[0], H):
            check_shape("input", x, "B", self.input_size)
            check_shape("hx", h, x.shape[0], H)
        if not x.dtype == h.dtype == dtype:
            check_same_dtype("input", x, "weight_ih", weights[0])
            check_same_dtype("hx", h, "input", x)
        if not self.bias:
            weights[2:] = [x.new_zeros(3 * H)] * 2
        bias, *hoisted = hoist(weights, reset_after=False)
        a_zr, a_n = F.linear(x, weights[0], bias).split([2 * H, H], dim=-1)
        return hoisted_step(a_zr, a_n, h, *hoisted, reset_after=False)

    def extra_repr(self) -> str:
        """As nn.GRUCell, with the further arguments that differ from their defaults."""
        return super().extra_repr() + own_repr(self.reset_after)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if not of_other_kind(self.reset_after, "weight_ih", state_dict, prefix, args[-1]):
            super()._load_from_state_dict(state_dict, prefix, *args)


class Recurrent(nn.Module):
    """Layers of any cell with the arguments of GRU, except unbatched or packed input and dropout.

    The parameters are the canonical ones (common/params.py), with underscores for dots.

    Example:
        outputs, h_n = Recurrent(CELL, 300, 128, batch_first=True)(x, lengths=[7, 5, 2])
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        reset_after: bool = False,
        implementation: str = "auto",
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raises ValueError and TypeError for invalid arguments."""
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_bool(bidirectional=bidirectional, reset_after=reset_after, batch_first=batch_first)
        cell.resolve(implementation, None)
        super().__init__()
        self.cell, self.reset_after, self.implementation = cell, reset_after, implementation
        self.batch_first, self.sizes = batch_first, (input_size, hidden_size, num_layers)
        shapes = cell_shapes(cell.spec, input_size, hidden_size, num_layers, bidirectional)
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            value, initial = torch.empty(shape, device=device, dtype=dtype), cell.spec.initial(name)
            if initial is None:
                nn.init.uniform_(value, -(hidden_size**-0.5), hidden_size**-0.5)
            else:
                nn.init.constant_(value, initial)
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value))

    def extra_repr(self) -> str:
        """The cell, its sizes and, like nn.GRU, the arguments that differ from their defaults."""
        flags = {"bidirectional": any(".backward." in name for name in self.names)}
        flags |= {"batch_first": self.batch_first, "reset_after": self.reset_after}
        shown = [f"{name}=True" for name, value in flags.items() if value]
        return ", ".join([self.cell.name, *map(str, self.sizes), *shown])

    def canonical(self) -> dict[str, Tensor]:
        """The canonical parameters."""
        return canonical(self, self.names)

    def forward(
        self,
        input: Float[Tensor, "T B D"] | Float[Tensor, "B T D"],
        hx: Float[Tensor, "L*R B S*H"] | None = None,
        *,
        lengths: Any = None,
        resets: Tensor | None = None,
        h_reset: Float[Tensor, "L*R B S*H"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(outputs, h_n): see GRU. Raises as `gru`."""
        x = as_array("input", input)
        check_shape("input", x, *("BTD" if self.batch_first else "TBD"))
        if self.batch_first:
            x, resets = x.transpose(0, 1), resets if resets is None else resets.transpose(0, 1)
        lengths = [len(x)] * x.shape[1] if lengths is None else lengths
        lengths = integers("lengths", lengths).to(x.device)
        call = LayerCall(x, None, (), lengths, hx, resets, h_reset, self.reset_after)
        parameters, way = self.canonical(), self.implementation
        outputs, h_n = run(exportable(self.cell), parameters, call, implementation=way)
        return outputs.transpose(0, 1) if self.batch_first else outputs, h_n


def from_nn_gru(stacked: Float[Tensor, "3H *N"]) -> Float[Tensor, "3H *N"]:
    """The gates z, r, n from nn.GRU's r, z, n, whose z is the share of the state that is kept."""
    r, z, n = stacked.chunk(3)
    return torch.cat([-z, r, n])


def to_nn_gru(stacked: Float[Tensor, "3H *N"]) -> Float[Tensor, "3H *N"]:
    """The inverse of from_nn_gru."""
    z, r, n = stacked.chunk(3)
    return torch.cat([r, -z, n])


def autocast_at(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of a tensor."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def integers(name: str, values: Any) -> Tensor:
    """A tensor unchanged; integers that NumPy can convert, such as a list, as a tensor.

    Raises TypeError for others.
    """
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name}: expected integers, found {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def rename(module: nn.Module, name: str, new: str) -> str:
    """Rename a parameter; returns the new name."""
    parameter = getattr(module, name)
    delattr(module, name)
    module.register_parameter(new, parameter)
    return new


def own_repr(reset_after: bool, implementation: str = "auto") -> str:
    """The part of a representation that PyTorch's own lacks."""
    text = "" if reset_after else ", reset_after=False"
    return text if implementation == "auto" else f"{text}, implementation={implementation}"


def of_other_kind(
    reset_after: bool, theirs: str, state_dict: Mapping[str, Any], prefix: str, errors: list[str]
) -> bool:
    """Whether a state_dict is for the other reset_after; if so, extends load_state_dict's
    errors."""
    names = ("gru_0_forward_weight_ih", theirs)
    own, other = reversed(names) if reset_after else names
    refused = prefix + other in state_dict and prefix + own not in state_dict
    if refused:
        errors.append(
            f"{prefix}{other} is of a GRU with reset_after={not reset_after}, this one has "
            f"reset_after={reset_after}: no choice of parameters makes the one compute the other."
        )
    return refused
