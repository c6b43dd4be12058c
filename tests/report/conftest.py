"""Invented results of a comparison that contain everything the report can show."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from msgspec.structs import asdict

from common.report.schema import Task
from comparison.speed import CALL, FULL, INFERENCE, SHORT

CATEGORIES = (("books", 0.02), ("<script>window.broken = 1</script>", -0.02))
RATIOS = {"torch fused": 2.86, "jax fused": 2.61, "nn.GRU padded": 1.0, "torch loop": 0.66}
PEERS = ("torch scan", "jax scan", "Keras on jax", "Keras on torch", "flax.nnx RNN")
PEERS += ("flax.linen RNN", "Equinox scan", "nn.GRU packed", "nn.GRU packed, denormals")
CALLED = {"torch_impl.GRU": 2.0, "ONNX Runtime": 1.6, "nn.GRU": 1.0, "Keras on torch": 0.1}


@pytest.fixture(scope="session")
def results() -> dict[str, Any]:
    """All sections of results.json; the reviews contain markup and scripts."""
    rng = np.random.default_rng(0)
    names = [(f, m) for m in ("gru", "bigru") for f in ("torch", "jax")]
    names += [("torch", "nn.gru"), ("torch", "nn.bigru")]
    return {
        "schema": 1,
        "environment": {
            "command": "python compare.py --preset full",
            "python": "3.11.7",
            "processor": "made up for the tests",
            "cores": 2,
        },
        "data": {
            "name": "imdb",
            "train": 4000,
            "test": 1000,
            "vectors": "word2vec",
            "vocabulary": 20_000,
            "classes": ["negative", "positive"],
        },
        "runs": [_run(rng, framework, model) for framework, model in names],
        "parity": [
            {
                "models": [model, "oracle"],
                "check": f"{quantity}, reset before",
                "dtype": dtype,
                "error": bound * share,
                "bound": bound,
                "ulp": 12 * share,
                "passed": True,
            }
            for model in ("torch fused", "jax fused")
            for dtype, bound in (("float64", 1e-12), ("float32", 1e-6))
            for quantity, share in (("outputs", 0.4), ("d params", 0.7))
        ],
        "speed": _speed(rng, RATIOS, SHORT[:3]),
        "questions": _questions(),
        "explorer": _explorer(rng),
        "tuning": _tuning(rng),
    }


@pytest.fixture(scope="session")
def large_results(results: dict[str, Any]) -> dict[str, Any]:
    """Larger results: eight classes, thirty categories, the full grid of the speed comparison."""
    rng = np.random.default_rng(0)
    classes = [f"{stars} stars, more or less" for stars in range(1, 9)]
    ratios = {**RATIOS, **{name: rng.uniform(0.3, 1.2) for name in PEERS}}
    large = copy.deepcopy({**results, "speed": _speed(rng, ratios, FULL)})
    large["data"]["classes"] = large["explorer"]["classes"] = classes
    for run in large["runs"]:
        run["confusion"] = (rng.integers(0, 25, (8, 8)) + 200 * np.eye(8, dtype=int)).tolist()
        run["categories"] |= {f"category {i}": run["categories"]["books"] for i in range(28)}
    for pair in large["questions"]["comparisons"]:
        pair["by_category"] += [{"category": f"category {i}", **_part(0.01)} for i in range(28)]
    for review in large["explorer"]["reviews"]:
        review["true"] = classes[-1] if review["true"] == "positive" else classes[0]
        for result in review["models"].values():
            result["predicted"] = classes[-1]
    return large


def _run(rng: np.random.Generator, framework: str, model: str) -> dict[str, Any]:
    x = np.linspace(0.02, 3, 150)
    true = rng.integers(380, 440, 2)
    accuracy = int(true.sum()) / 1000
    return {
        "framework": framework,
        "model": model,
        "implementation": "nn.GRU" if model.startswith("nn.") else "fused",
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.024, accuracy + 0.023],
        "confusion": [[int(true[0]), 500 - int(true[0])], [500 - int(true[1]), int(true[1])]],
        "roc_auc": 0.9,
        "losses": (0.25 + 0.45 * np.exp(-x) + 0.02 * rng.standard_normal(len(x))).tolist(),
        "loss_epochs": x.tolist(),
        "train_seconds": 12.3,
        "cores": 2,
        "tokens_per_second": 250_000.0,
        "first_step_seconds": 1.1,
        "peak_memory_bytes": 700 * 2**20,
        "parameters": 165_378,
        "compilations": 5,
        "categories": {
            name: {
                "accuracy": accuracy + delta,
                "accuracy_interval": [accuracy + delta - 0.05, accuracy + delta + 0.05],
                "support": 250,
            }
            for name, delta in CATEGORIES
        },
    }


def _speed(
    rng: np.random.Generator, ratios: dict[str, float], tasks: Iterable[Task]
) -> dict[str, Any]:
    rows = []
    for task in tasks:
        speed = 117_740 / (1 + task.bidirectional) * (3 - 2 * task.backward)
        for name, ratio in ratios.items():
            measured = ratio if ratio == 1 else ratio * rng.uniform(0.9, 1.1)
            rows.append(
                {
                    **asdict(task),
                    "contender": name,
                    "tokens_per_second": speed * measured,
                    "quartiles": [speed * measured * 0.96, speed * measured * 1.02],
                    "ratio": measured,
                    "peak_fraction": 0.26 * measured,
                }
            )
    recipe = [
        {"contender": name, "reviews_per_second": 20.0, "projected_seconds": 2845.4}
        for name in ratios
    ]
    lengths = [
        {"contender": name, "T": T, "nanoseconds_per_token": 900.0}
        for name in ("torch fused", "jax fused")
        for T in (50, 2000)
    ]
    inference, calls = (
        [
            {
                **asdict(task),
                "contender": name,
                "p50": 2e-5 * task.B * task.T / ratio,
                "p99": 3e-5 * task.B * task.T / ratio,
                "tokens_per_second": 5e4 * ratio,
                "ratio": ratio,
            }
            for task in tasks
            for name, ratio in CALLED.items()
        ]
        for tasks in (INFERENCE, [CALL])
    )
    timed = {"rows": rows, "inference": inference, "calls": calls}
    return {"peak_flops": 1e11, **timed, "lengths": lengths, "recipe": recipe}


def _tuning(rng: np.random.Generator) -> dict[str, Any]:
    trials = []
    for number, state in enumerate(["complete", "complete", "pruned", "failed", "complete"] * 4):
        options = {"learning_rate": 10 ** rng.uniform(-4, -2), "hidden_size": 128}
        options |= {"batch_size": 32, "word_dropout": rng.uniform(0, 0.5)}
        count = {"complete": 3, "pruned": 1, "failed": 0}[state]
        losses = rng.uniform(0.3, 0.7, count).tolist()
        known = {"accuracy": 0.85} if losses else {"error": "the loss is nan <script>"}
        known["given"] = number == 0
        trial = {"number": number, "state": state, "options": options, "losses": losses, **known}
        trials.append({**trial, "seconds": 12.3})
    return {"study": "torch gru", "command": "python -m torch_impl.train", "trials": trials}


def _questions() -> dict[str, Any]:
    distances = list(range(0, 200, 10))
    rates = {"tanh RNN, untrained": 0.12, "GRU, untrained": 0.03, "GRU, trained": 0.01}
    return {
        "vanishing": {
            "reviews": 200,
            "distances": distances,
            "series": [
                {
                    "name": name,
                    "median": [float(np.exp(-rate * d)) for d in distances],
                    "low": [float(np.exp(-rate * d) / 3) for d in distances],
                    "high": [float(np.exp(-rate * d) * 3) for d in distances],
                }
                for name, rate in rates.items()
            ],
            "conclusion": "Made up: gating keeps the gradient alive.",
        },
        "gates": {
            "groups": [
                {
                    "group": group,
                    "n": 1234,
                    "z": z,
                    "z_interval": [z - 0.01, z + 0.01],
                    "change": 2 * z,
                    "change_interval": [2 * z - 0.02, 2 * z + 0.02],
                }
                for group, z in (("stop words", 0.21), ("neutral", 0.24), ("sentiment words", 0.31))
            ],
            "effects": [
                {
                    "pair": ["sentiment words", "stop words"],
                    "quantity": "z",
                    "cohens_d": 0.8,
                    "interval": [0.7, 0.9],
                    "by_seed": [0.7, 0.75, 0.8, 0.85, 0.9],
                }
            ],
            "conclusion": "Made up: stop words change the state less.",
        },
        "comparisons": [
            {
                "title": title,
                "a": a,
                "b": b,
                "seeds": 5,
                "accuracy_a": 0.82,
                "accuracy_b": 0.82 + gain,
                "difference": gain,
                "interval": [gain - 0.02, gain + 0.02],
                "difference_by_seed": [gain + 0.01 * seed for seed in (-2, -1, 0, 1, 2)],
                "mcnemar_p": 0.31,
                "by_length": [
                    {"from": start, "to": start + 100, **_part(gain - start / 20_000)}
                    for start in (0, 100, 200)
                ],
                "by_category": [
                    {"category": category, **_part(gain + delta)} for category, delta in CATEGORIES
                ],
                "seconds_a": 12.3,
                "seconds_b": 21.5,
                "conclusion": f"Made up: what {b} is against {a}.",
            }
            for title, a, b, gain in (
                ("Gates or none", "torch rnn", "torch gru", 0.07),
                ("Bidirectional or not", "torch gru", "torch bigru", 0.005),
                ("Bidirectional or not, built-in", "torch nn.gru", "torch nn.bigru", 0.0),
                ("Bidirectional or not, in JAX", "jax gru", "jax bigru", -0.005),
                ("Handwritten or built-in", "torch gru", "torch nn.gru", 0.01),
                ("Handwritten or built-in, bidirectional", "torch bigru", "torch nn.bigru", 0.0),
                ("PyTorch or JAX", "torch gru", "jax gru", -0.01),
            )
        ],
        "commands": ["python compare.py questions"],
    }


def _part(difference: float) -> dict[str, Any]:
    return {"n": 250, "difference": difference, "interval": [difference - 0.03, difference + 0.03]}


def _explorer(rng: np.random.Generator) -> dict[str, Any]:
    film = "it starts slowly but the cast is wonderful and the ending is not to be missed"
    ends = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
    broken = ["<script>window.broken = 1</script>", ends, "line\u2028separator", "a" * 300]
    hebrew = ["\u202eoverride", "סרט", "נפלא", "\u2066isolate", "fine"]
    reviews = []
    for text, true in (
        (film.split(), "positive"),
        (broken + film.split(), "negative"),
        (hebrew, "positive"),
        ([f"word{i}" for i in range(10_000)], "negative"),
    ):
        models = {}
        for model in ("torch gru", "jax bigru"):
            probability = float(rng.uniform(0.55, 0.95))
            models[model] = {
                "predicted": "positive",
                "probability": probability,
                **_gates_of(rng, len(text), bidirectional=model.endswith("bigru")),
                "gradient": (0.1 * rng.standard_normal(len(text))).tolist(),
                "leave_out": (0.1 * rng.standard_normal(len(text))).tolist(),
                "running": np.linspace(0.5, probability, len(text)).tolist(),
            }
        reviews.append({"text": " ".join(text), "true": true, "words": text, "models": models})
    return {"classes": ["negative", "positive"], "reviews": reviews}


def _gates_of(rng: np.random.Generator, words: int, *, bidirectional: bool) -> dict[str, Any]:
    def one() -> dict[str, list[float]]:
        high = {"z": 0.6, "r": 1.0, "change": 2.0}
        return {name: rng.uniform(0, top, words).tolist() for name, top in high.items()}

    if not bidirectional:
        return dict(one())
    forward, backward = one(), one()
    return {name: {"forward": forward[name], "backward": backward[name]} for name in forward}
