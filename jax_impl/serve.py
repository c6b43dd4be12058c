"""Answer over HTTP with trained models of either framework. Its twin is torch_impl/serve.py.

python -m jax_impl.serve RUN_DIR
python -m jax_impl.serve RUN_DIR RUN_DIR --port 8080
"""

from common.program import start

if __name__ == "__main__":
    start("jax", "train", "serve")

    from common.serve import server
    from jax_impl import predictor

    server.main(predictor)
