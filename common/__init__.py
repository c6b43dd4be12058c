"""The code shared by the twins: data, word vectors, batches, parameters, training loop, metrics.

Nothing in this package imports torch or jax, except common/convert/files.py, which imports torch to
read and write .pt files.
"""

__version__ = "0.1.0"
