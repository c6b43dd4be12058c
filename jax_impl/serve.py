"""Answer over HTTP with trained models of either framework. Its twin is torch_impl/serve.py.

python -m jax_impl.serve RUN_DIR
python -m jax_impl.serve RUN_DIR RUN_DIR --port 8080
"""

from common.serve import server
from jax_impl import predictor

if __name__ == "__main__":
    server.main(predictor)
