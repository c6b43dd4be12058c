"""A trained model and what it is asked: what `load` of both twins returns."""

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

ROWS = (1, 8, 32)  # texts that are read together
LEAST = 32  # of padded lengths and numbers of distinct words: each next one is twice, or four times

Saved = Literal["last", "best"]
Ids = Int32[np.ndarray, " words"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer to a text."""

    label: str
    """The most probable class."""
    probabilities: dict[str, float]
    """Of every class, in the order of `classes`."""
    known_words: int
    """Words of the text that the model has a vector for (of a linear model: has seen). Where there
    are none, this is the answer to an empty text."""

    @property
    def probability(self) -> float:
        """That of the label."""
        return self.probabilities[self.label]


class Model:
    """A trained model, ready to answer. Threads may share it: to ask changes nothing.

    Texts are read as training read them: markup is removed, words without a vector are left out,
    and of the others the last max_length are read. Lengths and numbers of texts are padded to a
    few, so that JAX compiles once for each of these.
    """

    classes: tuple[str, ...]
    """Their names, in the order of logits and probabilities."""

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
        self.limit = run.options.max_length or sys.maxsize  # words that are read of a text
        self._ids = {word: number for number, word in enumerate(run.vocabulary)}

    def __repr__(self) -> str:
        run = self.run
        return (
            f"Model({run.framework} {run.options.model}, hidden_size={run.model.hidden_size}, "
            f"num_layers={run.model.num_layers}, classes={self.classes}, out={run.options.out})"
        )

    def predict(self, texts: Iterable[str]) -> list[Prediction]:
        """The answer to each text. Raises TypeError for one str, and for what holds no str."""
        known = self.encode(texts)
        return answers(self.classes, self._logits(known), map(len, known))

    def logits(self, texts: Iterable[str]) -> Float[np.ndarray, "N C"]:
        """The logits of each text's classes. Raises TypeError as predict does."""
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

        words        those that the model reads: the last max_length of the known ones
        all_words    all words of the text; places: where in these each of `words` stands
        predicted    the class, probability that class's probability
        z, r         of a GRU: the mean over the units of update and reset gate at each word; of
                     another cell, the same of the gates that it declares
        change       the norm of the difference that the word makes to the state
        gradient     gradient x input of the predicted class's logit
        leave_out    how much that logit falls when the word is left out
        running      the probability of the second class (of more than two classes: of the
                     predicted one), had the text ended with this word
        units        if asked for: each unit's state, and its gates, a list at each word

        z, r, change and units are of the last layer; with two directions they are dicts, forward
        and backward. All others are lists with an entry a word, so empty where no word is known.

        track: given what is read in turn, and how often, to pass on, as rich.progress.track does.
        """
        all_words = words_of(*texts_of([text]))
        places = [place for place, word in enumerate(all_words) if word in self._ids]
        places = places[-self.limit :]
        ids = np.array([self._ids[all_words[place]] for place in places], np.int32)
        n = len(ids)
        without = (np.delete(ids, i) for i in range(n))
        up_to = (ids[: i + 1] for i in range(n))
        asked, rows = chain([ids], without, up_to), ROWS[-1]
        chunks = iter(lambda: [*islice(asked, rows)], [])  # never all of them in memory
        # One shape fits all that is asked, so that JAX compiles once.
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
        """What `explain` returns of the states, the gates and the gradient of a class's logit."""
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
        """The logits, computed in batches of so many rows; by default, as few as suit the texts."""
        if not texts:
            return np.zeros((0, len(self.classes)), np.float32)
        rows = rows or next(size for size in ROWS if size >= min(len(texts), ROWS[-1]))
        texts = [ids[-self.limit :] for ids in texts]
        shapes = shapes or self._shapes(rows, max(map(len, texts)))
        order = np.argsort([-len(ids) for ids in texts], kind="stable")  # alike in length
        found = []
        for start in range(0, len(texts), rows):
            some = [texts[number] for number in order[start : start + rows]]
            padding = [np.zeros(0, np.int32)] * (rows - len(some))
            inputs = self._inputs([*some, *padding], shapes)
            found.append(self.predictor.logits(inputs)[: len(some)])
        return finite("logits", np.concatenate(found)[np.argsort(order)])

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
        """Padded sizes of batches of so many texts, the last of which fits `longest` words."""
        found, steps, limit = [], LEAST, self.limit
        while True:
            distinct, most = LEAST, min(steps, limit) * rows
            while distinct < most:
                found.append(Shape(min(steps, limit), distinct))
                distinct *= 4
            found.append(Shape(min(steps, limit), most))
            if steps >= min(longest, limit):
                return found
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
    """A run as its last checkpoint has it. Words and vectors are those of its data set, read anew.

    Raises InputError where there is none, and where the data are no longer the same.
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
    """What logits say, of texts of which so many words are known. Raises InputError for logits that
    are not finite."""
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
    """The texts. Raises TypeError for one str, which is no list of them, and for what is no str."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        found = "one str" if isinstance(texts, str) else type(texts).__name__
        raise TypeError(f"texts: expected a list of str, found {found}")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}]: expected a str, found {type(text).__name__}")
    return texts


def words_of(text: str) -> list[str]:
    """A text's words."""
    return tokenize(clean(text))


def _by_direction(layer: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is [R, ...]: of one direction that, of two a dict of them."""
    return {
        name: values[0].tolist()
        if len(values) == 1
        else dict(zip(DIRECTIONS, values.tolist(), strict=True))
        for name, values in layer.items()
    }
