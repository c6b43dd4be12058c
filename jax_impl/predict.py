"""Classify texts with a trained model of either framework. Its twin is torch_impl/predict.py.

python -m jax_impl.predict RUN_DIR "a wonderful film, beautifully acted" "what a waste of time"
python -m jax_impl.predict RUN_DIR < one_text_a_line.txt
"""

from common.inference import prediction
from jax_impl import learner

if __name__ == "__main__":
    prediction.main(learner)
