"""What holds for every batch, of whatever sizes: checked on random ones, in float64.

Which examples are drawn is fixed, so that a failure can be repeated.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from comparison.implementations import Case
from comparison.parity import Size, check, draw, without_head
from comparison.peers import jax as jax_peer
from comparison.peers import torch as torch_peer

IN_TORCH = [*map(torch_peer.torch_cell, torch_peer.OURS)]
IN_JAX = [*map(jax_peer.jax_cell, jax_peer.OURS)]


def on_random(few: int, many: int, few_in_jax: Mapping[str, int] = {}, **drawn: st.SearchStrategy):
    """A test of each implementation on few examples, and on many of them in .ci/long.

    XLA compiles each example for seconds, so JAX's implementations have fewer of them.
    """
    numbers = [(each, few) for each in IN_TORCH]
    numbers += [(each, few_in_jax[each.name]) for each in IN_JAX if each.name in few_in_jax]
    numbers += [pytest.param(each, many, marks=pytest.mark.long) for each in IN_TORCH + IN_JAX]

    def decorate(holds):
        @pytest.mark.parametrize(
            ("implementation", "number"), numbers, ids=lambda it: getattr(it, "name", it)
        )
        def test(implementation, number):
            options = settings(
                max_examples=number,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            options(given(**drawn)(lambda **example: holds(implementation, **example)))()

        return test

    return decorate


@st.composite
def cases(
    draw_from: st.DrawFn,
    layers: int = 3,
    directions: tuple[int, ...] = (1, 2),
    either: tuple[bool, ...] = (False,),
) -> Case:
    """A random case: lengths with zeros and ties, in any order; h0 or none. Of either, tokens or
    none, resets or none."""
    T = draw_from(st.integers(0, 40))
    size = Size(
        name="random",
        T=T,
        D=draw_from(st.integers(1, 33)),
        H=draw_from(st.integers(1, 33)),
        layers=draw_from(st.integers(1, layers)),
        directions=draw_from(st.sampled_from(directions)),
        lengths=draw_from(st.lists(st.integers(0, T), min_size=1, max_size=9)),
        h0=draw_from(st.booleans()),
        distinct=draw_from(st.integers(1, 50)) if draw_from(st.sampled_from(either)) else None,
        resets=draw_from(st.sampled_from(either)),
    )
    return draw(size, draw_from(st.booleans()), draw_from(st.integers(0, 2**32 - 1)))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """To within rounding: the same sums in another order."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


@on_random(25, 200, {"jax fused": 6}, case=cases(either=(False, True)))
def test_results_and_gradients_are_the_oracles(implementation, case):
    assert [row for row in check(implementation, (case,), np.float64) if not row.passed] == []


@on_random(5, 50, case=cases())
def test_padding_changes_nothing(implementation, case):
    padded = np.arange(len(case.x))[:, None] >= case.lengths
    assume(padded.any())
    filled = replace(case, x=np.where(padded[..., None], np.nan, case.x))
    expected, actual = implementation.run(case), implementation.run(filled)
    for name in expected:
        assert np.array_equal(actual[name], expected[name]), name
    assert not actual["d x"][padded].any()


@on_random(5, 50, case=cases(layers=2))
def test_a_batch_is_its_rows_one_by_one(implementation, case):
    # The loss is a mean over rows, so what is differentiated differs by its share in each.
    together = implementation.run(without_head(case))
    for row in range(len(case.lengths)):
        one = slice(row, row + 1)
        alone = implementation.run(
            replace(
                case,
                parameters=without_head(case).parameters,
                x=case.x[:, one],
                lengths=case.lengths[one],
                h0=None if case.h0 is None else case.h0[:, one],
                labels=case.labels[one],
                d_outputs=case.d_outputs[:, one],
                d_h_last=case.d_h_last[:, one],
            )
        )
        for name in {"outputs", "h_last", "d x", "d h0"} & alone.keys():
            assert_close(alone[name], together[name][:, one])


@on_random(5, 50, case=cases(layers=2, directions=(1,)), share=st.floats(0, 1))
def test_a_sequence_in_two_parts_is_the_whole(implementation, case, share):
    at = round(share * len(case.x))
    whole = implementation.run(case)
    first = implementation.run(
        replace(
            case, x=case.x[:at], lengths=np.minimum(case.lengths, at), d_outputs=case.d_outputs[:at]
        )
    )
    second = implementation.run(
        replace(
            case,
            x=case.x[at:],
            lengths=np.maximum(case.lengths - at, 0),
            h0=first["h_last"],
            d_outputs=case.d_outputs[at:],
        )
    )
    assert_close(np.concatenate([first["outputs"], second["outputs"]]), whole["outputs"])
    assert_close(second["h_last"], whole["h_last"])
    assert_close(second["d x"], whole["d x"][at:])


@on_random(5, 50, case=cases(layers=1, directions=(2,)))
def test_a_bidirectional_layer_is_two_unidirectional_ones(implementation, case):
    both = implementation.run(case)
    H = case.d_h_last.shape[-1]
    for place, side in enumerate(("forward", "backward")):

        def turn(values, side=side):
            """Reverse each row's words, if this is the backward direction."""
            turned = values.copy()
            for row, length in enumerate(case.lengths):
                if side == "backward":
                    turned[:length, row] = values[:length, row][::-1]
            return turned

        half = slice(place * H, (place + 1) * H)
        parameters = {
            name.replace(side, "forward"): value
            for name, value in case.parameters.items()
            if side in name
        }
        alone = implementation.run(
            replace(
                case,
                parameters=parameters
                | {
                    "head.weight": case.parameters["head.weight"][:, half],
                    "head.bias": case.parameters["head.bias"],
                },
                x=turn(case.x),
                h0=None if case.h0 is None else case.h0[place : place + 1],
                d_outputs=turn(case.d_outputs[..., half]),
                d_h_last=case.d_h_last[place : place + 1],
            )
        )
        assert_close(turn(alone["outputs"]), both["outputs"][..., half])
        assert_close(alone["h_last"], both["h_last"][place : place + 1])
