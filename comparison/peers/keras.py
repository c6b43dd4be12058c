"""keras.layers.GRU on PyTorch and on JAX, as users of Keras call it."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.report.schema import Task
from comparison.contenders import Contenders, Run, batch_of, word_vectors
from comparison.implementations import converted
from comparison.peers import function


def contenders(backend: str, device: str) -> Contenders:
    """Keras on one of its backends."""
    os.environ["KERAS_BACKEND"] = backend  # Keras reads the variable when it is imported
    import keras

    if backend == "torch":
        from comparison.peers import torch

        torch.set_up(device)
    timed_by_backend: Any = function(backend, "timed")

    def training(task: Task) -> Run:
        batch = batch_of(task.B, task.T)
        layer = keras.layers.GRU(task.H)
        if task.bidirectional:
            layer = keras.layers.Bidirectional(layer)
        x = word_vectors(task.input_size)[batch.distinct[batch.tokens].T]
        layer.build(x.shape)
        return timed(layer, task.backward, x, batch.lengths)

    def inference(weights: Mapping[str, np.ndarray], x: np.ndarray) -> Run:
        x = np.ascontiguousarray(x.swapaxes(0, 1))
        layer = keras.layers.GRU(weights["gru.0.forward.weight_hh"].shape[1])
        layer.build(x.shape)
        layer.set_weights([*converted("keras", weights).values()])
        return timed(layer, False, x, None)

    def timed(layer: Any, backward: bool, x: np.ndarray, lengths: np.ndarray | None) -> Run:
        """A run of a built layer on x [B, T, D]; if lengths are given, the padding is masked."""
        trained = layer.trainable_variables
        fixed = [variable.value for variable in layer.non_trainable_variables]

        def last(weights: Any, x: Any, lengths: Any, h0: Any, **_: Any) -> Any:
            mask = None
            if lengths is not None:
                mask = keras.ops.arange(x.shape[1]) < keras.ops.expand_dims(lengths, 1)
            named = [weights[variable.path] for variable in trained]
            return None, layer.stateless_call(named, fixed, x, mask=mask)[0]

        weights = {v.path: keras.ops.convert_to_numpy(v) for v in trained}
        return timed_by_backend(last, weights, backward, x, None, lengths, None, None)

    name = f"Keras on {backend}"
    return Contenders({name: training}, {name: inference})
