"""The one training loop of both twins: options, the loop, checkpoints and run directories."""
