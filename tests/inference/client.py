"""The server as a separate program, and a connection to it."""

import http.client
import json
import signal
import subprocess
import sys
from typing import Any

SIZES = {"train_size": 64, "test_size": 32, "max_length": 60, "hidden_size": 4, "epochs": 1}
"""Options of the models that are served."""
HOSTS = {"torch": "127.0.0.1", "jax": "0.0.0.0"}
"""The addresses on which the servers of the two frameworks listen."""
STOPPED = 143, "stopped by SIGTERM; all earlier requests are answered\n"


class Client:
    """A server on a free port, and a connection to it."""

    def __init__(self, framework: str, *arguments: object) -> None:
        command = [sys.executable, "-m", f"{framework}_impl.serve", *map(str, arguments)]
        self.process = subprocess.Popen(
            [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        assert self.said, self.process.communicate()[1]
        self.host, _, port = self.said.strip().rpartition("/")[2].rpartition(":")
        self.port = int(port)
        self.connection = http.client.HTTPConnection(self.host, self.port, timeout=60)

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and answer. A body that is not bytes is sent as JSON. By default, the content type
        is application/json."""
        method = "GET" if body is None else "POST"
        body = body if body is None or isinstance(body, bytes) else json.dumps(body)
        headers = {"content_type": "application/json", **headers}
        named = {name.replace("_", "-"): value for name, value in headers.items() if value}
        self.connection.request(method, path, body, named)
        answer = self.connection.getresponse()
        content = answer.read()
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status, json.loads(content) if is_json else content.decode()

    def end(self) -> tuple[int, str]:
        """Send SIGTERM, as a container runtime does, and return the result of `ended`."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """The exit status of a server that ends, and its standard error."""
        error = self.process.communicate(timeout=60)[1]
        return self.process.returncode, error
