"""A collector of traces: takes OTLP over HTTP, and can be told to hang or to refuse."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Collector:
    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        """(service, span)."""
        self.status = 200
        self.go = threading.Event()
        self.go.set()
        self.num_posts = 0

    def __enter__(self) -> "Collector":
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.num_posts += 1
                collector.go.wait(20)
                if collector.status == 200:
                    collector.take(self.path, body)
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()

    def take(self, path: str, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        assert path == "/v1/traces"
        for of in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = attributes(of.resource)
            for scope in of.scope_spans:
                self.spans += [(resource["service.name"], span) for span in scope.spans]

    def named(self, name: str) -> list[Any]:
        return [span for _, span in list(self.spans) if span.name == name]


def attributes(of: Any) -> dict[str, Any]:
    found = {}
    for each in of.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found
