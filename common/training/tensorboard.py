"""Scalars for TensorBoard, in its own file format: tensorboard --logdir RUN_DIR."""

from collections.abc import Mapping
from pathlib import Path


class Scalars:
    """An event file in a folder, through tensorboardX, which needs neither framework."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        """start: what an earlier event file in the folder says of this step or later is void.

        Raises ImportError where tensorboardX is missing (TrainConfig.check has seen to it).
        """
        from tensorboardX import SummaryWriter  # an extra

        self._writer = SummaryWriter(str(folder), purge_step=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values after so many steps, so that they show at once."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Wait until everything is in the file, which a thread writes."""
        self._writer.close()
