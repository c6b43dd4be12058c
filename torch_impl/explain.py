"""Explain the answer of a model of either framework, word by word. Its twin is jax_impl/explain.py.

python -m torch_impl.explain RUN_DIR "not a good film: the acting is terrible" --by leave_out
python -m torch_impl.explain RUN_DIR "not a good film: the acting is terrible" --json answer.json
"""

from common.program import start

if __name__ == "__main__":
    start("torch", "train")

    from common.inference import explanation
    from torch_impl import predictor

    explanation.main(predictor)
