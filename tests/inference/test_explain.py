"""The trace of a trained model, and its explanation, in both frameworks."""

import io
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from msgspec import to_builtins
from rich.console import Console

import torch_impl.learner
from common import files, oracle, params
from common.data.batches import Batch, Batches
from common.data.corpus import EncodedSplit, join
from common.inference import explanation, prediction
from common.inference.model import Model
from common.params import ModelConfig
from common.report.schema import Run, convert
from common.training import run_directory
from common.training.options import TrainConfig
from comparison import explorer
from comparison.parity import BOUND_GRADIENT, BOUND_RESULT
from tests.training.cases import FRAMEWORKS, Command, main_of, refused, refused_at_once, succeeds

GRU = ModelConfig(input_size=5, hidden_size=7, classes=3)
CONFIGS = {
    "gru": GRU,
    "reset after": replace(GRU, reset_after=True),
    "bigru": replace(GRU, bidirectional=True),
    "two layers, both ways": replace(GRU, bidirectional=True, num_layers=2, reset_after=True),
}
RNNS = {
    "rnn": replace(GRU, cell="rnn"),
    "rnn of two layers": replace(GRU, cell="rnn", num_layers=2),
}
# JAX explains only the largest model; the frameworks agree in all of them.
each_kind = pytest.mark.parametrize(
    ("framework", "kind"),
    [*itertools.product(["torch"], CONFIGS), ("jax", "two layers, both ways")],
)


def draw(config: ModelConfig) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random parameters and vectors that are not close to zero."""
    rng = np.random.default_rng(0)
    parameters = {name: rng.uniform(-1, 1, shape) for name, shape in params.shapes(config).items()}
    return parameters, rng.standard_normal((500, config.input_size))


def batch_of(texts: EncodedSplit) -> Batch:
    """A few texts, one of them without a word, one row without a review; three classes."""
    chosen = join([texts[i][:12] for i in range(4)] + [texts[4][:0]], np.array([2, 0, 1, 1, 2]))
    return Batches(chosen, 6).batch(np.array([0, 1, 2, 3, 4, -1]))


def learner_of(framework: ModuleType, config: ModelConfig):  # type: ignore[no-untyped-def]
    parameters, vectors = draw(config)
    options = TrainConfig(device="cpu")
    return framework.Learner(config, options, vectors, parameters, dtype="float64")


def close(actual: np.ndarray, expected: np.ndarray, bound: float) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


@each_kind
def test_the_trace_is_the_oracles(framework: str, kind: str, texts: EncodedSplit) -> None:
    """All gates, candidates, states and both gradients of every word agree in float64."""
    config, batch = CONFIGS[kind], batch_of(texts)
    parameters, vectors = draw(config)
    with jax.enable_x64(True):
        learner = learner_of(FRAMEWORKS[framework], config)
        result = learner.explain(batch, batch.labels)
        close(result["logits"], learner.logits(batch), BOUND_RESULT)

    x = vectors[batch.distinct][batch.tokens]
    run = oracle.forward(parameters, x, batch.lengths, reset_after=config.reset_after)
    close(result["logits"], oracle.classify(run, batch.labels).logits, BOUND_RESULT)
    for i, direction in enumerate(run.layers[-1]):
        for name in "zrn":
            close(
                np.where(run.live, result[name][i], 0),
                np.where(run.live, direction.between[name], 0),
                BOUND_RESULT,
            )
        outputs = run.outputs[..., i * config.hidden_size : (i + 1) * config.hidden_size]
        close(np.where(run.live, result["states"][i], 0), outputs, BOUND_RESULT)

    # gradient x input: the oracle receives the gradient of the logit.
    head = parameters["head.weight"]
    features = np.concatenate(list(run.h_last[-config.directions :]), axis=-1)
    d_features = np.where((features > 0) & (batch.labels >= 0)[:, None], head[batch.labels], 0)
    d_h_last = np.zeros_like(run.h_last)
    d_h_last[-config.directions :] = np.split(d_features, config.directions, axis=-1)
    d_x = oracle.backward(run, np.zeros_like(run.outputs), d_h_last)["x"]
    close(result["influence"], (d_x * run.layers[0][0].x).sum(axis=-1), BOUND_GRADIENT)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_d_states_is_the_gradient_through_the_rest_of_the_review(
    framework: str, texts: EncodedSplit
) -> None:
    """dLoss/dh_t is the oracle's gradient with respect to h0, started from h_t after word t."""
    batch = batch_of(texts)
    parameters, vectors = draw(GRU)
    with jax.enable_x64(True):
        result = learner_of(FRAMEWORKS[framework], GRU).explain(batch, batch.labels)
    x = vectors[batch.distinct][batch.tokens]
    expected = np.zeros_like(result["d_states"][0])
    for row, t in itertools.product(range(len(batch.lengths)), range(len(x))):
        if t < batch.lengths[row]:
            one, left = slice(row, row + 1), np.array([batch.lengths[row] - t - 1])
            h0 = result["states"][:, t, one]
            rest = oracle.forward(parameters, x[t + 1 :, one], left, h0, reset_after=False)
            d_h_last = oracle.classify(rest, batch.labels[one]).d_h_last
            gradients = oracle.backward(rest, np.zeros_like(rest.outputs), d_h_last)
            expected[t, row] = gradients["h0"][0, 0]
    close(result["d_states"][0], expected, BOUND_GRADIENT)


@pytest.mark.parametrize("kind", [*CONFIGS, *RNNS])
def test_the_twins_agree(kind: str, texts: EncodedSplit) -> None:
    config = {**CONFIGS, **RNNS}[kind]
    with jax.enable_x64(True):
        ours, theirs = (
            learner_of(framework, config).explain(batch_of(texts), batch_of(texts).labels)
            for framework in FRAMEWORKS.values()
        )
    gates = set() if config.cell == "rnn" else {"z", "r", "n"}
    assert ours.keys() == theirs.keys() == gates | {"states", "logits", "influence", "d_states"}
    for name in ours:
        close(ours[name], theirs[name], BOUND_GRADIENT)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_rnn_is_the_equation(framework: str, texts: EncodedSplit) -> None:
    """states and logits against NumPy, d_states against central differences of the loss."""
    config, batch = RNNS["rnn"], batch_of(texts)
    parameters, vectors = draw(config)
    W, U, b, c = (parameters[f"rnn.0.forward.{name}"] for name in params.GRU_PARAMETERS)
    x = vectors[batch.distinct][batch.tokens]

    def read(row: int, start: int = 0, h: np.ndarray | None = None) -> list[np.ndarray]:
        states = [np.zeros(config.hidden_size) if h is None else h]
        for t in range(start, batch.lengths[row]):
            states.append(np.tanh(W @ x[t, row] + b + U @ states[-1] + c))
        return states

    def loss(row: int, start: int, h: np.ndarray) -> float:
        features = np.maximum(read(row, start, h)[-1], 0)
        logits = parameters["head.weight"] @ features + parameters["head.bias"]
        return np.log(np.exp(logits).sum()) - logits[batch.labels[row]]

    with jax.enable_x64(True):
        learner = learner_of(FRAMEWORKS[framework], config)
        result = learner.explain(batch, batch.labels)
        close(result["logits"], learner.logits(batch), BOUND_RESULT)
    for row in range(4):
        states = read(row)[1:]
        close(result["states"][0, : len(states), row], np.array(states), BOUND_RESULT)
        for t, unit in ((0, 1), (len(states) - 2, 5)):
            nudge = 1e-5 * np.eye(config.hidden_size)[unit]
            above, below = (loss(row, t + 1, states[t] + sign * nudge) for sign in (1, -1))
            expected = (above - below) / 2e-5
            assert result["d_states"][0, t, row, unit] == pytest.approx(
                expected, rel=1e-6, abs=1e-9
            )


WORDS = ["good", "bad", "not", "a", "film"]


def run_of(config: ModelConfig, max_length: int | None = 20) -> run_directory.Run:
    """A run directory's model with random parameters and five words."""
    parameters, vectors = draw(config)
    words = WORDS + [f"w{number}" for number in range(len(vectors) - len(WORDS))]
    options = TrainConfig(max_length=max_length, out=Path("run"))
    classes = ("negative", "neutral", "positive")[: config.classes]
    return run_directory.Run(config, options, classes, "torch", words, vectors, parameters)


def logits_of(run: run_directory.Run, text: list[int]) -> np.ndarray:
    """The logits of the oracle."""
    x = run.vectors[text][:, None]
    result = oracle.forward(
        run.parameters, x, np.array([len(text)]), reset_after=run.model.reset_after
    )
    return oracle.classify(result, np.array([-1])).logits[0]


@each_kind
def test_explain_agrees_with_the_oracle(framework: str, kind: str) -> None:
    config = replace(CONFIGS[kind], classes=2)
    run = run_of(config, max_length=6)
    arguments = [np.array([3, 4, 2, 0, 3, 3, 1]), np.array([1]), np.zeros(0, np.int32)]
    texts = [" ".join(WORDS[token] for token in ids) for ids in arguments]
    with jax.enable_x64(True):
        model = Model(FRAMEWORKS[framework], run, "cpu", "float64")
        result = [model.explain(text, units=True) for text in texts]
    for ids, answer in zip(arguments, result, strict=True):
        text = list(ids[-6:])
        logits = logits_of(run, text)
        best = int(logits.argmax())
        assert answer["words"] == [WORDS[token] for token in text]
        assert answer["predicted"] == run.classes[best]
        softmax = np.exp(logits) / np.exp(logits).sum()
        assert answer["probability"] == pytest.approx(softmax[best], rel=1e-12)
        without = [logits_of(run, text[:i] + text[i + 1 :])[best] for i in range(len(text))]
        np.testing.assert_allclose(answer["leave_out"], logits[best] - without, atol=1e-11)
        up_to = [logits_of(run, text[: i + 1]) for i in range(len(text))]
        running = [1 / (1 + np.exp(negative - positive)) for negative, positive in up_to]
        np.testing.assert_allclose(answer["running"], running, rtol=1e-11)

        x = run.vectors[text][:, None]
        layer = oracle.forward(
            run.parameters, x, np.array([len(text)]), reset_after=config.reset_after
        ).layers[-1]
        for direction in layer:
            side = direction.name.rpartition(".")[2]

            def of(name: str, answer: dict = answer, side: str = side) -> list[float]:
                return answer[name][side] if config.bidirectional else answer[name]

            z, r, n, h = (direction.between[name][:, 0] for name in "zrnh")
            np.testing.assert_allclose(of("z"), z.mean(axis=1), rtol=1e-11)
            np.testing.assert_allclose(of("r"), r.mean(axis=1), rtol=1e-11)
            moved = np.linalg.norm(z * (n - h), axis=1)  # the contribution of a word to the state
            np.testing.assert_allclose(of("change"), moved, rtol=1e-10)
            for name, value in {"z": z, "r": r, "state": h + z * (n - h)}.items():
                units = np.reshape(of(name, answer["units"]), value.shape)
                np.testing.assert_allclose(units, value, rtol=1e-10)


def test_a_linear_model_is_explained_exactly() -> None:
    """With z = 1 and no recurrent weights, the logits depend only on the last word."""
    config = replace(GRU, classes=2)
    run = run_of(config)
    H = config.hidden_size
    p = {name: np.zeros_like(value) for name, value in run.parameters.items()}
    p["gru.0.forward.bias_ih"][:H] = 50  # z = 1
    p["gru.0.forward.weight_ih"][2 * H :] = 0.1
    p["head.weight"][:] = [[1.0], [-1.0]]
    run = replace(run, parameters=p)
    model = Model(torch_impl.learner, run, "cpu", "float64")
    result = model.explain(" ".join(WORDS[:3]))
    assert result["z"] == pytest.approx([1, 1, 1])
    assert np.all(np.array(result["gradient"])[:2] == 0)
    assert result["leave_out"][:2] == pytest.approx([0, 0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of PyTorch's own bidirectional layer."""
    from common.training import loop

    folder = tmp_path_factory.mktemp("run")
    sizes = {"train_size": 64, "test_size": 32, "max_length": 20, "hidden_size": 4, "epochs": 1}
    options = TrainConfig(data="rt", model="nn.bigru", out=folder, **sizes)
    loop.train(torch_impl.learner, options)
    return folder


def explain_main(framework: str) -> Callable[[], None]:
    return main_of(FRAMEWORKS[framework], explanation)


TEXT = "A <b>film</b> that is not as good, nor as bad, as xyzzy \u202e <script>alert(1)</script>"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_explain_prints_a_table_and_writes_json(
    framework: str, command: Command, trained: Path, tmp_path: Path
) -> None:
    file = tmp_path / "answer.json"
    arguments = [trained, TEXT, "--by", "leave_out", "--json", file]
    output = succeeds(command(explain_main(framework), *arguments))
    assert "\x1b" not in output, "no colour where it is not a terminal"
    answer = json.loads(file.read_text())
    assert answer["text"] == TEXT
    assert answer["classes"] == ["negative", "positive"]
    assert "film" in answer["words"] and "xyzzy" not in answer["words"]
    lines = [line.split() for line in output.splitlines()]
    assert ["xyzzy"] in lines, "a word without a vector has no numbers"
    assert [answer["all_words"][place] for place in answer["places"]] == answer["words"]
    assert " ".join(answer["all_words"]).startswith("a film that is not as good nor")
    for place, word in enumerate(answer["words"]):
        numbers = [answer["z"]["forward"][place], answer["leave_out"][place]]
        assert any(
            line[:1] == [word] and {f"{number:.3f}" for number in numbers} <= set(line)
            for line in lines
        )
    predicted = succeeds(command(main_of(FRAMEWORKS[framework], prediction), trained, TEXT))
    assert predicted.split("\t")[:2] == [answer["predicted"], f"{answer['probability']:.4f}"]


def test_both_twins_explain_a_trained_model_alike(
    command: Command, trained: Path, tmp_path: Path
) -> None:
    """In float32, each number of at most 1 results from some tens of roundings of 6e-8."""
    answers = []
    for framework in FRAMEWORKS:
        file = tmp_path / f"{framework}.json"
        assert command(explain_main(framework), trained, TEXT, "--json", file)[0] == 0
        answers.append(json.loads(file.read_text()))
    ours, theirs = answers
    assert ours.keys() == theirs.keys()
    for name in ("gradient", "leave_out", "running", "probability"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-6)
    for name, side in itertools.product(("z", "r", "change"), params.DIRECTIONS):
        np.testing.assert_allclose(ours[name][side], theirs[name][side], rtol=0, atol=2e-6)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_texts_of_unknown_words_and_of_ten_thousand(
    framework: str, command: Command, trained: Path
) -> None:
    status, output, _ = command(explain_main(framework), trained, "xyzzy plugh")
    assert status == 0
    assert "2 words, 2 of them without a vector" in output
    assert "no word to explain" in output
    assert "0 words" in command(explain_main(framework), trained, " ")[1]
    status, output, _ = command(explain_main(framework), trained, "good film " * 5_000)
    assert status == 0
    assert "10,000 words, 0 of them without a vector and so left out; read: the last 20" in output


def test_colour_shows_on_a_terminal(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch_impl.load(trained)
    screen = io.StringIO()
    terminal = partial(Console, file=screen, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr(explanation, "Console", lambda **options: terminal(width=100))
    result = model.explain("a good xyzzy film")
    explanation._print(model.classes, model.gates, result, "gradient", 3)
    assert screen.getvalue().count("\x1b[90mxyzzy") == 2, "grey, in the table and below it"
    tinted = re.findall(r"\x1b\[[\d;]*48;2;(\d+);(\d+);(\d+)m(\w+)", screen.getvalue())
    assert [word for *_, word in tinted][-3:] == ["a", "good", "film"]
    strongest = int(np.abs(result["gradient"]).argmax())
    colour = tuple(map(int, tinted[-3:][strongest][:3]))
    assert colour == (explanation.FOR if result["gradient"][strongest] > 0 else explanation.AGAINST)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere", "text"], "nowhere"),
        (["RUN", "text", "--by", "magic"], "--by"),
        (["RUN", "text", "--json", "/proc/nowhere/a.json"], "/proc/nowhere/a.json"),
        (["RUN"], "missing: TEXT"),
    ],
)
def test_bad_input_gets_one_clear_line(
    framework: str, arguments: list[str], named: str, command: Command, trained: Path
) -> None:
    arguments = [str(trained) if word == "RUN" else word for word in arguments]
    assert named in refused_at_once(command(explain_main(framework), *arguments))


def test_a_plain_rnn_has_no_gates_to_tint_by(
    command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rnn = run_of(replace(RNNS["rnn"], classes=2))
    model = Model(torch_impl.learner, rnn)
    monkeypatch.setattr(explanation, "load", lambda *_: model)
    assert model.explain("a good film", units=True)["units"].keys() == {"state"}
    assert "--by z" in refused(command(explain_main("torch"), "run", "a good film", "--by", "z"))
    output = succeeds(command(explain_main("torch"), "run", "a good film"))
    assert "tinted by change" in output
    assert "leave-one-out" in output and " r " not in output


def test_the_explorer_holds_right_and_wrong_reviews_of_every_model(trained: Path) -> None:
    """The explorer uses PyTorch; another test compares JAX with it."""
    options = run_directory.load_run(trained).options
    metrics = files.read_json(trained / "metrics.json")
    metrics |= {"model": "bigru", "run_dir": str(trained)}
    runs = [convert({**metrics, "framework": name}, Run, trained) for name in FRAMEWORKS]
    explored = explorer.explore(options, runs)
    assert explored == explorer.explore(options, runs), "the same reviews every time"
    result = to_builtins(explored)
    assert result["classes"] == ["negative", "positive"]
    assert len(result["reviews"]) == explorer.REVIEWS
    json.dumps(result)
    wrong = 0
    for review in result["reviews"]:
        ours = review["models"]["torch bigru"]
        assert review["models"]["jax bigru"] == ours
        assert set(review["words"]) <= set(review["text"].split())
        assert 0 < len(review["words"]) <= explorer.LONGEST
        for name in ("gradient", "leave_out", "running"):
            assert len(ours[name]) == len(review["words"])
        wrong += ours["predicted"] != review["true"]
    assert wrong == explorer.REVIEWS // 2


def test_the_explorer_chooses_half_of_them_wrong() -> None:
    rng = np.random.default_rng(0)
    correct, lengths = rng.random((3, 500)) < 0.9, rng.integers(0, 300, 500)
    short = explorer.candidates(lengths)
    chosen = short[explorer.choose(correct[:, short])]
    assert len(set(chosen)) == explorer.REVIEWS
    assert np.all((lengths[chosen] > 0) & (lengths[chosen] <= explorer.LONGEST))
    right = correct[:, chosen].all(axis=0)
    assert right.sum() == explorer.REVIEWS // 2
    assert len(explorer.choose(correct | True)) == explorer.REVIEWS, "none wrong"
    long = explorer.candidates(lengths + 1_000)
    assert lengths[long].max() <= np.sort(lengths)[2 * explorer.REVIEWS]
