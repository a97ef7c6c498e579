"""Names of what is counted. One registry, so that a name has one meaning wherever it appears."""

WORKER_COUNTERS: dict[str, str] = {
    "prompt_tokens_computed": "Prompt tokens whose KV this worker computed, recomputation included",
    "prompt_tokens_cached": "Prompt tokens found in the prefix cache",
    "prompt_tokens_loaded": "Prompt tokens whose KV came from host memory, disk or the shared store",
    "prompt_tokens_received": "Prompt tokens whose KV arrived from a peer and passed its checks",
    "generated_tokens": "Tokens sampled",
    "draft_tokens": "Guesses of coming tokens that were verified (speculative decoding)",
    "draft_tokens_accepted": "Of those guesses, the ones that proved right and became output",
    "engine_steps": "Steps of the engine that computed something",
    "engine_step_seconds": "Seconds spent in those steps",
    "preemptions": "Requests that gave back their blocks because the pool ran out, to be computed again",
    "blocks_copied_on_write": "Shared blocks copied because a request had to write into them",
    "decode_steps_without_graph": "Decode steps whose kernels were launched one by one, as no CUDA graph fitted them",
    "kv_blocks_to_host": "Blocks copied from a GPU to where peers read them",
    "kv_blocks_to_device": "Blocks copied to a GPU after a peer's were verified",
    "handover_blocks_offered": "Blocks offered to decode workers",
    "handover_blocks_received": "Blocks pulled from a peer and verified",
    "handover_bytes_received": "Bytes of those blocks",
    "handover_blocks_converted": "Of those blocks, the ones with another page size, dtype or range of heads than here",
    "handover_blocks_direct": "Blocks that a prefill worker of the same host wrote straight into this worker's pool",
    "handover_direct_fallbacks": "Prompts computed into blocks to be pulled although the decode worker lends its own",
    "handover_seconds": "Seconds in which blocks were being pulled",
    "handover_blocks_retried": "Blocks that arrived with bytes other than those offered and were pulled once more",
    "handover_checksum_failures": "Blocks that were wrong the second time, too; recomputed",
    "handover_failures": "Hand-overs that ended early, for whatever reason; the rest was prefilled locally",
    "handover_leases_expired": "Leases that ended before their blocks were released",
    "handover_peer_losses": "Peers declared dead after silence, a sequence gap or a refusal",
    "handover_lane_fallbacks": "Connections to a peer whose better lane failed, so that blocks come by a slower one",
    "local_prefill_fallbacks": "Requests prefilled by a decode worker although a prefill worker had been chosen",
    "kv_blocks_loaded": "Blocks that came from host memory, disk or the shared store",
    "kv_loads_missed": "Blocks that were expected there and did not come; computed instead",
    "kv_saves_dropped": "Blocks that were not kept: handed out again too soon, or too many at once",
    "kv_pins": "Prefixes that were pinned in host memory, on disk or in the shared store",
    "kv_pins_refused": "Prefixes that were to be pinned and that no tier had room to keep",
    "requests_aborted": "Attempts aborted",
    "requests_expired": "Attempts ended by their deadline",
    "requests_refused": "Attempts refused at admission",
}
"""Counters in a worker's heartbeat; the coordinator exports each as baton_worker_<name>_total with label worker."""

TIERS = ("host", "disk", "shared")
TIER_COUNTERS: dict[str, str] = {
    "stored": "Blocks taken in",
    "loaded": "Blocks given back, checked",
    "misses": "Blocks asked for that were not there, or not in time",
    "checksum_failures": "Blocks whose bytes were wrong; never used",
    "evicted": "Blocks that made room for others",
    "refused": "Blocks not taken: no room, too much to write already, not admitted, or the tier is not on",
    "io_errors": "Operations of the file system that failed",
    "timeouts": "Loads that missed their deadline",
}
"""`kv_<tier>_<name>` in a heartbeat; exported as baton_worker_kv_tier_<name>_total with labels worker and tier."""
