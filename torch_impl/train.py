"""Train a classifier in PyTorch. Its twin is jax_impl/train.py.

python -m torch_impl.train --model bigru --preset quick
python -m torch_impl.train --help
"""

from common.program import start

if __name__ == "__main__":
    start("torch", "train")

    import torch

    from common.training import loop
    from torch_impl import learner

    # As XLA does. Vanishing gradients become denormal numbers, with which an Intel processor
    # computes a hundred times more slowly.
    torch.set_flush_denormal(True)
    loop.main(learner)
