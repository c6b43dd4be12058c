"""What the two twins share: data, word vectors, batches, parameters, training loop, metrics.

Nothing in here imports torch or jax.
"""
