"""Train a classifier in JAX. Its twin is torch_impl/train.py.

python -m jax_impl.train --model bigru --preset quick
python -m jax_impl.train --help
"""

from common.program import start

if __name__ == "__main__":
    start("jax", "train")

    from common.training import loop
    from jax_impl import learner

    loop.main(learner)
