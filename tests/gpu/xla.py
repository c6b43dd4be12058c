"""XLA compiles the layer and its gradient for an H100 that is not there: `python -m tests.gpu.xla`.

Needs JAX's plugin for CUDA, 200 MB: `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`, of
jax's version. A call of a handler that is not registered for CUDA fails there.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jax_impl.fused
from common.kernels import cuda

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
runtime_version: { major: 13 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
T, B, D, H, K = 20, 16, 30, 128, 50


def main() -> None:
    """Print what of the compiled program is ours."""
    cuda.rehearsed = (9, 0)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    place = SingleDeviceSharding(topology.devices[0])

    def array(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def loss(x: jax.Array, weights: list, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        h0 = jnp.zeros((2, B, H))
        how = {"reset_after": False, "return_sequences": True, "gpu": True}
        outputs, _ = jax_impl.fused.recurrence(x, tokens, weights, lengths, h0, **how)
        return (outputs**2).sum()

    side = [array(3 * H, D), array(3 * H, H), array(3 * H), array(3 * H)]
    given = (array(K, D), [side, side], array(T, B, dtype=jnp.int32), array(B, dtype=jnp.int32))
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*given)
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    ours = [line for line in text.splitlines() if 'custom_call_target="gru_cuda' in line]
    assert len(ours) == 2, text
    print(f"compiled for {topology.devices[0].device_kind}, with {len(ours)} calls of the kernel")


if __name__ == "__main__":
    main()
