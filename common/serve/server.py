"""The HTTP server of trained models, which answers many requests together.

POST /predict       {"texts": [...], "run": the name of a run, by default the first}
POST /explain       the same, and "units": true for the gates and states of every unit
GET /runs           the runs that are served
GET /healthz        the state of the server
GET /metrics        metrics for Prometheus
GET /openapi.json   the description of this interface
GET /               a page that explains the answers of the runs

An invalid request gets a status 4xx and {"error": one line}.

A web page of another origin must not read the answers. The Host header must name this server,
because a foreign name may resolve to its address (DNS rebinding). An Origin header must agree with
it. A request must be application/json, which browsers do not send to another origin without a
preflight request.
"""

import asyncio
import dataclasses
import gc
import re
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import tyro
import uvicorn
from msgspec import Meta
from prometheus_client import CollectorRegistry, Counter, Histogram, exposition
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from common import __version__
from common.errors import InputError, Stopped, exit_on_input_error
from common.inference import prediction
from common.inference.model import ROWS, Model, Prediction, Saved
from common.inference.predictor import Framework
from common.linear import run as linear
from common.serve.assets import PATHS, assets
from common.signals import stop_requests
from common.training.options import Count, Device, check_numbers, parse_options

SIZES = ("hidden_size", "num_layers", "bidirectional")
MAX_BATCH_TEXTS = 256  # texts that are predicted together, unless one request has more
CONNECTIONS = 1000
BODY_SECONDS = 30
# The page loads only its own files and scripts.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
REFUSALS = {
    403: "The Origin header does not name this server.",
    404: "There is no such run.",
    408: f"The body was incomplete after {BODY_SECONDS} seconds.",
    413: "The request exceeds a limit, which the error names.",
    415: "The Content-Type is not application/json.",
    422: "The request is invalid.",
}


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Serve trained models over HTTP, with a page that explains their answers."""

    run_dirs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN_DIR [RUN_DIR ...]", help_behavior_hint=""),
    ] = ()
    """The run directories of trained models, of either framework or linear."""
    host: str = "127.0.0.1"
    """The address to listen on: by default, only this machine can connect; 0.0.0.0: any."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """The port to listen on; 0 for a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names or addresses, without a port, by which clients reach the server: name,
    *.example.com, [2001:db8::1]; "*" for any. Requests with another Host header are refused.
    --host and, if it is reachable, localhost are always allowed."""
    max_texts: Count = 256
    """The largest number of texts in a request."""
    max_characters: Count = 20_000
    """The largest number of characters of a text."""
    max_explained: Count = 500
    """The largest number of words that a request may have explained: for each, all are read
    twice."""
    max_bytes: Count = 2_000_000
    """The largest number of bytes of a request."""
    checkpoint: Saved | None = None
    """Read the last checkpoint of each run, which may be unfinished: its last parameters, or the
    best ones by the validation loss."""
    device: Annotated[Device, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """The device of the computation: auto, cpu, cuda or mps."""


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """Texts to classify. run: the name of a run, by default the first one."""

    texts: list[str]
    run: str | None = None


class Explain(Question, forbid_unknown_fields=True):
    """Texts to explain. units: whether to add the gates and states of every unit, which a linear
    run does not have."""

    units: bool = False


class Predictions(msgspec.Struct):
    """Answers, in the order of the texts."""

    run: str
    predictions: list[Prediction]


class Explanations(msgspec.Struct):
    """The explanation of each text: see Model.explain or, for a linear run, Run.explain."""

    run: str
    explanations: list[dict[str, Any]]


class Problem(msgspec.Struct):
    """The reason why a request is refused."""

    error: str


Handler = Callable[[Request], Awaitable[Response]]
Q = TypeVar("Q", bound=Question)


class Served:
    """A run that is served. Requests that arrive while it computes are then computed together.

    Waiting one to three milliseconds for further requests resulted in fewer answers per second.
    """

    def __init__(self, name: str, model: Model | linear.Run) -> None:
        self.name, self.model = name, model
        self.worker = ThreadPoolExecutor(1)
        self.waiting: list[tuple[list[str], asyncio.Future[list[Prediction]]]] = []
        self.task: asyncio.Task[None] | None = None
        for rows in ROWS:  # so that JAX compiles before the first request
            model.predict([""] * rows)

    async def predict(self, texts: list[str]) -> list[Prediction]:
        future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
        self.waiting.append((texts, future))
        self.task = self.task or asyncio.create_task(self._answer())
        return await future

    async def _answer(self) -> None:
        """Answer until no request waits."""
        loop = asyncio.get_running_loop()
        while self.waiting:
            sizes = accumulate(len(texts) for texts, _ in self.waiting)
            end = 1 + sum(size <= MAX_BATCH_TEXTS for size in islice(sizes, 1, None))
            taken, self.waiting = self.waiting[:end], self.waiting[end:]
            texts = [text for texts_of_request, _ in taken for text in texts_of_request]
            try:
                answers = iter(await loop.run_in_executor(self.worker, self.model.predict, texts))
            except Exception as problem:  # a 500 for each of these requests
                for _, future in taken:
                    if not future.done():
                        future.set_exception(problem)
                continue
            for texts_of_request, future in taken:
                own = [*islice(answers, len(texts_of_request))]
                if not future.done():  # otherwise the client has disconnected
                    future.set_result(own)
        self.task = None


class Server:
    """The ASGI application, which uvicorn runs."""

    def __init__(self, runs: Sequence[Served], options: ServeOptions, hosts: Sequence[str]) -> None:
        """hosts: the values, without a port, that a request's Host header may have."""
        self.runs, self.options = {run.name: run for run in runs}, options
        self.explaining = ThreadPoolExecutor(1)
        registry = self.registry = CollectorRegistry()
        count, of = partial(Counter, registry=registry), "gru_twins_"
        self.answered = count(f"{of}requests", "Requests by path and status.", ["path", "status"])
        self.texts = count(f"{of}texts", "Texts that were answered, by path.", ["path"])
        seconds = f"{of}request_seconds"
        self.seconds = Histogram(seconds, "Durations by path.", ["path"], registry=registry)
        pages = {path: partial(self.asset, path) for path in PATHS}
        self.get = {"/runs": self.about, "/healthz": self.healthz, "/metrics": self.metrics}
        self.get |= {"/openapi.json": self.openapi, **pages}
        self.post = {"/predict": self.predict, "/explain": self.explain}
        self.app = Starlette(
            routes=[
                Route(path, self.timed(path, handler), methods=[method])
                for method, handlers in (("GET", self.get), ("POST", self.post))
                for path, handler in handlers.items()
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
            exception_handlers={HTTPException: refused, InputError: failed},
        )

    def timed(self, path: str, handler: Handler) -> Handler:
        """The handler, with metrics of its requests and times."""

        async def endpoint(request: Request) -> Response:
            started, status = time.perf_counter(), 500
            try:
                check_origin(request)
                response = await handler(request)
                status = response.status_code
                return response
            except HTTPException as problem:
                status = problem.status_code
                raise
            finally:
                self.answered.labels(path, status).inc()
                self.seconds.labels(path).observe(time.perf_counter() - started)

        return endpoint

    async def predict(self, request: Request) -> Response:
        """The most probable class of each text, and the probabilities of all."""
        question, run = await self.read(request, Question)
        answers = await run.predict(question.texts)
        self.texts.labels("/predict").inc(len(answers))
        return as_json(Predictions(run.name, answers))

    async def explain(self, request: Request) -> Response:
        """Gates, changes of the state and influence of each word of each text."""
        question, run = await self.read(request, Explain)
        explain: Callable[[str], dict[str, Any]] = run.model.explain
        if isinstance(run.model, Model):
            known = await asyncio.to_thread(run.model.encode, question.texts)
            words = sum(min(len(ids), run.model.limit) for ids in known)
            if words > (most := self.options.max_explained):
                raise HTTPException(
                    413, f"{words:,} words to explain, more than --max-explained {most:,}"
                )
            explain = partial(run.model.explain, units=question.units)
        elif question.units:
            raise HTTPException(422, f"units: the run {run.name} is linear and has none")
        loop = asyncio.get_running_loop()
        explanations = [
            await loop.run_in_executor(self.explaining, explain, text) for text in question.texts
        ]
        self.texts.labels("/explain").inc(len(explanations))
        return as_json(Explanations(run.name, explanations))

    async def read(self, request: Request, kind: type[Q]) -> tuple[Q, Served]:
        """The parsed request and its run. Raises HTTPException for an invalid request."""
        limits, body = self.options, bytearray()
        media_type = request.headers.get("content-type", "").partition(";")[0].strip()
        if media_type.lower() != "application/json":
            raise HTTPException(
                415, f"expected Content-Type application/json, found {media_type or 'none'}"
            )
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limits.max_bytes:
                        raise HTTPException(413, f"larger than --max-bytes {limits.max_bytes:,}")
        except TimeoutError:
            raise HTTPException(408, f"not complete after {BODY_SECONDS} seconds") from None
        except ClientDisconnect:
            raise HTTPException(400, "not complete") from None
        try:
            question = msgspec.json.decode(body, type=kind)
        except (ValueError, RecursionError) as error:
            raise HTTPException(422, f"not what is expected: {error}") from None
        if len(question.texts) > limits.max_texts:
            many = f"{len(question.texts):,} texts, more than --max-texts {limits.max_texts:,}"
            raise HTTPException(413, many)
        if (longest := max(map(len, question.texts), default=0)) > limits.max_characters:
            many = f"a text of {longest:,} characters, more than --max-characters"
            raise HTTPException(413, f"{many} {limits.max_characters:,}")
        name = next(iter(self.runs)) if question.run is None else question.run
        if name not in self.runs:
            raise HTTPException(404, f"run {name!r}: there are {', '.join(self.runs)}")
        return question, self.runs[name]

    async def about(self, request: Request) -> Response:
        """The runs that are served."""
        return as_json({"runs": [about(run) for run in self.runs.values()]})

    async def healthz(self, request: Request) -> Response:
        """The state of the server."""
        return as_json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Requests, seconds and texts, for Prometheus."""
        return Response(
            exposition.generate_latest(self.registry), media_type=exposition.CONTENT_TYPE_LATEST
        )

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI description of this interface."""
        kinds = [Question, Explain, Predictions, Explanations, Problem]
        place = "#/components/schemas/{name}"
        refs, schemas = msgspec.json.schema_components(kinds, ref_template=place)
        question, explain, predictions, explanations, problem = refs
        types = {"/predict": (question, predictions), "/explain": (explain, explanations)}
        refusals = {str(code): content(what, problem) for code, what in REFUSALS.items()}
        paths: dict[str, Any] = {}
        for path, (takes, gives) in types.items():
            body = {**content("", takes), "required": True}
            answers = {"200": content("The answers.", gives), **refusals}
            summary = self.post[path].__doc__
            paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": answers}}
        for path, handler in self.get.items():
            if path not in PATHS:
                answer = {"200": {"description": "The answer."}}
                paths[path] = {"get": {"summary": handler.__doc__, "responses": answer}}
        info = {"title": "GRU twins", "version": __version__}
        return as_json(
            {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}
        )

    async def asset(self, path: str, request: Request) -> Response:
        body, media_type = (await asyncio.to_thread(assets))[path]
        return Response(body, media_type=media_type, headers=HEADERS)


class Announced(uvicorn.Server):
    """uvicorn's server, which prints a line when it is ready.

    Earlier, before uvicorn has installed its handlers, a signal would not stop it.
    """

    def __init__(self, config: uvicorn.Config, line: str) -> None:
        super().__init__(config)
        self.line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.line, flush=True)


def as_json(answer: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status, media_type="application/json")


def check_origin(request: Request) -> None:
    """Raise HTTPException for a request of a page of another origin. Programs send no Origin
    header."""
    origin, host = request.headers.get("origin"), request.headers["host"]
    if origin is not None and origin.partition("://")[2] != host:
        raise HTTPException(403, f"Origin {origin} is not {host}")


async def refused(request: Request, problem: Exception) -> Response:
    """The response to an invalid request: one line."""
    assert isinstance(problem, HTTPException)
    line = " ".join(problem.detail.split())
    return as_json(Problem(f"{request.method} {request.url.path}: {line}"), problem.status_code)


async def failed(request: Request, problem: Exception) -> Response:
    """The response if a model's numbers overflow: one line."""
    return as_json(Problem(f"{request.method} {request.url.path}: {problem}"), 500)


def content(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI schema of a request or an answer."""
    described = {"description": description} if description else {}
    return {**described, "content": {"application/json": {"schema": schema}}}


def about(served: Served) -> dict[str, Any]:
    """The description of a run in GET /runs."""
    model = served.model
    run: Any = model if isinstance(model, linear.Run) else model.run
    description = {"name": served.name, "framework": run.framework, "model": linear.NAME}
    if run is not model:
        description |= {"model": run.options.model}
        description |= {name: getattr(run.model, name) for name in SIZES}
    return description | {"classes": run.classes, "example": run.example}


def main(framework: Framework) -> None:
    """The command line of `python -m torch_impl.serve` and `python -m jax_impl.serve`."""
    with exit_on_input_error():
        package = framework.__name__.partition(".")[0]
        options = parse_options(ServeOptions, f"python -m {package}.serve")
        check_numbers(options)
        if not options.run_dirs:
            raise InputError("RUN_DIR: expected at least one run directory")
        check_hosts(options.allowed_hosts)
        listener = listen(options.host, options.port)
        runs = []
        for name, folder in names(options.run_dirs).items():
            model = prediction.load(framework, folder, options.device, options.checkpoint)
            runs.append(Served(name, model))
        # Otherwise garbage collection inspects all of PyTorch, which takes a tenth of a second.
        gc.collect()
        gc.freeze()
        host, port = listener.getsockname()[:2]
        hosts = [*options.allowed_hosts, bracketed(options.host), host := bracketed(host)]
        if host in (*LOOPBACK, "0.0.0.0", "[::]"):
            hosts += LOOPBACK
        line = f"serving {', '.join(run.name for run in runs)} on http://{host}:{port}"
        config = uvicorn.Config(
            Server(runs, options, hosts).app,
            log_level="error",
            access_log=False,
            ws="none",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=30,
        )
        with listener, stop_requests() as signals:
            Announced(config, line).run(sockets=[listener])
        if signals:
            raise Stopped(signals[0], "; all earlier requests are answered")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at this address. Raises InputError if that is impossible."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}") from None
    except UnicodeError:  # a label is empty or has more than 63 characters
        raise InputError(f"--host {host}: not a valid host name") from None


def bracketed(host: str) -> str:
    """A host in the form of a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise InputError for the first value that is no name, address or pattern of names."""
    for host in hosts:
        if not re.fullmatch(r"\*|(\*\.)?[\w.-]+|\[[0-9a-fA-F:.]+\]", host):
            raise InputError(
                f"--allowed-hosts {host}: expected a name or an address without a port, as in "
                "name, *.example.com, 10.0.0.1 or [::1]"
            )


def names(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by name, or by the given paths if two folders have the same name."""
    short = [folder.resolve().name for folder in folders]
    return dict(
        zip(short if len({*short}) == len(short) else map(str, folders), folders, strict=True)
    )
