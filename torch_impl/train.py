"""Train a classifier in PyTorch. Its twin is jax_impl/train.py.

python -m torch_impl.train --model bigru --preset quick
python -m torch_impl.train --help
"""

from common import training
from torch_impl import learner

if __name__ == "__main__":
    training.main(learner)
