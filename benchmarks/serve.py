"""The requests per second that the server answers.

    python -m benchmarks.serve torch|jax RUN_DIR [OPTIONS OF THE SERVER]

Starts the server and sends it requests of one short review each (of the data set rt) over 64
connections on the loopback interface. The clients are a separate process on the same machine.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np

from common.data import corpus
from tools.program import memory_of

CONNECTIONS, WARM_UP, REQUESTS = 64, 5_000, 100_000


def http_requests() -> list[bytes]:
    """A request for each training review of the data set."""
    data = corpus.load("rt")
    requests = []
    for words in data.train:
        text = " ".join(data.vocabulary[word] for word in words)
        body = msgspec.json.encode({"texts": [text]})
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        requests.append(head.encode() + body)
    return requests


async def send(port: int, requests: list[bytes], count: int) -> tuple[list[float], int, float]:
    """The latencies in seconds, the number of failed requests, and the total duration."""
    latencies: list[float] = []
    failed, numbers = 0, iter(range(count))

    async def client() -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            started = time.perf_counter()
            writer.write(requests[number % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
            answer = await reader.readexactly(length)
            latencies.append(time.perf_counter() - started)
            failed += not (head.startswith(b"HTTP/1.1 200") and b'"label"' in answer)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return latencies, failed, time.perf_counter() - started


def main() -> None:
    framework, *arguments = sys.argv[1:]
    command = [sys.executable, "-m", f"{framework}_impl.serve", *arguments, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    print(line, end="")
    port, requests = int(line.rpartition(":")[2]), http_requests()
    try:
        from uvloop import run
    except ImportError:
        from asyncio import run
    run(send(port, requests, WARM_UP))
    before = memory_of(server.pid)["VmRSS"] / 2**20
    latencies, failed, duration = run(send(port, requests, REQUESTS))
    after = memory_of(server.pid)["VmRSS"] / 2**20
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 143, server.returncode
    p50, p99 = np.quantile(latencies, [0.5, 0.99]) * 1000
    print(
        f"{framework}: {len(latencies):,} requests, {failed} failed, "
        f"{len(latencies) / duration:,.0f} per second; p50 {p50:.1f} ms, p99 {p99:.1f} ms; "
        f"memory {before:.0f} MiB before, {after:.0f} after; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
