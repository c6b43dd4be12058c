"""A trained model, the result of `load` of both twins."""

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int32
from scipy.special import softmax

from common.data.batches import Inputs, Shape, pad
from common.data.text import clean, tokenize
from common.errors import InputError
from common.inference.predictor import Framework
from common.params import CELLS, DIRECTIONS
from common.training import checkpoint
from common.training.data import fingerprint_of, load_data
from common.training.options import Device
from common.training.run_directory import Run, load_run

ROWS = (1, 8, 32)  # texts that are encoded together
LEAST = 32  # factors between padded lengths, and between numbers of distinct words

Saved = Literal["last", "best"]
Ids = Int32[np.ndarray, " words"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer to a text."""

    label: str
    """The most probable class."""
    probabilities: dict[str, float]
    """The probability of every class, in the order of `classes`."""
    known_words: int
    """The number of words of the text with a vector (for a linear model: that occurred in
    training). If it is 0, this is the answer to an empty text."""

    @property
    def probability(self) -> float:
        """The probability of the label."""
        return self.probabilities[self.label]


class Model:
    """A trained model. Threads may share it, because its methods do not change it.

    Texts are read as in training: markup and words without a vector are removed, and the last
    max_length of the remaining words are read. Lengths and numbers of texts are padded to a few
    sizes, for each of which JAX compiles once.
    """

    classes: tuple[str, ...]
    """The names of the classes, in the order of logits and probabilities."""

    def __init__(
        self, framework: Framework, run: Run, device: Device = "auto", dtype: str = "float32"
    ) -> None:
        """A built-in layer is computed by the handwritten GRU, which both frameworks have."""
        self.run, self.classes = run, run.classes
        self.predictor = framework.Predictor(
            dataclasses.replace(run.model, builtin=False, implementation="auto"),
            {name: value.astype(dtype) for name, value in run.parameters.items()},
            run.vectors,
            device,
            dtype,
        )
        self.gates = CELLS[run.model.cell].gates
        self.limit = run.options.max_length or sys.maxsize  # words read of a text
        self._ids = {word: number for number, word in enumerate(run.vocabulary)}

    def __repr__(self) -> str:
        run = self.run
        return (
            f"Model({run.framework} {run.options.model}, hidden_size={run.model.hidden_size}, "
            f"num_layers={run.model.num_layers}, classes={self.classes}, out={run.options.out})"
        )

    def predict(self, texts: Iterable[str]) -> list[Prediction]:
        """The answer to each text. Raises TypeError for a single str and for elements other than
        str."""
        known = self.encode(texts)
        return answers(self.classes, self._logits(known), map(len, known))

    def logits(self, texts: Iterable[str]) -> Float[np.ndarray, "N C"]:
        """The logits of each text. Raises TypeError as predict does."""
        return self._logits(self.encode(texts))

    def encode(self, texts: Iterable[str]) -> list[Ids]:
        """The ids, in run.vocabulary, of each text's words that have a vector."""
        ids = self._ids
        return [
            np.array([ids[word] for word in words if word in ids], np.int32)
            for words in map(words_of, texts_of(texts))
        ]

    def explain(
        self,
        text: str,
        *,
        units: bool = False,
        track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda chunks, count: chunks,
    ) -> dict[str, Any]:
        """Explain the answer to a text, word by word, ready for JSON:

        words        the words that the model reads: the last max_length of the known ones
        all_words    all words of the text; places: the index in these of each of `words`
        predicted    the predicted class; probability: its probability
        z, r         for a GRU: the means over the units of update and reset gate at each word; for
                     another cell, the means of the gates that it declares
        change       the norm of the change of the state at each word
        gradient     gradient times input of the predicted class's logit
        leave_out    the decrease of that logit without the word
        running      the probability of the second class (with more than two classes: of the
                     predicted one) if the text ended with this word
        units        if requested: the state and the gates of each unit, a list for each word

        z, r, change and units belong to the last layer; with two directions they are dicts with
        the keys forward and backward. All others are lists with one entry per word.

        track: called with the iterable of batches and their number, as rich.progress.track is.
        """
        all_words = words_of(*texts_of([text]))
        places = [place for place, word in enumerate(all_words) if word in self._ids]
        places = places[-self.limit :]
        ids = np.array([self._ids[all_words[place]] for place in places], np.int32)
        n = len(ids)
        without = (np.delete(ids, i) for i in range(n))
        up_to = (ids[: i + 1] for i in range(n))
        all_texts, rows = chain([ids], without, up_to), ROWS[-1]
        # An iterator, so that the texts are never all in memory.
        chunks = iter(lambda: [*islice(all_texts, rows)], [])
        # One shape fits all of these texts, so that JAX compiles once.
        shape = self._shapes(1, n)[-1:]
        read = partial(self._logits, rows=rows, shapes=shape)
        logits = np.concatenate([*map(read, track(chunks, math.ceil((2 * n + 1) / rows)))])
        probabilities = softmax(logits.astype(np.float64), axis=1)
        best = int(logits[0].argmax())
        running = 1 if len(self.classes) == 2 else best

        return {
            "words": [all_words[place] for place in places],
            "all_words": all_words,
            "places": places,
            "predicted": self.classes[best],
            "probability": float(probabilities[0, best]),
            **self._trace(ids, shape, best, units),
            "leave_out": (logits[0, best] - logits[1 : n + 1, best]).tolist(),
            "running": probabilities[n + 1 :, running].tolist(),
        }

    def _trace(self, ids: Ids, shape: Sequence[Shape], best: int, units: bool) -> dict[str, Any]:
        """The values of `explain` that concern states, gates and the gradient of a class's
        logit."""
        n = len(ids)
        trace = self.predictor.explain(self._inputs([ids], shape), np.array([best]))
        gradient = finite("gradients", trace["influence"][:n, 0])
        gates = {name: trace[name][:, :n, 0] for name in self.gates}
        states = trace["states"][:, :n, 0]
        start = states.dtype.type(0)
        moves = [np.diff(states[0], axis=0, prepend=start)]
        moves += [np.diff(backward, axis=0, append=start) for backward in states[1:]]
        means = {name: gate.mean(axis=-1) for name, gate in gates.items()}
        return {
            **_by_direction({**means, "change": np.linalg.norm(moves, axis=-1)}),
            "gradient": gradient.tolist(),
            **({"units": _by_direction({**gates, "state": states})} if units else {}),
        }

    def _logits(
        self, texts: Sequence[Ids], rows: int = 0, shapes: Sequence[Shape] = ()
    ) -> Float[np.ndarray, "N C"]:
        """The logits, computed in batches of this many rows, by default of as few as fit the
        texts."""
        if not texts:
            return np.zeros((0, len(self.classes)), np.float32)
        rows = rows or next(size for size in ROWS if size >= min(len(texts), ROWS[-1]))
        texts = [ids[-self.limit :] for ids in texts]
        shapes = shapes or self._shapes(rows, max(map(len, texts)))
        order = np.argsort([-len(ids) for ids in texts], kind="stable")  # batches of similar length
        logits = []
        for start in range(0, len(texts), rows):
            batch = [texts[number] for number in order[start : start + rows]]
            padding = [np.zeros(0, np.int32)] * (rows - len(batch))
            inputs = self._inputs([*batch, *padding], shapes)
            logits.append(self.predictor.logits(inputs)[: len(batch)])
        return finite("logits", np.concatenate(logits)[np.argsort(order)])

    def _inputs(self, texts: Sequence[Ids], shapes: Sequence[Shape]) -> Inputs:
        distinct, tokens, lengths = pad(texts, shapes, np.zeros(len(self._ids), np.int32))
        ratios = None
        if self.run.ratios:
            ends = self.run.ratios.read(texts)
            ratios = np.zeros((*tokens.shape, ends.shape[1]), np.float32)
            at_words = np.arange(len(tokens)) < lengths[:, None]
            ratios.swapaxes(0, 1)[at_words] = ends
        return Inputs(distinct, tokens, lengths, ratios=ratios)

    def _shapes(self, rows: int, longest: int) -> list[Shape]:
        """Padded sizes of batches of this many texts; the last one fits `longest` words."""
        shapes, steps, limit = [], LEAST, self.limit
        while True:
            distinct, most = LEAST, min(steps, limit) * rows
            while distinct < most:
                shapes.append(Shape(min(steps, limit), distinct))
                distinct *= 4
            shapes.append(Shape(min(steps, limit), most))
            if steps >= min(longest, limit):
                return shapes
            steps *= 2


def load(
    framework: Framework,
    run_dir: Path | str,
    device: Device = "auto",
    checkpoint: Saved | None = None,
) -> Model:
    """Read a run directory: see `load` in the twins' predict.py."""
    folder = Path(run_dir)
    if checkpoint not in (None, *get_args(Saved)):
        raise InputError(f"checkpoint {checkpoint!r}: expected last or best")
    run = read_checkpoint(folder, checkpoint) if checkpoint else load_run(folder)
    return Model(framework, run, device)


def read_checkpoint(folder: Path, which: Saved) -> Run:
    """A run in the state of its last checkpoint; words and vectors are read from its data set.

    Raises InputError if there is no checkpoint and if the data have changed.
    """
    saved = checkpoint.newest(folder, warn=warnings.warn)
    if saved is None:
        problem = "has no checkpoint" if folder.is_dir() else "no such run directory"
        raise InputError(f"{folder}: {problem}")
    options, parameters = saved.about.options, saved.parameters
    if which == "best":
        if not (parameters := saved.best):
            raise InputError(
                f"{saved.path}: knows no best parameters: they need validation reviews"
            )
    elif "ema" in saved.removed_options:  # such a run was tested with the average
        state = saved.optimizer_state
        parameters = {name: state[f"average.{name}"] for name in parameters}
    data = load_data(options, report=lambda line: None)
    if saved.state.data != fingerprint_of(options, data):
        raise InputError(f"{saved.path}: the data or the word vectors have changed since")
    vectors = data.vectors
    return Run(
        **vars(saved.about),
        vocabulary=vectors.words,
        vectors=vectors.matrix,
        parameters=parameters,
        ratios=data.ratios,
    )


def answers(
    classes: Sequence[str], logits: Float[np.ndarray, "N C"], known: Iterable[int]
) -> list[Prediction]:
    """The predictions from logits, for texts with these numbers of known words. Raises InputError
    for logits that are not finite."""
    probabilities = softmax(finite("logits", logits).astype(np.float64), axis=1)
    return [
        Prediction(classes[best], dict(zip(classes, row, strict=True)), words)
        for best, row, words in zip(
            probabilities.argmax(axis=1).tolist(), probabilities.tolist(), known, strict=True
        )
    ]


def finite(name: str, values: np.ndarray) -> np.ndarray:
    """The values. Raises InputError unless all are finite: large parameters may overflow."""
    if not np.isfinite(values).all():
        raise InputError(f"{name}: not all finite numbers; the model's parameters are too large")
    return values


def texts_of(texts: Iterable[str]) -> list[str]:
    """The texts as a list. Raises TypeError for a single str and for elements other than str."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        kind = "one str" if isinstance(texts, str) else type(texts).__name__
        raise TypeError(f"texts: expected a list of str, found {kind}")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}]: expected a str, found {type(text).__name__}")
    return texts


def words_of(text: str) -> list[str]:
    """A text's words."""
    return tokenize(clean(text))


def _by_direction(layer: dict[str, np.ndarray]) -> dict[str, Any]:
    """An array [R, ...] as a list for one direction, as a dict of lists for two."""
    return {
        name: values[0].tolist()
        if len(values) == 1
        else dict(zip(DIRECTIONS, values.tolist(), strict=True))
        for name, values in layer.items()
    }
