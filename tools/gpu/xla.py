"""Compiles the layer and its gradient with XLA for an absent H100: `python -m tools.gpu.xla`.

Needs JAX's plugin for CUDA (200 MB) in the version of jax:
`pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`. The compilation fails if a handler is not
registered for CUDA.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

from functools import partial

import jax
import jax.numpy as jnp
import jax_cuda13_plugin  # noqa: F401 - for a clear error if the plugin is missing
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jax_impl.fused
from common.cells import LayerCall
from common.kernels import cuda

# The properties of the device that XLA needs.
H100 = """gpu_device_info {
  threads_per_warp: 32 block_dim_limit_x: 2147483647 shared_memory_per_block_optin: 232448
  device_memory_size: 84929347584 cuda_compute_capability { major: 9 }
}"""
T, B, D, H, K = 20, 16, 30, 128, 50


def loss(x: jax.Array, weights: list, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """The loss of both directions of a layer."""
    call = LayerCall(x, tokens, weights, lengths, jnp.zeros((2, B, H)))
    outputs, _ = jax_impl.fused.recurrence(call, gpu=True)
    return (outputs**2).sum()


def main() -> None:
    """Print the number of kernel calls in the compiled program."""
    cuda.rehearsed = (9, 0)
    (device, *_) = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    ).devices
    array = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    sides = [[array(shape, float) for shape in ((3 * H, D), (3 * H, H), (3 * H,), (3 * H,))]] * 2
    arguments = (array((K, D), float), sides, array((T, B), int), array((B,), int))
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="gru_cuda' in line]
    assert len(calls) == 2, text
    print(f"compiled for sm_90, with {len(calls)} calls of the kernel")


if __name__ == "__main__":
    main()
