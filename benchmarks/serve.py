"""Requests a second that the server answers: python -m benchmarks.serve torch|jax RUN_DIR [OPTIONS]

Starts it, warms it up, and then asks it from 64 connections, over loopback, each one short review
at a time (of the data set rt). The clients are a process of their own on the same machine.
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
from tools.large_corpus import resident

CONNECTIONS, REQUESTS = 64, 100_000


def requests_of(count: int) -> list[bytes]:
    """Requests as HTTP has them."""
    data = corpus.load("rt")
    found = []
    for number in range(min(count, len(data.train))):
        text = " ".join(data.vocabulary[word] for word in data.train[number])
        body = msgspec.json.encode({"texts": [text]})
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        found.append(head.encode() + body)
    return found


async def ask(port: int, requests: list[bytes], count: int) -> tuple[list[float], int, float]:
    """The seconds of each answer, how many were none, and the seconds of all together."""
    seconds: list[float] = []
    lost, left = 0, iter(range(count))

    async def client() -> None:
        nonlocal lost
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in left:
            started = time.perf_counter()
            writer.write(requests[number % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
            answer = await reader.readexactly(length)
            seconds.append(time.perf_counter() - started)
            lost += not (head.startswith(b"HTTP/1.1 200") and b'"label"' in answer)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return seconds, lost, time.perf_counter() - started


def main() -> None:
    framework, *arguments = sys.argv[1:]
    command = [sys.executable, "-m", f"{framework}_impl.serve", *arguments, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    print(line, end="")
    port, requests = int(line.rpartition(":")[2]), requests_of(REQUESTS)
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run
    run(ask(port, requests, 5_000))
    before = resident(str(server.pid))[0] / 2**20
    seconds, lost, wall = run(ask(port, requests, REQUESTS))
    after = resident(str(server.pid))[0] / 2**20
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 143, server.returncode
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    print(
        f"{framework}: {len(seconds):,} requests, {lost} lost, {len(seconds) / wall:,.0f} "
        f"a second; p50 {p50:.1f} ms, p99 {p99:.1f} ms; memory {before:.0f} MiB before, "
        f"{after:.0f} after; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
