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

    # As XLA does. Gradients that vanish over the steps become denormal numbers, with which an Intel
    # processor takes a hundred times as long.
    torch.set_flush_denormal(True)
    loop.main(learner)
