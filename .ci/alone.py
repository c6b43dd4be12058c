"""That the layer computes and trains where pip installed the extra of one framework alone.

python .ci/alone.py {torch,jax}
"""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import numpy as np

FRAMEWORKS = ("torch", "jax")
REST = ("altair", "flax", "gensim", "sklearn", "tyro")


def torch_losses(x: np.ndarray) -> list[float]:
    """The losses before each of three steps of gradient descent."""
    import torch

    from torch_impl import GRU

    torch.manual_seed(0)
    layer, x = GRU(3, 4, implementation="fused"), torch.from_numpy(x)
    optimizer, losses = torch.optim.SGD(layer.parameters(), 0.1), []
    for _ in range(3):
        loss = layer(x)[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def jax_losses(x: np.ndarray) -> list[float]:
    """The losses before each of three steps of gradient descent."""
    import optax
    from flax import nnx

    from jax_impl import GRU

    layer, losses = GRU(3, 4, implementation="fused", rngs=nnx.Rngs(0)), []
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    for _ in range(3):
        loss, gradients = nnx.value_and_grad(lambda layer: (layer(x)[0] ** 2).mean())(layer)
        optimizer.update(layer, gradients)
        losses.append(float(loss))
    return losses


def refusal(*arguments: str) -> str:
    """The line with which a program ends whose packages are missing."""
    command = [sys.executable, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and not process.stdout, process
    (line,) = process.stderr.splitlines()
    return line


def main() -> None:
    framework = sys.argv[1]
    (other,) = set(FRAMEWORKS) - {framework}
    brought = [name for name in (other, *REST) if find_spec(name)]
    assert brought == (["flax"] if framework == "jax" else []), brought

    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    losses = {"torch": torch_losses, "jax": jax_losses}[framework](x)
    assert losses[0] > losses[1] > losses[2], losses

    train = refusal("-m", f"{framework}_impl.train")
    assert train == 'error: gensim is not installed: pip install -e ".[train]"', train
    assert f'".[{other},train]"' in refusal("-m", f"{other}_impl.predict")
    assert f'".[{other},train,report]"' in refusal("-m", "compare")
    try:
        import_module(f"{other}_impl").GRU()
    except ModuleNotFoundError as error:
        assert f'pip install -e ".[{other}]"' in str(error), error
    else:
        raise AssertionError(f"{other}_impl.GRU can be imported")
    print(f"{framework} alone: the losses of three steps are {losses}")


if __name__ == "__main__":
    main()
