"""A node's figures over HTTP, for Prometheus and `thinpipe top --prometheus`.

The figures are updated with each record that the node writes (`sim.reports.figures`); a scrape copies nothing and
computes only text, on a thread of its own. Beside them stand the process's own figures (CPU seconds, memory,
files), as Prometheus' clients have them.

Why not prometheus_client's own server: it accepts any number of connections, and keeps each as long as the peer likes.
This one serves at most eight at once, for ten seconds each, and closes further ones.
"""

from __future__ import annotations

import io
import socket
import socketserver
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.metrics_core import Metric

from ...sim.reports.figures import StageFigures
from ...sim.reports.metrics_address import MetricsAddress
from ...sim.reports.prometheus_metrics import families

CONNECTIONS_MAX = 8
CONNECTION_S = 10.0  # a request and its answer
IDLE_S = 5.0  # without a byte of either


class Exporter:
    """Serves one stage's figures, which begin with `figures`, at `endpoint` from now on. Raises MetricsAddressError
    where that cannot be had."""

    def __init__(self, figures: StageFigures, endpoint: MetricsAddress) -> None:
        self._figures, self._lock = figures, threading.Lock()
        registry = CollectorRegistry()
        registry.register(self)  # pyright: ignore[reportArgumentType] (it has `collect`, which is all of a Collector)
        ProcessCollector(registry=registry)
        try:
            self._server = _server(endpoint)
        except OSError as error:
            raise endpoint.taken(error) from None
        self._server.set_app(make_wsgi_app(registry))
        self.endpoint = MetricsAddress(endpoint.host, self._server.server_address[1])  # pyright: ignore[reportArgumentType]
        self._thread = threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True)
        self._thread.start()

    def take(self, record: dict[str, Any]) -> None:
        """A record was written."""
        with self._lock:
            self._figures.take(record)

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        with self._lock:
            return list(families(self._figures))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _server(endpoint: MetricsAddress) -> _Server:
    family, *_, where = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)[0]
    kind = type("_OfFamily", (_Server,), {"address_family": family})
    return kind(where[:2], _Handler)


class _Handler(WSGIRequestHandler):
    timeout = IDLE_S

    def setup(self) -> None:
        super().setup()
        self._over = threading.Timer(CONNECTION_S, self._hang_up)
        self._over.daemon = True
        self._over.start()

    def _hang_up(self) -> None:
        with suppress(OSError):  # it is over
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        self._over.cancel()
        super().finish()

    def log_message(self, format: str, *arguments: Any) -> None:
        del format, arguments

    def get_stderr(self) -> Any:
        return io.StringIO()  # a peer that went away is no news


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False  # a slow peer does not keep a node that has ended
    allow_reuse_address = True
    request_queue_size = 2 * CONNECTIONS_MAX  # with fewer, a connection that is one too many waits a second for its end

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__(*arguments)

    def server_bind(self) -> None:  # HTTPServer's asks for the host's name, which takes as long as a name server likes
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            return self.shutdown_request(request)
        return super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address  # it broke off; its connection is closed
