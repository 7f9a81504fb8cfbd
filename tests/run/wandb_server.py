"""As much of the server of Weights & Biases as runs without media need."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "canary" + "0123456789" * 4
CREDENTIALS = base64.b64encode(f"api:{KEY}".encode())


class FakeWandb(ThreadingHTTPServer):
    """The server of one run.

    Args:
        status: of its answers.
        dies: whether it falls silent once a run has started.
    """

    def __init__(self, status: int = 200, dies: bool = False):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status, self.dies = status, dies
        self.authorizations: set[str | None] = set()
        self.history: list[str] = []  # the lines of the run
        self.is_silent, self.is_closed = False, threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing: clients that are killed drop their connections."""

    def steps(self, axis: str) -> list[int]:
        """The values of the run's lines on this axis: "step" is ours, "_step" is W&B's own."""
        return [json.loads(line)[axis] for line in self.history]

    def close(self) -> None:
        self.is_closed.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeWandb  # pyright: ignore[reportIncompatibleVariableOverride]: that is what makes it

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""

    def do_POST(self) -> None:
        server, body = self.server, self._read()
        server.authorizations.add(self.headers["Authorization"])
        if server.is_silent:
            server.is_closed.wait()
            self.close_connection = True
        elif server.status != 200:
            self._answer({"errors": [{"message": "user is not logged in"}]})
        elif self.path.endswith("/file_stream"):
            if history := json.loads(body).get("files", {}).get("wandb-history.jsonl"):
                lines, start = history["content"], history["offset"]
                server.history[start : start + len(lines)] = lines
            self._answer({})
        else:
            request = json.loads(body)
            self._answer({"data": self._data(request.get("operationName"), request.get("variables") or {})})

    def do_PUT(self) -> None:
        self._read()
        self._answer({})

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _data(self, operation: str | None, variables: dict[str, Any]) -> dict[str, Any]:
        """What an operation of GraphQL returns."""
        lines = self.server.history
        if operation == "RunResumeStatus" and lines:
            bucket = {
                "name": variables["name"], "config": "{}", "wandbConfig": '{"t": 1}', "eventsTail": "[]",
                "historyTail": json.dumps(lines[-1:]), "summaryMetrics": lines[-1],
                "historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0,
            }  # fmt: skip
            return {"model": {"bucket": bucket}}
        if operation == "UpsertBucket":
            self.server.is_silent = self.server.dies
            project = {"name": variables["project"], "entity": {"name": "someone"}}
            return {"upsertBucket": {"bucket": {"name": variables["name"], "displayName": "n", "project": project}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.server.url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def _answer(self, data: dict[str, Any]) -> None:
        content = json.dumps(data).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
