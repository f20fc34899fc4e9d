"""What several test files of rewards need."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tempflow.errors import UserError


@contextmanager
def refused(words):
    """Expects a UserError whose text holds all `words`."""
    with pytest.raises(UserError) as error:
        yield error
    assert all(word in str(error.value) for word in words), error.value


@contextmanager
def answering(respond):
    """The address of a server that answers `respond(path, headers, body)`: a status, headers and a
    body, as bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, answer = respond(self.path, self.headers, body)
            self.send_response(status)
            for pair in {"Content-Length": str(len(answer)), **headers}.items():
                self.send_header(*pair)
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
