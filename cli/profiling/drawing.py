"""Draws what was recorded as a trace: scheduler, kernels, transfers and requests, each kind in tracks of its own."""

from typing import Any

from baton.trace import Trace
from cli.profiling.relay import Recorded
from cli.profiling.watching import Notes, Step, TransferSpan

SCHEDULER, KERNELS, TRANSFERS, REQUESTS = "scheduler", "kernels", "transfers", "requests"


def draw(recorded: Recorded, about: dict[str, Any]) -> Trace:
    trace = Trace(about)
    _draw_requests(trace, recorded)
    for notes in recorded.workers:  # rows are shown in the order in which they are made
        trace.track(notes.worker, "step loop", SCHEDULER)
    for notes in recorded.workers:
        for step in notes.steps:
            _draw_step(trace, notes.worker, step)
        _draw_offers(trace, notes, recorded.block_bytes)
        _draw_handovers(trace, notes, recorded)
    _draw_transfers(trace, recorded.transfers)
    return trace


def _draw_step(trace: Trace, worker: str, step: Step) -> None:
    loop = trace.track(worker, "step loop", SCHEDULER)
    shape, output = step.shape, step.output
    trace.span(loop, "step", step.start_ns, step.end_ns, singles=shape.batch, prompt_tokens=shape.prompt_tokens)
    trace.span(loop, "plan", step.start_ns, step.run_start_ns, started=len(output.started))
    trace.span(
        loop, "run", step.run_start_ns, step.run_end_ns, sequences=shape.batch + len(shape.chunks),
        tokens=shape.batch + shape.prompt_tokens,
    )  # fmt: skip
    trace.span(
        loop, "apply", step.run_end_ns, step.end_ns, tokens=len(output.tokens), ended=len(output.ended),
        blocks_final=sum(len(computed.block_ids) for computed in output.computed),
    )  # fmt: skip
    kernels = trace.track(worker, "kernels", KERNELS)
    for call in step.kernels:
        layer = {} if call.layer < 0 else {"layer": call.layer}
        name = f"{call.name} {call.operand}".rstrip()
        trace.span(kernels, name, call.start_ns, call.end_ns, rows=call.rows, **layer)


def _draw_requests(trace: Trace, recorded: Recorded) -> None:
    """From the coordinator's send to the end; when each engine took it in; when its first token was back."""
    track = trace.track("requests", "requests", REQUESTS)
    for key, stream in recorded.streams.items():
        marks = {f"taken in by {notes.worker}": notes.added[key] for notes in recorded.workers if key in notes.added}
        marks["first token"] = stream.first_token_ns
        trace.lasting(
            track, stream.name, stream.sent_ns, stream.end_ns, marks,
            prompt_tokens=len(stream.prompt), output_tokens=stream.num_tokens,
        )  # fmt: skip


def _draw_offers(trace: Trace, notes: Notes, block_bytes: int) -> None:
    for at_ns, request_id, num_blocks in notes.computed:
        track = trace.track("transfers", f"offers of {notes.worker}", TRANSFERS)
        trace.instant(track, "offer", at_ns, request=request_id, blocks=num_blocks, bytes=num_blocks * block_bytes)


def _draw_handovers(trace: Trace, notes: Notes, recorded: Recorded) -> None:
    """On the taking side: from the reservation of blocks until all of them are here and checked."""
    for request_id, (end_ns, num_tokens) in notes.received.items():
        start_ns, num_cached = notes.reserved[request_id]
        num_blocks = -(-num_tokens // recorded.page_size) - num_cached
        track = trace.track("transfers", "hand-overs", TRANSFERS)
        trace.lasting(
            track, "hand-over", start_ns, end_ns, {}, request=request_id, blocks=num_blocks, cached_blocks=num_cached,
            bytes=num_blocks * recorded.block_bytes,
        )  # fmt: skip


def _draw_transfers(trace: Trace, spans: list[TransferSpan]) -> None:
    """One track a thread. A batch is a pull and its check; the check is what of it comes after the pull."""
    pulled_until: dict[str, int] = {}
    for span in sorted(spans, key=lambda span: span.end_ns):
        track = trace.track("transfers", span.thread, TRANSFERS)
        if span.kind == "pull":
            pulled_until[span.thread] = span.end_ns
            trace.span(
                track, f"pull by {span.lane}", span.start_ns, span.end_ns,
                lane=span.lane, blocks=span.num_blocks, bytes=span.num_bytes,
            )  # fmt: skip
        elif span.kind == "batch":
            trace.span(track, "pull and check", span.start_ns, span.end_ns)
            trace.span(track, "check", pulled_until.get(span.thread, span.start_ns), span.end_ns)
        else:
            trace.span(track, "checksums to offer", span.start_ns, span.end_ns)
