"""Names of what is counted. One registry, so that a name has one meaning wherever it appears."""

WORKER_COUNTERS: dict[str, str] = {
    "prompt_tokens_computed": "Prompt tokens whose KV this worker computed, recomputation included",
    "prompt_tokens_cached": "Prompt tokens found in the prefix cache",
    "prompt_tokens_received": "Prompt tokens whose KV arrived from a peer and passed its checks",
    "generated_tokens": "Tokens sampled",
    "engine_steps": "Steps of the engine that computed something",
    "engine_step_seconds": "Seconds spent in those steps",
    "preemptions": "Requests that gave back their blocks because the pool ran out, to be computed again",
    "blocks_copied_on_write": "Shared blocks copied because a request had to write into them",
    "handover_blocks_offered": "Blocks offered to decode workers",
    "handover_blocks_received": "Blocks pulled from a peer and verified",
    "handover_bytes_received": "Bytes of those blocks",
    "handover_seconds": "Seconds in which blocks were being pulled",
    "handover_blocks_retried": "Blocks that arrived with bytes other than those offered and were pulled once more",
    "handover_checksum_failures": "Blocks that were wrong the second time, too; recomputed",
    "handover_failures": "Hand-overs that ended early, for whatever reason; the rest was prefilled locally",
    "handover_leases_expired": "Leases that ended before their blocks were released",
    "handover_peer_losses": "Peers declared dead after silence, a sequence gap or a refusal",
    "local_prefill_fallbacks": "Requests prefilled by a decode worker although a prefill worker had been chosen",
    "requests_aborted": "Attempts aborted",
    "requests_expired": "Attempts ended by their deadline",
    "requests_refused": "Attempts refused at admission",
}
"""Counters in a worker's heartbeat; the coordinator exports each as baton_worker_<name>_total with label worker."""
