"""Sends traces to a collector by OTLP over HTTP, from a thread of its own, with the OpenTelemetry SDK's exporter.

Headers, certificates and compression are set as the SDK has them: OTEL_EXPORTER_OTLP_HEADERS and the like.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import baton
from baton.errors import ConfigurationError
from coordinator.tracing import SpanData, Trace

MAX_QUEUED = 2048
"""Traces that wait to be sent."""
MAX_BATCH = 128
GATHER_S = 0.5
TIMEOUT_S = 5.0
STOP_S = 2.0
log = logging.getLogger("baton.tracing")


class OtlpExporter:
    """`count` is called for each trace that could not be sent, from the thread."""

    def __init__(self, endpoint: str, count: Callable[[str], None]) -> None:
        """Raises ConfigurationError where OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise ConfigurationError("--otlp-endpoint needs OpenTelemetry: pip install 'baton-serve[otel]'") from None
        self._exporter: Any = OTLPSpanExporter(endpoint=endpoint, timeout=TIMEOUT_S)
        self._count = count
        self._resources: dict[tuple[str, str], Any] = {}
        self._traces: queue.Queue[Trace] = queue.Queue(MAX_QUEUED)
        self._stopping = threading.Event()
        self._works = True
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def put(self, trace: Trace) -> bool:
        """From any thread; never blocks. False: too many wait."""
        try:
            self._traces.put_nowait(trace)
        except queue.Full:
            return False
        return True

    def stop(self) -> None:
        """Send what waits, for a little while. Blocks for STOP_S at most."""
        self._stopping.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        while not (self._stopping.is_set() and self._traces.empty()):
            try:
                batch = [self._traces.get(timeout=GATHER_S)]
            except queue.Empty:
                continue
            until = time.monotonic() + (0.0 if self._stopping.is_set() else GATHER_S)
            while len(batch) < MAX_BATCH and (left_s := until - time.monotonic()) > -GATHER_S:
                try:
                    batch.append(self._traces.get(timeout=max(0.001, left_s)))
                except queue.Empty:
                    break
            self._send(batch)
        self._exporter.shutdown()

    def _send(self, batch: list[Trace]) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        spans = [self._readable(trace, span) for trace in batch for span in trace.spans]
        try:
            sent = self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:  # noqa: BLE001 - of a library and a network; counted
            log.debug("traces were not sent: %s", type(error).__name__)
            sent = False
        if sent != self._works:
            level, what = (logging.INFO, "are sent again") if sent else (logging.WARNING, "cannot be sent")
            log.log(level, "traces %s", what)
        self._works = sent
        if not sent:
            for _ in batch:
                self._count("failed")

    def _readable(self, trace: Trace, span: SpanData) -> Any:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        def context(span_id: int, remote: bool) -> SpanContext:
            return SpanContext(trace.context.trace_id, span_id, remote, TraceFlags(TraceFlags.SAMPLED))

        own = span.span_id == trace.context.span_id
        return ReadableSpan(
            name=span.name,
            context=context(span.span_id, False),
            parent=context(span.parent_id, own) if span.parent_id else None,
            resource=self._resource(span.service, span.instance),
            attributes=span.attributes,
            kind=SpanKind.SERVER if own else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
            start_time=span.start_ns,
            end_time=span.end_ns,
        )

    def _resource(self, service: str, instance: str) -> Any:
        from opentelemetry.sdk.resources import Resource

        if (known := self._resources.get((service, instance))) is None:
            if len(self._resources) > 4096:  # workers come and go
                self._resources.clear()
            names = {"service.name": service, "service.version": baton.__version__}
            known = Resource(names | ({"service.instance.id": instance} if instance else {}))
            self._resources[service, instance] = known
        return known
