"""Traces: context in and out, spans of every part, errors always, no text, and no harm from a collector."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from coordinator_harness import DECODE, PREFILL, System, running, until

from baton.config import CoordinatorOptions, parse_otlp, validate
from baton.errors import ConfigurationError
from baton.v1 import inference_pb2 as api
from coordinator import tracing
from coordinator.tracing import Trace, TraceContext, Tracer, parse_traceparent

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
UNSAMPLED = f"00-{TRACE_ID}-00f067aa0ba902b7-00"
SECRET = "xylophone"
PROMPT = f"{SECRET} " * 60
ID = "a-request-that-is-traced"


class Kept:
    """In place of an exporter."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []
        self.counts: list[str] = []

    def export(self, trace: Trace) -> bool:
        self.traces.append(trace)
        return True

    def tracer(self, system: System, ratio: float = 1.0, slow_s: float = 0.0) -> Tracer:
        tracer = Tracer(ratio, slow_s, self.export, self.counts.append)
        timelines = system.coordinator.dispatcher.timelines
        timelines.on_begun, timelines.on_ended = tracer.begin, tracer.ended
        return tracer


@pytest.fixture(autouse=True)
def short_grace(monkeypatch) -> None:
    monkeypatch.setattr(tracing, "GRACE_S", 0.02)


async def ask(system: System, id: str = ID, traceparent: str = "", **more: Any) -> dict[str, str]:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 6, **more}
    headers = {"X-Request-Id": id} | ({"traceparent": traceparent} if traceparent else {})
    async with system.http.post("/v1/completions", json=body, headers=headers) as response:
        await response.read()
        return dict(response.headers)


def names(trace: Trace) -> list[str]:
    return [span.name for span in trace.spans]


@pytest.mark.parametrize(
    "text",
    ["", "hello", f"ff{CALLER[2:]}", CALLER.upper(), f"00-{'0' * 32}-00f067aa0ba902b7-01",
     f"00-{TRACE_ID}-{'0' * 16}-01",
     f"{CALLER}-more", CALLER[:-1], f"{CALLER}\n-"],
)  # fmt: skip
def test_a_context_that_is_no_good_is_ignored(text: str) -> None:
    assert parse_traceparent(text) is None


def test_a_context_comes_back_as_it_was_and_later_versions_are_understood() -> None:
    trace_id, span_id, sampled = parse_traceparent(CALLER) or (0, 0, False)
    assert TraceContext(trace_id, 0, span_id, sampled, {}).traceparent == CALLER
    assert parse_traceparent(f"01{CALLER[2:]}-what-comes-later") == (trace_id, span_id, True)
    assert parse_traceparent(UNSAMPLED) == (trace_id, span_id, False)


def test_context_comes_in_by_both_protocols_and_goes_out_to_clients_and_workers(run) -> None:
    async def check() -> None:
        kept = Kept()
        async with running() as system:
            kept.tracer(system)
            await system.worker("prefill-0", PREFILL)
            await system.worker("decode-0", DECODE)
            out = (await ask(system, traceparent=CALLER))["traceparent"]
            assert out[:36] == CALLER[:36]
            assert out != CALLER
            streamed = await ask(system, f"{ID}-streamed", CALLER, stream=True)
            assert streamed["traceparent"][:36] == CALLER[:36]
            own = (await ask(system, f"{ID}-own"))["traceparent"]
            assert own[:36] != CALLER[:36]
            call = system.inference.Generate(api.GenerateRequest(text=PROMPT), metadata=(("traceparent", CALLER),))
            assert dict(await call.initial_metadata())["traceparent"][:36] == CALLER[:36]
            assert [each async for each in call]
            for worker in system.workers:
                assert worker.assignments[0].traceparent == out
            await until(lambda: len(kept.traces) == 4)
            assert f"{kept.traces[0].context.parent_id:016x}" == "00f067aa0ba902b7"

    run(check())


def test_every_worker_has_its_spans_and_nothing_has_text(run) -> None:
    async def check() -> None:
        kept = Kept()
        async with running() as system:
            kept.tracer(system)
            await system.worker("prefill-0", PREFILL)
            await system.worker("decode-0", DECODE)
            await ask(system)
            await until(lambda: bool(kept.traces))
            trace = kept.traces[0]
            assert names(trace) == [
                f"text_completion {system.coordinator.intake.model_name}", "admission", "prefill attempt", "queue",
                "prefill", "decode attempt", "queue", "decode",
            ]  # fmt: skip
            ids = {span.span_id: span for span in trace.spans}
            assert len(ids) == len(trace.spans)
            for span in trace.spans[1:]:
                assert ids[trace.context.span_id].start_ns <= span.start_ns <= span.end_ns
                assert span.parent_id in ids
            told = trace.spans[0].attributes
            assert told["gen_ai.operation.name"] == "text_completion"
            assert told["gen_ai.response.id"] == ID
            assert told["gen_ai.usage.output_tokens"] == 6
            assert told["gen_ai.request.max_tokens"] == 6
            assert told["gen_ai.response.finish_reasons"] == ["length"]
            assert told["baton.sampled.because"] == "sampled"
            assert SECRET not in repr(trace)

    run(check())


def test_what_callers_and_the_ratio_leave_out_is_not_kept_but_errors_failovers_and_slow_ones_are(run) -> None:
    async def check() -> None:
        kept = Kept()
        async with running(max_attempts=2) as system:
            kept.tracer(system, ratio=0.0)
            worker = await system.worker("decode-0")
            await ask(system)
            await ask(system, f"{ID}-unsampled", UNSAMPLED)
            assert kept.counts == ["not_sampled"] * 2
            await ask(system, f"{ID}-sampled", CALLER)
            worker.fail_at, worker.heals = 2, True
            await ask(system, f"{ID}-failover", UNSAMPLED)
            worker.heals = False
            await ask(system, f"{ID}-error")
            worker.fail_at = None
            kept.tracer(system, ratio=0.0, slow_s=1e-9)
            await ask(system, f"{ID}-slow")
            await until(lambda: len(kept.traces) == 4)
            why = [trace.spans[0].attributes["baton.sampled.because"] for trace in kept.traces]
            assert why == ["sampled", "failover", "error", "slow"]
            assert kept.traces[2].spans[0].error == "failed"
            assert {span.error for span in kept.traces[1].spans if span.name == "decode attempt"} == {"ended", ""}

    run(check())


def test_the_ratio_is_kept_to() -> None:
    random.seed(7)
    tracer = Tracer(0.25, 0.0, lambda trace: True, lambda event: None)
    share = sum(tracer._context({}).sampled for _ in range(4000)) / 4000
    assert abs(share - 0.25) < 0.03


def test_what_waits_for_workers_last_words_is_bounded_and_not_lost_at_the_end(run, monkeypatch) -> None:
    async def check() -> None:
        kept = Kept()
        async with running() as system:
            tracer = kept.tracer(system)
            await system.worker("decode-0")
            monkeypatch.setattr(tracing, "GRACE_S", 60.0)
            monkeypatch.setattr(tracing, "MAX_PENDING", 2)
            for number in range(4):
                await ask(system, f"{ID}-{number}")
            assert kept.counts == ["dropped"] * 2
            tracer.flush()
            assert kept.counts == ["dropped"] * 2 + ["kept"] * 2

    run(check())


def test_without_an_endpoint_there_is_no_trace_at_all(run) -> None:
    async def check() -> None:
        async with running() as system:
            worker = await system.worker("decode-0")
            assert "traceparent" not in await ask(system, traceparent=CALLER)
            assert worker.assignments[0].traceparent == ""

    run(check())


@pytest.mark.parametrize("text", ["collector:4318", "ftp://a", "http://user:secret@a:1", "http://a b", "http://"])
def test_an_endpoint_that_cannot_be_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--otlp-endpoint must be") as refused:
        validate(CoordinatorOptions(otlp_endpoint=text))
    assert "secret" not in str(refused.value)


def test_an_endpoint_gets_the_path_of_traces_unless_it_has_one() -> None:
    assert parse_otlp("http://127.0.0.1:4318") == "http://127.0.0.1:4318/v1/traces"
    assert parse_otlp("https://a.example/otlp/v1/traces/") == "https://a.example/otlp/v1/traces"


# With OpenTelemetry itself


@pytest.fixture
def collector() -> Any:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="baton-serve[otel] is not installed")
    from collector import Collector

    with Collector() as started:
        yield started


def test_a_collector_gets_the_spans_of_a_request(run: Callable[..., Any], collector: Any) -> None:
    async def check() -> None:
        from collector import attributes

        async with running(otlp_endpoint=collector.url) as system:
            await system.worker("prefill-0", PREFILL)
            await system.worker("decode-0", DECODE)
            await ask(system, traceparent=CALLER)
            await until(lambda: bool(collector.named("decode")))
            (own,) = collector.named(f"text_completion {system.coordinator.intake.model_name}")
            assert (own.trace_id.hex(), own.parent_span_id.hex()) == (TRACE_ID, "00f067aa0ba902b7")
            assert own.kind == 2  # server
            assert attributes(own)["gen_ai.response.finish_reasons"] == ["length"]
            services = {service for service, _ in collector.spans}
            assert services == {"baton-coordinator", "baton-prefill", "baton-decode"}
            assert SECRET not in repr(collector.spans)
            assert system.metric("baton_traces_total", event="kept") == 1

    run(check())


def test_a_collector_that_hangs_or_refuses_delays_nobody_and_is_counted(
    run: Callable[..., Any], collector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coordinator import otlp

    monkeypatch.setattr(otlp, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(otlp, "MAX_QUEUED", 4)
    monkeypatch.setattr(otlp, "MAX_BATCH", 2)
    collector.go.clear()
    collector.status = 400

    async def check() -> None:
        async with running(otlp_endpoint=collector.url) as system:
            await system.worker("decode-0")
            await ask(system)
            await until(lambda: collector.num_posts > 0)
            loop = asyncio.get_running_loop()
            started = loop.time()
            for number in range(12):
                await asyncio.wait_for(ask(system, f"{ID}-{number}"), 2)
            await until(lambda: system.metric("baton_traces_total", event="dropped") > 0)
            assert loop.time() - started < 10
            collector.go.set()
            await until(lambda: system.metric("baton_traces_total", event="failed") > 0, 10)

    run(check())


def test_without_the_library_the_coordinator_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from coordinator.otlp import OtlpExporter

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'baton-serve\[otel\]'"):
        OtlpExporter("http://127.0.0.1:1/v1/traces", lambda event: None)
