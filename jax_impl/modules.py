"""The GRU as modules of Flax, drop-ins for nnx.RNN(nnx.GRUCell(...)) and nnx.GRUCell, and any cell.

Its counterpart is torch_impl/modules.py. Each module has the arguments of its own framework's
layers; docs/layer.md compares them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.recurrent import RNNCellBase, flip_sequences
from jax import Array
from jaxtyping import DTypeLike, Float

from common.arguments import check_bool, check_canonical, check_shape, check_sizes
from common.cells import Cell, LayerCall
from common.params import GRU_PARAMETERS, cell_shapes, gru_shapes
from jax_impl.gru import CELL
from jax_impl.layers import as_array, canonical, run
from jax_impl.scan import hoist, hoisted_step

Initializer = Callable[..., Array]


class GRU(nnx.Module):
    """A drop-in for nnx.RNN(nnx.GRUCell(...)) with the equations of gru.py, faster on a CPU, with
    several layers and both directions.

    Example:
        outputs, h_last = GRU(300, 128, bidirectional=True, rngs=nnx.Rngs(0))(x, lengths)
        outputs = GRU(300, 128, return_carry=False, rngs=nnx.Rngs(0))(x, seq_lengths=lengths)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        reset_after: bool = True,
        implementation: str = "auto",
        time_major: bool = False,
        return_carry: bool | None = None,
        reverse: bool = False,
        keep_order: bool = False,
        kernel_init: Initializer | None = None,
        recurrent_kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Arguments:
            dropout          the rate of dropout between layers, drawn from rngs.dropout; the
                             module's eval() turns it off
            reset_after      whether the reset gate acts after the product with U_n: True, the
                             default, as in nnx.GRUCell, or False as in Cho et al. (2014)
            implementation   "auto", "loop", "scan", "cuda" or "fused": see RECURRENCES in gru.py
            time_major, return_carry, reverse, keep_order    defaults of the call's arguments
            kernel_init, recurrent_kernel_init, bias_init    initializers of a gate, called with a
                             key, a shape ([D, H], [H, H], [H]) and a dtype; by default uniform in
                             ±1/sqrt(H)
            dtype            the dtype of the computation, to which inputs and parameters are
                             converted; None: their common dtype
            param_dtype      the dtype of the parameters
            rngs             draws the initial parameters from its stream params

        Raises ValueError and TypeError for invalid arguments.
        """
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_bool(bidirectional=bidirectional, reset_after=reset_after)
        check_bool(time_major=time_major, reverse=reverse, keep_order=keep_order)
        CELL.resolve(implementation, None)
        if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a number in 0..1, found {dropout!r}")
        check_rngs(rngs)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bidirectional, self.reset_after = bidirectional, reset_after
        self.implementation, self.dtype, self.param_dtype = implementation, dtype, param_dtype
        self.time_major, self.return_carry = time_major, return_carry
        self.reverse, self.keep_order = reverse, keep_order
        inits = dict(zip(GRU_PARAMETERS, (kernel_init, recurrent_kernel_init), strict=False))
        shapes = gru_shapes(input_size, hidden_size, num_layers, bidirectional)
        for name, shape in shapes.items():
            init = inits.get(name.rpartition(".")[2], bias_init)
            value = initial(init, rngs.params(), shape, hidden_size, param_dtype)
            setattr(self, name.replace(".", "_"), nnx.Param(value))  # no dots in attributes
        self.names = tuple(shapes)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    @classmethod
    def from_canonical(
        cls, parameters: Mapping[str, np.ndarray], *, reset_after: bool, **options: Any
    ) -> Self:
        """A GRU with these canonical parameters; parameters of other layers are ignored.

        reset_after: as in their training; the parameters do not tell. options: those of the
        constructor except sizes, layers and directions; dropout requires rngs.

        Raises ValueError for a parameter that is missing, unknown or of a wrong shape, TypeError
        for mixed dtypes.
        """
        own = {n: as_array(n, p) for n, p in parameters.items() if n.startswith("gru.")}
        *sizes, bidirectional = check_canonical(own)
        if options.get("dropout") and "rngs" not in options:
            raise ValueError("rngs: expected some to draw dropout with, found none")
        first = own["gru.0.forward.weight_ih"]
        options = {"param_dtype": first.dtype, "rngs": nnx.Rngs(0), **options}
        gru = cls(*sizes, bidirectional=bidirectional, reset_after=reset_after, **options)
        for name in gru.names:
            parameter = getattr(gru, name.replace(".", "_"))
            parameter[...] = own[name].astype(parameter.dtype)
        return gru

    def canonical(self) -> dict[str, Array]:
        """The canonical parameters, the argument of `gru`."""
        return canonical(self, self.names)

    def __call__(
        self,
        inputs: Float[Array, "*B T D"],
        lengths: Any = None,
        h0: Float[Array, "L*R *B H"] | None = None,
        *,
        resets: Array | None = None,
        h_reset: Float[Array, "L*R *B H"] | None = None,
        initial_carry: Array | None = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """(outputs [*B, T, R*H], h_last [L*R, *B, H]) of inputs [*B, T, D].

        lengths [*B], in any order, are the numbers of time steps of the rows, after which the
        outputs are zero; resets, bool [*B, T], are true where a sequence begins within a row, which
        starts from h_reset, by default h0, by default zero: see `gru`.

        The arguments of nnx.RNN: seq_lengths and initial_carry are other names of lengths and h0;
        h0 may be [*B, H] for one layer and direction. time_major: inputs, resets and outputs have
        the time axis first. reverse: each row is read from its end; keep_order: its outputs are
        then in the order of the inputs. return_carry: False returns outputs alone, True (carry,
        outputs) as nnx.RNN does. rngs: for dropout.

        Raises as `gru`, and ValueError for two names of one argument and for resets with reverse.
        """
        lengths = one_of("lengths", lengths, "seq_lengths", seq_lengths)
        own = (self.return_carry, self.time_major, self.reverse, self.keep_order)
        overrides = (return_carry, time_major, reverse, keep_order)
        return_carry, time_major, reverse, keep_order = (
            mine if its is None else its for mine, its in zip(own, overrides, strict=True)
        )
        x, resets = self._time_major(inputs, resets, time_major)
        if resets is not None and reverse:
            raise ValueError("resets: expected none with reverse")
        batch = x.shape[1:-1]
        state = partial(self._state, batch)
        h0 = one_of("h0", state("h0", h0), "initial_carry", state("initial_carry", initial_carry))
        h_reset = state("h_reset", h_reset)
        lengths = lengths if lengths is None else as_array("lengths", lengths, np.asarray)
        call = LayerCall(x, None, (), lengths, h0, resets, h_reset, self.reset_after)
        call = self._with_one_batch(call, batch)

        def turn(array: Array) -> Array:
            return flip_sequences(array, jnp.asarray(call.lengths), 1, True) if reverse else array

        between = None if self.dropout is None else partial(self.dropout, rngs=rngs)
        outputs, h_last = self._run(call._replace(x=turn(call.x)), between)
        outputs = turn(outputs) if keep_order else outputs
        if len(batch) != 1:
            outputs, h_last = (a.reshape(len(a), *batch, a.shape[-1]) for a in (outputs, h_last))
        outputs = outputs if time_major else jnp.moveaxis(outputs, 0, -2)
        if return_carry is None:
            return outputs, h_last
        carry = h_last[0] if len(h_last) == 1 else h_last
        return (carry, outputs) if return_carry else outputs

    def _time_major(
        self, inputs: Any, resets: Any, time_major: bool | None
    ) -> tuple[Array, Array | None]:
        """inputs [T, *B, D] and resets [T, *B], from the arguments."""
        x = as_array("inputs", inputs)
        if x.ndim < 2 or x.shape[-1] != self.input_size:
            shape = f"[T, *B, {self.input_size}]" if time_major else f"[*B, T, {self.input_size}]"
            raise ValueError(f"inputs: expected shape {shape}, found {list(x.shape)}")
        if resets is not None:
            resets = as_array("resets", resets)
            check_shape("resets", resets, *x.shape[:-1])
            resets = resets if time_major else jnp.moveaxis(resets, -1, 0)
        return x if time_major else jnp.moveaxis(x, -2, 0), resets

    def _state(self, batch: Sequence[int], name: str, state: Any) -> Array | None:
        """The states of all layers and directions [L*R, *B, H], from an argument or None."""
        if state is None:
            return None
        array, rows = as_array(name, state), self.num_layers * (2 if self.bidirectional else 1)
        if name == "initial_carry" and rows == 1:
            check_shape(name, array, *batch, self.hidden_size)
            return array[None]
        check_shape(name, array, rows, *batch, self.hidden_size)
        return array

    def _with_one_batch(self, call: LayerCall, batch: Sequence[int]) -> LayerCall:
        """The call with its batch axes flattened into one, and with lengths."""
        x, lengths = call.x, call.lengths
        if len(batch) != 1:
            first, B, H = x.shape[0], math.prod(batch), self.hidden_size
            rows = self.num_layers * (2 if self.bidirectional else 1)
            sizes = {"x": (first, B, self.input_size), "lengths": (B,), "resets": (first, B)}
            sizes |= {"h0": (rows, B, H), "h_reset": (rows, B, H)}
            arrays: dict[str, Any] = {n: a for n, a in call.arrays.items() if a is not None}
            arrays = {n: jnp.reshape(a, sizes[n]) for n, a in arrays.items()}
            call = call._replace(**arrays)
            x, lengths = call.x, call.lengths
        B = x.shape[1]
        if lengths is None or (B == 0 and lengths.size == 0):
            lengths = (np if isinstance(B, int) else jnp).full(B, x.shape[0])
        return call._replace(x=x, lengths=lengths)

    def _run(self, call: LayerCall, between: Any) -> tuple[Array, Array]:
        """`run` of the parameters, in self.dtype."""
        parameters = self.canonical()
        if self.dtype is not None:
            arrays = {"x": call.x, "h0": call.h0, "h_reset": call.h_reset}
            parameters, arrays = jax.tree.map(
                lambda array: as_array("parameters", array).astype(self.dtype), (parameters, arrays)
            )
            call = call._replace(**arrays)
        return run(CELL, parameters, call, between, implementation=self.implementation)


class GRUCell(RNNCellBase):
    """A drop-in for nnx.GRUCell with the equations of gru.py: a single time step.

    Its parameters are those of a GRU with one layer and direction, under canonical names without
    their prefix: weight_ih [3H, D], weight_hh [3H, H], bias_ih [3H], bias_hh [3H].

    Example:
        h, y = GRUCell(300, 128, rngs=nnx.Rngs(0))(h, x)
    """

    num_feature_axes = 1

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        reset_after: bool = True,
        kernel_init: Initializer | None = None,
        recurrent_kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """The arguments are those of GRU. Raises as GRU does."""
        check_sizes(in_features=in_features, hidden_features=hidden_features)
        check_bool(reset_after=reset_after)
        check_rngs(rngs)
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.reset_after = reset_after
        self.dtype = dtype
        self.param_dtype = param_dtype
        inits = (kernel_init, recurrent_kernel_init, bias_init, bias_init)
        shapes = gru_shapes(in_features, hidden_features, 1, False).values()
        for name, init, shape in zip(GRU_PARAMETERS, inits, shapes, strict=True):
            value = initial(init, rngs.params(), shape, hidden_features, param_dtype)
            setattr(self, name, nnx.Param(value))

    def __call__(self, carry: Float[Array, "*B H"], inputs: Float[Array, "*B D"]) -> Any:
        """(h, h), where h is the next state [*B, H].

        If the dtype of the computation is given, h has the dtype of the carry, otherwise that to
        which inputs, carry and parameters promote, as in nnx.GRUCell. Raises ValueError for a wrong
        size, TypeError for an argument that is no array.
        """
        x, h = as_array("inputs", inputs), as_array("carry", carry)
        for name, array, size in (
            ("inputs", x, self.in_features),
            ("carry", h, self.hidden_features),
        ):
            if not array.ndim or array.shape[-1] != size:
                raise ValueError(f"{name}: expected shape [*B, {size}], found {list(array.shape)}")
        weights = [getattr(self, name)[...] for name in GRU_PARAMETERS]
        dtype = h.dtype
        if self.dtype is not None:
            x, h, *weights = (a.astype(self.dtype) for a in (x, h, *weights))
        bias, *hoisted = hoist(weights, reset_after=self.reset_after)
        a_zr, a_n = jnp.split(x @ weights[0].T + bias, [2 * self.hidden_features], axis=-1)
        h = hoisted_step(a_zr, a_n, h, *hoisted, reset_after=self.reset_after)
        h = h if self.dtype is None else h.astype(dtype)
        return h, h

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> Float[Array, "*B H"]:
        """The initial carry for inputs of this shape: zeros, or from carry_init with a key of
        rngs."""
        shape = (*input_shape[:-1], self.hidden_features)
        if carry_init is None:
            return jnp.zeros(shape, self.param_dtype)
        if rngs is None:
            raise ValueError("rngs: expected some beside carry_init, found None")
        stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        return carry_init(stream(), shape, self.param_dtype)


class Recurrent(nnx.Module):
    """Layers of any cell with the arguments of GRU, except dropout and those of nnx.RNN.

    Example:
        outputs, h_last = Recurrent(CELL, 300, 128, rngs=nnx.Rngs(0))(x, lengths)
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
        time_major: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Raises ValueError and TypeError for invalid arguments."""
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_bool(bidirectional=bidirectional, reset_after=reset_after, time_major=time_major)
        cell.resolve(implementation, None)
        check_rngs(rngs)
        self.cell, self.reset_after, self.implementation = cell, reset_after, implementation
        self.time_major = time_major
        shapes = cell_shapes(cell.spec, input_size, hidden_size, num_layers, bidirectional)
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            value = initial(None, rngs.params(), shape, hidden_size, param_dtype)
            if (declared := cell.spec.initial(name)) is not None:
                value = jnp.full(shape, declared, param_dtype)
            setattr(self, name.replace(".", "_"), nnx.Param(value))  # no dots in attributes

    def canonical(self) -> dict[str, Array]:
        """The canonical parameters."""
        return canonical(self, self.names)

    def __call__(
        self,
        inputs: Float[Array, "B T D"] | Float[Array, "T B D"],
        lengths: Any = None,
        h0: Float[Array, "L*R B S*H"] | None = None,
        *,
        resets: Array | None = None,
        h_reset: Float[Array, "L*R B S*H"] | None = None,
    ) -> tuple[Array, Array]:
        """(outputs, h_last): see GRU. Raises as `gru`."""
        x = as_array("inputs", inputs)
        check_shape("inputs", x, *("TBD" if self.time_major else "BTD"))
        if not self.time_major:
            x, resets = x.swapaxes(0, 1), resets if resets is None else resets.swapaxes(0, 1)
        lengths = jnp.full(x.shape[1], len(x)) if lengths is None else lengths
        call = LayerCall(x, None, (), lengths, h0, resets, h_reset, self.reset_after)
        parameters, way = self.canonical(), self.implementation
        outputs, h_last = run(self.cell, parameters, call, implementation=way)
        return outputs if self.time_major else outputs.swapaxes(0, 1), h_last


def one_of(name: str, value: Any, other: str, its: Any) -> Any:
    """The value of an argument that has two names."""
    if value is not None and its is not None:
        raise ValueError(f"{name}, {other}: expected one of the two, found both")
    return its if value is None else value


def check_rngs(rngs: Any) -> None:
    """Raise TypeError unless these are rngs."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs: expected nnx.Rngs, found {type(rngs).__name__}")


def initial(
    init: Initializer | None, key: Array, shape: tuple[int, ...], hidden_size: int, dtype: DTypeLike
) -> Array:
    """The initial values of a parameter, from the initializer of a gate, or uniform."""
    if init is None:
        bound = hidden_size**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)
    gate = (*shape[1:], hidden_size)  # the initializers of JAX take [in, out]
    return jnp.concatenate([init(each, gate, dtype).T for each in jax.random.split(key, 3)])
