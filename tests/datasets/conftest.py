"""A small CIFAR-10 archive, and a server that offers it."""

import http.server
import threading
from pathlib import Path

import pytest

from tests.datasets.archives import CONTENTS, admit_small_cifar10, write_archive


@pytest.fixture
def small_cifar10(monkeypatch):
    admit_small_cifar10(monkeypatch.setattr)


@pytest.fixture
def archive(tmp_path, small_cifar10) -> Path:
    return write_archive(tmp_path / "archive.tar.gz", CONTENTS)


@pytest.fixture
def server(archive):
    """Serves the archive at /whole, its first half as if it were all at /cut (of the true length), else 404."""
    content = archive.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in ("/whole", "/cut"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if self.path == "/whole" else content[: len(content) // 2])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as instance:
        thread = threading.Thread(target=instance.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{instance.server_port}"
        instance.shutdown()
        thread.join()
