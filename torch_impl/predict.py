"""Classify texts with a trained model of either framework. Its twin is jax_impl/predict.py.

python -m torch_impl.predict RUN_DIR "a wonderful film, beautifully acted" "what a waste of time"
python -m torch_impl.predict RUN_DIR < one_text_a_line.txt
"""

if __name__ == "__main__":
    from common.program import start

    start("torch", "train")

from pathlib import Path

from common.inference import model, prediction
from common.inference.model import Model, Saved
from common.training.options import Device
from torch_impl import predictor


def load(run_dir: Path | str, device: Device = "auto", checkpoint: Saved | None = None) -> Model:
    """Read a trained model, of either framework, to compute it in PyTorch.

    run_dir: its run directory.
    device: auto, cpu, cuda or mps.
    checkpoint: by default, the run has to be finished. "last" takes the parameters of its last
        checkpoint, finished or not; "best" the best ones, by the validation reviews, that this
        checkpoint knows.

    Raises InputError (a ValueError) with one line if the run is missing, damaged or inconsistent,
    if the device is not available, and if the data of the checkpoint have changed.
    """
    return model.load(predictor, run_dir, device, checkpoint)


if __name__ == "__main__":
    prediction.main(predictor)
