"""The server as a separate program, in both frameworks."""

import asyncio
import http.client
import json
import random
import re
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import torch_impl
import torch_impl.learner
from common.linear import run as linear
from common.serve import server
from tests.inference.client import HOSTS, STOPPED, Client
from tests.training.cases import Command, refused_at_once

TEXTS = ["a moving and wonderful film", "", "xyzzy", "film " * 60]


each_twin = pytest.mark.parametrize("client", HOSTS, indirect=True)


@each_twin
def test_server_answers_as_the_model(client: Client, served: dict[str, Path]) -> None:
    assert client.said == f"serving gru, rnn, linear on http://{client.host}:{client.port}\n"
    for name, folder in served.items():
        model = torch_impl.load(folder)
        status, result = client.ask("/predict", {"texts": TEXTS, "run": name})
        assert (status, result["run"]) == (200, name)
        for answer, expected in zip(result["predictions"], model.predict(TEXTS), strict=True):
            assert answer["label"] == expected.label
            assert answer["known_words"] == expected.known_words
            assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
        question = {"texts": TEXTS[:3], "run": name, "units": True}
        status, result = client.ask("/explain", question)
        assert status == 200
        for text, answer in zip(TEXTS, result["explanations"], strict=False):
            expected = model.explain(text, units=True)
            assert answer.keys() == expected.keys()
            assert [answer["all_words"][place] for place in answer["places"]] == answer["words"]
            assert answer["words"] == expected["words"]
            assert answer["change"] == pytest.approx(expected["change"], abs=1e-5)
            assert len(answer["units"]["state"]) == len(answer["words"])
    assert client.ask("/predict", {"texts": []}) == (200, {"run": "gru", "predictions": []})


def test_a_linear_run_is_served(client: Client, linear_run: Path) -> None:
    run, question = linear.load(linear_run), {"texts": TEXTS, "run": "linear"}
    status, result = client.ask("/predict", question)
    expected = [vars(answer) for answer in run.predict(TEXTS)]
    assert (status, result["predictions"]) == (200, expected)
    assert result["predictions"][2]["known_words"] == 0
    status, result = client.ask("/explain", question)
    assert (status, result["explanations"]) == (200, [*map(run.explain, TEXTS)])
    status, result = client.ask("/explain", question | {"units": True})
    assert status == 422
    assert result["error"] == "POST /explain: units: the run linear is linear and has none"


def test_served_files(client: Client) -> None:
    status, result = client.ask("/runs")
    assert status == 200
    gru, rnn, linear = result["runs"]
    assert (gru["name"], gru["model"], gru["hidden_size"], rnn["model"]) == ("gru", "gru", 4, "rnn")
    assert gru["classes"] == ["negative", "positive"]
    assert gru["example"].startswith("a beguiling evocation of the quality that keeps dickens")
    assert gru["example"] == rnn["example"]
    about = {"name": "linear", "framework": "sklearn", "model": "linear"}
    assert linear == about | {"classes": gru["classes"], "example": gru["example"]}
    assert client.ask("/healthz") == (200, {"status": "ok"})
    status, page = client.ask("/")
    assert status == 200 and page.startswith("<!doctype html>")


def test_metrics_of_the_server(client: Client) -> None:
    def count() -> float:
        metrics = client.ask("/metrics")[1]
        result = re.search(r'^gru_twins_texts_total{path="/predict"} (\S+)$', metrics, re.M)
        return float(result[1]) if result else 0

    before = count()
    client.ask("/predict", {"texts": TEXTS})
    assert count() == before + len(TEXTS)
    assert 'gru_twins_requests_total{path="/predict",status="200"}' in client.ask("/metrics")[1]


def test_the_interface_describes_itself(client: Client) -> None:
    status, result = client.ask("/openapi.json")
    assert status == 200
    assert {"/predict", "/explain", "/runs", "/healthz", "/metrics"} <= result["paths"].keys()
    question = result["components"]["schemas"]["Question"]
    assert question["required"] == ["texts"]
    assert question["properties"]["texts"] == {"type": "array", "items": {"type": "string"}}
    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(result))
    assert {*references} == result["components"]["schemas"].keys()


REFUSED = {
    "no JSON": ("/predict", b"texts", 422, "not what is expected"),
    "no texts": ("/predict", {}, 422, "texts"),
    "a number": ("/predict", {"texts": [1]}, 422, "$.texts[0]"),
    "a text": ("/predict", {"texts": "film"}, 422, "$.texts"),
    "misspelt": ("/predict", {"texts": [], "runs": "gru"}, 422, "runs"),
    "no run": ("/predict", {"texts": [], "run": "lstm"}, 404, "there are gru, rnn"),
    "texts": ("/predict", {"texts": ["a"] * 257}, 413, "257 texts, more than --max-texts 256"),
    "characters": ("/explain", {"texts": ["a" * 20_001]}, 413, "--max-characters 20,000"),
    "bytes": ("/predict", {"texts": ["a" * 10_000] * 6}, 413, "--max-bytes 50,000"),
    "words": ("/explain", {"texts": ["film " * 60] * 9}, 413, "540 words to explain, more than"),
    "a place": ("/classify", {"texts": []}, 404, "POST /classify: Not Found"),
    "a method": ("/predict", None, 405, "Method Not Allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_request_gets_one_line(case: str, client: Client) -> None:
    path, body, expected, named = REFUSED[case]
    status, result = client.ask(path, body)
    assert status == expected
    assert result.keys() == {"error"} and named in result["error"] and "\n" not in result["error"]


def test_a_body_of_exactly_max_bytes_is_answered(client: Client) -> None:
    body = b'{"texts": ["film"]}'
    assert client.ask("/predict", body.ljust(50_000))[0] == 200
    assert client.ask("/predict", body.ljust(50_001))[0] == 413


class Busy:
    """A model whose answer to each text is the number of texts of the call.

    The first call lasts until `free` is set, so that further requests have to wait.
    """

    def __init__(self) -> None:
        self.free = threading.Event()

    def predict(self, texts: list[str]) -> list[int]:
        if "first" in texts:
            self.free.wait(60)
        return [len(texts)] * len(texts)


@pytest.mark.parametrize(
    ("sizes", "together"),
    [((), ()), ((1, 2), (3, 3)), ((156, 100, 1), (256, 256, 1)), ((300, 5), (300, 5))],
)
def test_waiting_requests_are_answered_in_one_batch(
    sizes: tuple[int, ...], together: tuple[int, ...]
) -> None:
    """Waiting requests are answered together, up to 256 texts; the rest follows."""

    async def ask() -> None:
        model: Any = Busy()
        served = server.Served("gru", model)
        first = asyncio.create_task(served.predict(["first"]))
        await asyncio.sleep(0)  # the task begins
        waiting = [asyncio.create_task(served.predict(["text"] * size)) for size in sizes]
        await asyncio.sleep(0)
        model.free.set()
        async with asyncio.timeout(10):
            assert await first == [1]
            for task, size, count in zip(waiting, sizes, together, strict=True):
                assert await task == [count] * size
            assert await served.predict(["last"]) == [1]

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"host": "localhost"}, 200),
        ({"host": "LOCALHOST:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "name.example:8000"}, 200),
        ({"host": "evil.example"}, 400),
        ({"host": "localhost.evil.example:8000"}, 400),
        ({"host": "[::2]:8000"}, 400),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "name.example", "origin": "https://name.example"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, 403),
        ({"host": "localhost:8000", "origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"content_type": "Application/JSON; charset=utf-8"}, 200),
        ({"content_type": "text/plain"}, 415),
        ({"content_type": "application/json-seq"}, 415),
        ({"content_type": "application/x-www-form-urlencoded"}, 415),
        ({"content_type": ""}, 415),
    ],
)
def test_foreign_pages_are_refused(headers: dict[str, str], expected: int, client: Client) -> None:
    for path in ("/predict", "/explain"):
        assert client.ask(path, {"texts": ["film"]}, **headers)[0] == expected
    if "content_type" not in headers:
        for path in ("/", "/runs", "/healthz", "/metrics"):
            assert client.ask(path, **headers)[0] == expected


def test_a_request_without_host_is_refused(client: Client) -> None:
    """HTTP/1.0 allows requests without Host."""
    with socket.create_connection((client.host, client.port), timeout=60) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("client", ["jax"], indirect=True)
def test_localhost_is_allowed_where_every_address_is_served(client: Client) -> None:
    assert client.host == "0.0.0.0"
    assert client.ask("/healthz", host="localhost:8000")[0] == 200
    assert client.ask("/healthz", host="10.0.0.1")[0] == 400


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_thousands_of_malformed_bodies(count: int, client: Client) -> None:
    """Each body gets a 4xx status; at the end of the server, its standard error is empty."""
    rng = random.Random(0)
    good = json.dumps({"texts": ["film \u00e9", "\U0001f600"], "run": "gru"}).encode()
    pieces = [b"[", b"]", b"{", b"}", b'"', b"\\", b"\xff", b"\\ud800", b"null", b"1e999", b","]
    for number in range(count):
        body = bytearray(good)
        kind = number % 4
        if kind == 0:
            body = body[: rng.randrange(len(good))]
        elif kind == 1:
            body[rng.randrange(len(good))] = 0xFF  # which UTF-8 has nowhere
        elif kind == 2:
            body = bytearray(rng.choice(pieces) * rng.randrange(1, 5_000))
        else:
            body = bytearray(b'{"texts": [[%s]]}' % (rng.choice(pieces) * rng.randrange(20)))
        status, result = client.ask("/explain" if number % 2 else "/predict", bytes(body))
        assert status == 422 and result["error"], body
    assert client.ask("/predict", {"texts": ["film"]})[0] == 200


def test_disconnected_client_is_dropped(client: Client) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 100\r\n\r\n"
    for _ in range(50):
        with socket.create_connection((client.host, client.port)) as connection:
            connection.sendall(head)
    assert client.ask("/healthz")[0] == 200


@each_twin
def test_concurrent_requests_get_their_own_answers(client: Client) -> None:
    answers: dict[int, list[float]] = {}

    def ask(number: int) -> None:
        connection = http.client.HTTPConnection(client.host, client.port, timeout=60)
        for _ in range(20):
            texts = ["film " * (number + 1)] * (number % 3 + 1)
            headers = {"content-type": "application/json"}
            connection.request("POST", "/predict", json.dumps({"texts": texts}), headers)
            result = json.loads(connection.getresponse().read())["predictions"]
            assert [each["known_words"] for each in result] == [number + 1] * len(texts)
            answers.setdefault(number, []).extend(
                each["probabilities"]["positive"] for each in result
            )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [*range(16)]
    assert all(len(result) == 20 * (number % 3 + 1) for number, result in answers.items())
    for result in answers.values():
        assert result == pytest.approx([result[0]] * len(result), abs=1e-6)


def test_shutdown_waits_for_pending_requests(served: dict[str, Path]) -> None:
    """Even for a question of which the server has read the head alone. At an address other than
    the loopback's, that address is an allowed host, and localhost is not."""
    client = Client("torch", served["gru"], "--host", "127.0.0.2")
    assert client.ask("/healthz", host="127.0.0.2:80")[0] == 200
    assert client.ask("/healthz", host="localhost")[0] == 400
    body = json.dumps({"texts": TEXTS}).encode()
    head = (
        "POST /explain HTTP/1.1\r\nHost: 127.0.0.2\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
    )
    with socket.create_connection((client.host, client.port), timeout=60) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        # So the server says that it waits for the body.
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.process.send_signal(signal.SIGTERM)
        while accepts(client.host, client.port):
            time.sleep(0.01)
        connection.sendall(body)
        with http.client.HTTPResponse(connection) as answer:
            answer.begin()
            assert answer.status == 200
            assert len(json.loads(answer.read())["explanations"]) == len(TEXTS)
    assert client.ended() == STOPPED


def accepts(host: str, port: int) -> bool:
    """Whether a server accepts connections at this address."""
    try:
        socket.create_connection((host, port), timeout=60).close()
    except ConnectionRefusedError:
        return False
    return True


def test_signal_immediately_after_start_ends_the_server(served: dict[str, Path]) -> None:
    assert Client("torch", served["gru"]).end() == STOPPED


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        ([], "RUN_DIR"),
        (["GRU", "--port", "70000"], "--port 70000"),
        (["GRU", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["GRU", "--host", "a..b"], "--host a..b: not a valid host name"),
        (["GRU", "--port", "TAKEN"], "in use"),
        (["GRU", "--max-texts", "0"], "--max-texts 0"),
        (["GRU", "--allowed-hosts", "a.example", "b:80"], "--allowed-hosts b:80"),
        (["GRU", "--allowed-hosts", "a*"], "--allowed-hosts a*"),
    ],
)
def test_bad_options_get_one_clear_line(
    arguments: list[str], named: str, served: dict[str, Path], command: Command
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as received:
        words = {"GRU": str(served["gru"]), "TAKEN": str(received.getsockname()[1])}
        arguments = [words.get(word, word) for word in arguments]
        assert named in refused_at_once(
            command(partial(server.main, torch_impl.learner), *arguments)
        )
