"""What operators see of the cluster: the document behind `baton status`."""

import time
from typing import Any

import baton
from coordinator.dispatch import Dispatcher
from coordinator.workers import Worker, WorkerRegistry


def cluster_status(
    model: str, registry: WorkerRegistry, dispatcher: Dispatcher, rollout_trouble: str = ""
) -> dict[str, Any]:
    """JSON-ready. Counts are of the workers' last heartbeats, ages in seconds."""
    ordered = sorted(registry.workers.values(), key=lambda worker: worker.id)
    workers = [
        worker_status(worker)
        | {"breaker": dispatcher.breakers.state(worker.id), "counters": dict(worker.heartbeat.counters)}
        for worker in ordered
    ]
    return summary(model, registry, dispatcher, rollout_trouble) | {"workers": workers}


def summary(model: str, registry: WorkerRegistry, dispatcher: Dispatcher, rollout_trouble: str) -> dict[str, Any]:
    """The same without the workers."""
    return {
        "version": baton.__version__,
        "model": model,
        "state": "draining" if dispatcher.leaving else "ready" if dispatcher.versions.serves else "waiting for workers",
        "max_model_tokens": registry.context_tokens,
        "requests": len(dispatcher.requests),
        "streams": dispatcher.num_streams,
        "routing": {"policy": dispatcher.policy, "kv": dispatcher.knowledge.status()},
        "quarantine": dispatcher.quarantine.status(),
        "versions": dispatcher.versions.status(),
        "rollout_trouble": rollout_trouble,
    }


def worker_status(worker: Worker) -> dict[str, Any]:
    """Without its counters."""
    registration, beat = worker.registration, worker.heartbeat
    blocks = beat.blocks
    return {
        "id": worker.id,
        "pid": registration.pid,
        "roles": list(worker.role_names),
        "address": registration.host,
        "model_version": worker.version,
        "software": registration.software_version,
        "incarnation": f"{registration.incarnation:016x}",
        "state": "lost" if worker.lost.is_set() else "draining" if beat.draining else "ready",
        "page_size_tokens": registration.page_size_tokens,
        "blocks": {
            "total": blocks.total,
            "free": blocks.free,
            "cached": blocks.cached,
            "held": blocks.held,
            "leased": blocks.leased,
            "quarantined": blocks.quarantined,
        },
        "running": beat.running_requests,
        "waiting": beat.waiting_requests,
        "waiting_prefill_tokens": beat.waiting_prefill_tokens,
        "measured": {
            "prefill_tokens_per_s": beat.prefill_tokens_per_s,
            "step_s": beat.step_s,
            "handover_bytes_per_s": beat.handover_bytes_per_s,
        },
        "lanes": list(registration.lanes),
        "lanes_in_use": dict(beat.lanes_in_use),
        "heartbeat_age_s": round(time.monotonic() - worker.last_seen_s, 3),
    }
