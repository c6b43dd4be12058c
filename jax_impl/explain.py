"""Explain the answer of a model of either framework, word by word. Its twin is
torch_impl/explain.py.

python -m jax_impl.explain RUN_DIR "not a good film: the acting is terrible" --by leave_out
python -m jax_impl.explain RUN_DIR "not a good film: the acting is terrible" --json answer.json
"""

from common.program import start

if __name__ == "__main__":
    start("jax", "train")

    from common.inference import explanation
    from jax_impl import predictor

    explanation.main(predictor)
