"""A proxy between a client and an object store over HTTP, that goes wrong as told.

    with FaultProxy(upstream) as proxy:
        proxy.order("503", method="PUT", path="parts/", times=2)     # the next two such requests
        … use proxy.url …
        assert proxy.struck == ["503 PUT /bucket/parts/1", …]

Sorts: "503" (slow down), "500", "403" (access denied), "hang" (no answer until the client gives up), "drip"
(the answer comes in small pieces with pauses), "reset" (the connection is cut before the request reaches the
store), "lose" (the store gets the request and answers, and the answer never arrives).
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CODES = {"503": "SlowDown", "500": "InternalError", "403": "AccessDenied"}
HANG = 60.0  # seconds at most; a client gives up earlier


@dataclass
class Order:
    sort: str
    method: str
    path: str
    times: int


class _Server(ThreadingHTTPServer):
    # of a queue of five, more clients at once are not answered before they try again, a second later
    request_queue_size = 128


class FaultProxy:
    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream)
        self.struck: list[str] = []
        self.requests: list[str] = []
        self._orders: list[Order] = []
        self._lock = threading.Lock()
        self._over = threading.Event()

    def order(self, sort: str, method: str = ".*", path: str = "", times: int = 1) -> None:
        """The next requests whose method is this and in whose path and query this pattern is found."""
        with self._lock:
            self._orders.append(Order(sort, method, path, times))

    def calm(self) -> None:
        with self._lock:
            self._orders.clear()
            self.struck.clear()
            self.requests.clear()

    def _sort_for(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for order in self._orders:
                if order.times > 0 and re.fullmatch(order.method, method) and re.search(order.path, path):
                    order.times -= 1
                    self.struck.append(f"{order.sort} {method} {path}")
                    return order.sort
        return None

    def __enter__(self) -> FaultProxy:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def handle_any(self) -> None:
                with contextlib.suppress(ConnectionError, TimeoutError):
                    proxy._handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        sort = self._sort_for(request.command, request.path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if sort == "reset":
            return _cut(request)
        if sort == "hang":
            self._over.wait(HANG)
            return _cut(request)
        if sort in CODES:
            text = f"<Error><Code>{CODES[sort]}</Code><Message>ordered</Message></Error>".encode()
            return self._answer(request, int(sort), {"Content-Type": "application/xml"}, text)
        status, headers, text = self._forward(request, body)
        if sort == "lose":
            return _cut(request)
        self._answer(request, status, headers, text, drip=sort == "drip")

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream.hostname or "", self.upstream.port, timeout=60)
        try:
            headers = {name: value for name, value in request.headers.items() if name.lower() != "connection"}
            connection.request(request.command, request.path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _answer(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        text: bytes,
        drip: bool = False,
    ) -> None:
        request.send_response(status)
        skipped = ("connection", "transfer-encoding", "content-length", "date", "server")
        for name, value in headers.items():
            if name.lower() not in skipped:
                request.send_header(name, value)
        told = {name.lower(): value for name, value in headers.items()}.get("content-length", "0")
        request.send_header("Content-Length", told if request.command == "HEAD" else str(len(text)))
        request.end_headers()
        if request.command == "HEAD":
            return
        step = max(1, len(text) // 8) if drip else len(text) or 1
        for start in range(0, len(text), step):
            request.wfile.write(text[start : start + step])
            request.wfile.flush()
            if drip:
                time.sleep(0.05)


def _cut(request: BaseHTTPRequestHandler) -> None:
    """End the connection with a reset, not politely."""
    request.close_connection = True
    linger = struct.pack("ii", 1, 0)
    with contextlib.suppress(OSError):
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        request.connection.close()
