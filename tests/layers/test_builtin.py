"""The baseline is what nn.GRU computes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from common import convert
from common.data.batches import Batch
from common.params import ModelConfig, init
from common.training.options import TrainConfig
from torch_impl.learner import Learner


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_baseline_is_nn_gru_on_packed_sequences(bidirectional: bool, layers: int) -> None:
    config = ModelConfig(6, 8, layers, bidirectional=bidirectional, reset_after=True, builtin=True)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20, 6))
    parameters = init(config, 0, vectors)
    learner = Learner(config, TrainConfig(), vectors, parameters, dtype="float64")
    lengths = np.array([9, 5, 5, 1, 0], np.int32)
    tokens = rng.integers(0, 20, (9, 5)).astype(np.int32)
    batch = Batch(
        np.arange(20, dtype=np.int32), tokens, lengths, np.zeros(5, np.int32), np.arange(5)
    )

    layer = nn.GRU(6, 8, layers, bidirectional=bidirectional).double()
    of_gru = {name: value for name, value in parameters.items() if name.startswith("gru.")}
    state = convert.to_format("torch", of_gru, reset_after=True)
    layer.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    packed = pack_padded_sequence(torch.tensor(vectors[tokens[:, :4]]), lengths[:4].tolist())
    last = layer(packed)[1][-config.directions :]
    last = torch.cat([last, last.new_zeros(len(last), 1, 8)], dim=1)  # the review without words
    features = torch.relu(torch.cat(last.unbind(), dim=-1)).detach().numpy()
    expected = features @ parameters["head.weight"].T + parameters["head.bias"]
    np.testing.assert_allclose(learner.logits(batch), expected, rtol=1e-12, atol=1e-13)


def test_the_baselines_state_comes_back_under_canonical_names() -> None:
    config = ModelConfig(6, 8, bidirectional=True, reset_after=True, builtin=True)
    vectors = np.random.default_rng(0).standard_normal((20, 6))
    parameters = init(config, 0, vectors)
    learner = Learner(config, TrainConfig(), vectors, parameters, dtype="float64")
    for name, value in learner.parameters().items():
        np.testing.assert_array_equal(value, parameters[name])
    rng = np.random.default_rng(1)
    moments = {f"first_moment.{n}": rng.standard_normal(v.shape) for n, v in parameters.items()}
    moments |= {f"second_moment.{n}": rng.random(v.shape) for n, v in parameters.items()}
    learner.load(parameters, {"step": np.array(7), **moments})
    state = learner.optimizer_state()
    assert state.pop("step") == 7
    for name, value in state.items():
        np.testing.assert_array_equal(value, moments[name])
