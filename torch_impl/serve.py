"""Answer over HTTP with trained models of either framework. Its twin is jax_impl/serve.py.

python -m torch_impl.serve RUN_DIR
python -m torch_impl.serve RUN_DIR RUN_DIR --port 8080
"""

from common.program import start

if __name__ == "__main__":
    start("torch", "train", "serve")

    from common.serve import server
    from torch_impl import predictor

    server.main(predictor)
