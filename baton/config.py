"""Every setting of the system: one dataclass a part, the help text on the field, the default written once.

The command line is derived from these classes (`add_arguments`, `from_arguments`), and `validate` is the one place
where a value is judged. A message says what to change.
"""

import argparse
import dataclasses
import re
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, get_type_hints

from baton.errors import ConfigurationError

T = TypeVar("T")


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its help text; `choices` limits it to those words."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from '512MiB', '2G' or '4096'; units are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ConfigurationError(f"'{text}' is not a size; write a number with a unit, such as 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_cores(text: str) -> frozenset[int]:
    """Core numbers from '0-3,8'."""
    cores: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ConfigurationError(f"--cores is '{text}'; write numbers and ranges, such as 0-3,8")
        cores.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(cores)


class EtcdAddress(NamedTuple):
    endpoints: tuple[str, ...]
    """host:port of each member."""
    prefix: str
    """Of all keys of one cluster; ends in a slash."""


def parse_addresses(text: str, flag: str) -> tuple[str, ...]:
    """Of host:port, separated by commas; an IPv6 address in brackets."""
    if "@" in text:  # not repeated here, nor in a log
        raise ConfigurationError(f"{flag} holds a user or password; every user of this machine sees it there")
    addresses = tuple(part.strip() for part in text.split(","))
    for address in addresses:
        match = re.fullmatch(r"(?:\[[0-9a-fA-F:.%]+\]|[\w.-]+):(\d{1,5})", address)
        if not match or not 0 < int(match[1]) < 65536:
            raise ConfigurationError(f"{flag} has '{address}'; write host:port, several with commas between them")
    return addresses


def parse_etcd(text: str) -> EtcdAddress:
    """From 'etcd://host:port,host:port/prefix'; the prefix is /baton where there is none."""
    if "@" in text:
        raise ConfigurationError("--discovery holds a user or password; write both to a file for --discovery-login")
    match = re.fullmatch(r"etcd://([^/]+)(/.*)?", text)
    if not match:
        raise ConfigurationError(
            f"--discovery is '{text}'; write etcd://host:port[,host:port][/prefix] or kubernetes://[namespace/]service"
        )
    prefix = (match[2] or "").strip("/") or "baton"
    return EtcdAddress(parse_addresses(match[1], "--discovery"), f"/{prefix}/")


KUBERNETES = "kubernetes://"


class KubernetesService(NamedTuple):
    namespace: str
    """Empty: that of the pod."""
    name: str


def parse_kubernetes(text: str) -> KubernetesService:
    """From 'kubernetes://namespace/service' or 'kubernetes://service'."""
    label = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
    match = re.fullmatch(f"{KUBERNETES}(?:({label})/)?({label})", text)
    if not match:
        raise ConfigurationError(f"--discovery is '{text}'; write kubernetes://[namespace/]service")
    return KubernetesService(match[1] or "", match[2])


def parse_otlp(text: str) -> str:
    """Where traces are posted, from 'http://host:port'."""
    match = re.fullmatch(r"(https?://[^/@?#\s]+)(/[^?#@\s]*)?", text)
    if not match:
        raise ConfigurationError(
            "--otlp-endpoint must be http://host:port or https://host:port; what a collector wants to know of its "
            "senders goes into OTEL_EXPORTER_OTLP_HEADERS"
        )
    path = (match[2] or "").rstrip("/")
    return match[1] + (path or "/v1/traces")


class ServiceClass(NamedTuple):
    """How soon requests of one kind want their tokens; 0: no matter."""

    name: str
    ttft_s: float
    itl_s: float


def parse_classes(text: str) -> tuple[ServiceClass, ...]:
    """From 'standard=30/0,interactive=2/0.2'; the first is that of requests that name none."""
    classes: dict[str, ServiceClass] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([a-z][a-z0-9_-]{0,31})=(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)", part.strip())
        if not match or match[1] in classes:
            raise ConfigurationError(
                f"--service-classes has '{part.strip()}'; write name=TTFT/ITL in seconds, such as interactive=2/0.2, "
                "each name once, several with commas between them; 0 sets no target"
            )
        classes[match[1]] = ServiceClass(match[1], float(match[2]), float(match[3]))
    return tuple(classes.values())


@dataclass(frozen=True)
class ModelOptions:
    model: str = setting(
        "demo", "folder of a Hugging Face model, a hub id such as Qwen/Qwen3-0.6B, or 'demo' for the bundled model"
    )
    revision: str = setting("", "branch, tag or commit of a hub id; empty takes the hub's default")
    served_name: str = setting("", "name clients use; empty takes the last part of --model")
    model_version: str = setting(
        "", "label of these weights, by which workers of several versions of one served model are told apart, such as "
        "2026-11 or v2; empty makes one from the weights",
    )  # fmt: skip


@dataclass(frozen=True)
class EngineOptions:
    dtype: str = setting("auto", "dtype of weights and KV", ("auto", "float32", "bfloat16"))
    device: str = setting("auto", "where the model runs; auto takes a GPU that torch finds", ("auto", "cpu", "cuda"))
    convert_kv_dtype: bool = setting(
        False,
        "decode: also take KV of workers with another --dtype, cast to the one here, so that they serve one cluster; "
        "tokens may then differ from what either would give alone",
    )
    page_size: int = setting(16, "tokens in a KV block")
    kv_memory: str = setting(
        "auto",
        "memory for KV blocks, such as 512MiB or 8GiB; auto takes 512MiB on a CPU, on a GPU what --gpu-share leaves",
    )
    gpu_share: float = setting(
        0.45,
        "share of a GPU's memory that a worker takes, weights included, with --kv-memory auto; "
        "the default lets a prefill and a decode worker share one GPU",
    )
    max_model_tokens: int = setting(0, "longest prompt plus output served; 0 takes the model's context length")
    max_batch_tokens: int = setting(512, "tokens computed in one step: decodes first, prefill chunks fill the rest")
    max_running: int = setting(64, "requests computed side by side")
    step_stretch: float = setting(
        1.6,
        "longest step while prompts are computed beside running requests, as a multiple of a step without them; "
        "0 sets no bound",
    )
    speculate: str = setting(
        "ngram",
        "guess coming tokens and verify several in one step, which never changes a stream: ngram guesses what followed "
        "the latest words before (quotes, code, edits, repetition; up to several times faster alone in a batch, and "
        "costs next to nothing where nothing repeats), model asks --draft-model, off never guesses",
        ("off", "ngram", "model"),
    )
    speculate_tokens: int = setting(8, "most guesses for one request in one step; how many pay is measured")
    speculate_running: int = setting(32, "with more requests than this in a step nothing is guessed")
    draft_model: str = setting(
        "", "folder or hub id of a much smaller model with the same vocabulary and tokenizer, for --speculate model"
    )
    draft_kv_memory: str = setting("128MiB", "memory for KV of the draft model; a request without room runs plain")
    deterministic: bool = setting(
        False,
        "give a request the same bits whatever runs beside it, however its prompt is cut and whoever serves it",
    )
    cores: str = setting(
        "", "cores that the computing threads stay on, such as 0-3,8; empty: any, but workers of one `baton serve` "
        "that together take the whole machine get their own",
    )  # fmt: skip
    threads: int = setting(
        0, "CPU threads of one worker; 0 shares the cores between the workers started together, small models get 1"
    )


@dataclass(frozen=True)
class HandoverOptions:
    lanes: str = setting(
        "shm,cma,tcp", "lanes that may carry KV blocks, best first; of several networks the one measured faster"
    )
    lease_s: float = setting(10.0, "seconds offered blocks are kept without a sign of life from the decode worker")
    heartbeat_interval_s: float = setting(0.5, "seconds between signs of life of two workers that hand over")
    heartbeat_timeout_s: float = setting(2.0, "silence after which such a peer counts as dead")
    pull_timeout_s: float = setting(10.0, "longest that one batch of blocks may take to arrive")
    direct_wait_s: float = setting(
        0.0,
        "on one host prefill writes straight into blocks of decode: how long a prompt waits for these before it is "
        "computed into other blocks, to be pulled; 0: blocks are always pulled",
    )


@dataclass(frozen=True)
class TlsOptions:
    """Between Baton's own processes: link, hand-over messages, lane tcp. All or none; see docs/security.md."""

    tls_cert: str = setting("", "PEM certificate of this process: it then talks to others with mutual TLS only")
    tls_key: str = setting("", "PEM private key of that certificate, without a password, for nobody else to read")
    tls_ca: str = setting("", "PEM certificates of the authority that signed those of every process of the cluster")


@dataclass(frozen=True)
class PublicTlsOptions:
    """Towards clients: HTTP and gRPC."""

    public_tls_cert: str = setting("", "PEM certificate for clients to see, and its chain: HTTP and gRPC use TLS only")
    public_tls_key: str = setting(
        "", "PEM private key of that certificate, without a password, for nobody else to read"
    )
    public_tls_client_ca: str = setting("", "PEM certificates of the authority that clients need a certificate of")


@dataclass(frozen=True)
class TierOptions:
    """Where KV blocks live on that the pool has no room for, fastest first."""

    host_kv_memory: str = setting("0", "host memory for KV blocks beside the pool, such as 4GiB; 0: none")
    disk_kv_folder: str = setting("", "folder on a local disk for KV blocks, one worker's alone; empty: none")
    disk_kv_memory: str = setting("16GiB", "what --disk-kv-folder may take of the disk")
    shared_kv_folder: str = setting("", "folder on a file system that workers share, for KV blocks; empty: none")
    shared_kv_memory: str = setting("256GiB", "what --shared-kv-folder may take, all workers together")
    kv_write_policy: str = setting(
        "through",
        "when blocks are written there: through as soon as they are computed, eviction only when the pool is about to "
        "need their room: tiers then hold less of what the pool has, and nothing of it when a worker ends",
        ("through", "eviction"),
    )
    kv_ttl_s: float = setting(
        0.0, "seconds after which blocks there that nobody used are given up; 0: none, in a shared folder a week"
    )
    kv_tenant_share: float = setting(
        1.0, "of each of these, what the requests of one tenant, or without --keys of one cache_salt, may have at "
        "most; others are not limited",
    )  # fmt: skip


@dataclass(frozen=True)
class ProfileOptions:
    output: str = setting("profile", "folder that costs.json and trace.json are written to; created where missing")
    seconds: float = setting(300.0, "time to measure for; more repeats every measurement more often")


@dataclass(frozen=True)
class DiscoveryOptions:
    """How workers find coordinators that nobody names to them."""

    discovery: str = setting(
        "", "where coordinators announce themselves and workers look for them: etcd://host:port[,host:port][/prefix], "
        "one prefix a cluster; or kubernetes://[namespace/]service, whose endpoints with a port named link are "
        "coordinators; empty: nowhere, workers need --coordinator",
    )  # fmt: skip
    discovery_ttl_s: int = setting(5, "seconds after which a coordinator that died is announced no more")
    discovery_login: str = setting("", "file with user:password in one line for etcd; empty: none")
    discovery_ca: str = setting("", "PEM certificates of the authority that signed etcd's; turns TLS on")
    discovery_cert: str = setting("", "PEM certificate shown to etcd; needs its key and --discovery-ca")
    discovery_key: str = setting("", "PEM private key of that certificate, without a password")


DEFAULT_LINK = "127.0.0.1:50052"


@dataclass(frozen=True)
class WorkerOptions:
    worker_id: str = setting("", "stable name, unique in the cluster; empty makes one from host and process id")
    coordinator: str = setting(
        "", "host:port of each coordinator's link, separated by commas; "
        f"empty: those of --discovery, or without it {DEFAULT_LINK}",
    )  # fmt: skip
    host: str = setting("127.0.0.1", "address that other workers reach this one at")
    connect_timeout_s: float = setting(30.0, "seconds to wait for a coordinator before giving up at start")
    drain_timeout_s: float = setting(30.0, "seconds that running requests get to finish after SIGTERM")
    orphan_s: float = setting(
        10.0, "seconds that requests of a dead coordinator go on and wait for their clients at another; 0: not at all"
    )
    monitor_port: int = setting(
        -1, "HTTP port on --host of /health, /ready, for whoever reaches it: probes; 0 takes a free one, -1: none"
    )
    parent_pid: int = setting(0, "exit when this process is gone; 0 watches nobody")


@dataclass(frozen=True)
class FakeOptions:
    """Workers that compute nothing."""

    role: str = setting(
        "prefill+decode", "what they do; prefill+decode makes two pools",
        ("prefill+decode", "prefill", "decode", "mixed"),
    )  # fmt: skip
    workers: int = setting(1, "of each role, all in this process")
    step_ms: float = setting(12.0, "from one token of a stream to the next; 0: as fast as they can be sent")
    prefill_tokens_per_s: float = setting(0.0, "how fast a worker computes prompts, one after the other; 0: in no time")
    blocks: int = setting(65536, "KV blocks of 16 tokens that each says it has")


@dataclass(frozen=True)
class CoordinatorOptions:
    host: str = setting("127.0.0.1", "address of HTTP and gRPC")
    port: int = setting(8000, "HTTP port; 0 takes a free one")
    own_port: int = setting(
        -1, "HTTP port of this process alone (0: a free one) where others listen at --port and --grpc-port, too; "
        "-1: none does",
    )  # fmt: skip
    operator_port: int = setting(
        -1, "HTTP port on 127.0.0.1 without TLS, of the same API, for `baton status`, `baton drain` and the like where "
        "--port takes TLS; 0 takes a free one, -1: none",
    )  # fmt: skip
    grpc_port: int = setting(50051, "gRPC port; 0 takes a free one")
    monitor_port: int = setting(
        -1, "HTTP port on --host of /health, /ready, /metrics and /metrics/load, without TLS or keys, for whoever "
        "reaches it: probes, Prometheus, routers; 0 takes a free one, -1: none",
    )  # fmt: skip
    link_host: str = setting("127.0.0.1", "address where workers connect")
    link_port: int = setting(50052, "port where workers connect; 0 takes a free one")
    advertise_host: str = setting("", "address announced to --discovery for workers to dial; empty: --link-host")
    heartbeat_interval_s: float = setting(0.5, "seconds between signs of life of coordinator and worker")
    heartbeat_timeout_s: float = setting(2.0, "silence after which a worker counts as dead")
    routing: str = setting(
        "cost_based", "how workers are chosen among those that may serve a request, see docs/routing.md",
        choices=("cost_based", "prefix_aware", "session_affinity", "least_loaded", "power_of_two", "round_robin"),
    )  # fmt: skip
    kv_routing: str = setting(
        "exact", "what workers' caches hold: exact, as they tell it; approximate, guessed from what was sent to them",
        choices=("exact", "approximate"),
    )  # fmt: skip
    kv_index_blocks: int = setting(4_000_000, "blocks of all workers that are known at most, about 140 bytes each")
    local_prefill_tokens: int = setting(
        64, "decode prefills by itself when at most this many tokens are uncached; cost_based goes by it until workers "
        "have measured how fast they are",
    )  # fmt: skip
    max_requests: int = setting(1024, "streams in the system; more are refused with 429")
    service_classes: str = setting(
        "standard=30/0,interactive=2/0.2,batch=300/0",
        "kinds of requests, each with the seconds to its first token and from token to token that it should see: "
        "name=TTFT/ITL, 0 for no target. What is predicted to miss them is refused with 429 at once; requests that "
        "name no class are of the first",
    )  # fmt: skip
    max_body_bytes: int = setting(1 << 20, "largest HTTP body or gRPC message accepted")
    max_connections: int = setting(
        8192, "clients' connections open at once, of HTTP and of gRPC each; idle ones of HTTP make room for new ones"
    )
    max_connections_per_address: int = setting(
        0, "of these, of HTTP, those of one address (of IPv6 one /64); 0: any, as all come from one behind a proxy"
    )
    head_timeout_s: float = setting(
        10.0, "longest that a client may take for its TLS handshake, and from the beginning to the end of a "
        "request's head; its body may take 30 s more",
    )  # fmt: skip
    idle_timeout_s: float = setting(
        620.0, "seconds without a request after which a connection is closed; longer than a load balancer's"
    )
    request_timeout_s: float = setting(600.0, "longest that one request may take")
    max_attempts: int = setting(
        3, "tries of one request that living workers may fail; those whose worker died do not count"
    )
    worker_return_s: float = setting(30.0, "seconds that streams wait for a worker when the last that could serve died")
    max_resume_s: float = setting(
        60.0, "longest that a request is kept for a client that hung up and asked for it with X-Baton-Resume-S"
    )
    drain_notice_s: float = setting(
        0.0, "seconds after SIGTERM that new requests are still served, while /ready says no and every answer ends its "
        "connection: what balancers in front take to notice",
    )  # fmt: skip
    drain_timeout_s: float = setting(
        30.0, "seconds that running requests get to finish before others go on with them: after SIGTERM other "
        "coordinators, with those of a draining worker other workers",
    )  # fmt: skip
    rollout: str = setting(
        "", "TOML file with the weights and shadow shares of model versions, read again when it changes; "
        "empty: the oldest version serves",
    )  # fmt: skip
    keys: str = setting(
        "", "TOML file with tenants, their limits and the hashes of their API keys, read again when it changes; "
        "clients then need a key, see docs/tenants.md; empty: whoever reaches the port may ask",
    )  # fmt: skip
    audit_log: str = setting("", "file that a line is appended to for every request of a tenant; only with --keys")
    otlp_endpoint: str = setting(
        "", "where traces of requests go, as OTLP over HTTP, such as http://127.0.0.1:4318; needs baton-serve[otel]; "
        "empty: nowhere",
    )  # fmt: skip
    trace_ratio: float = setting(1.0, "of the requests whose callers have not decided whether they are traced")
    trace_slow_s: float = setting(30.0, "requests that took longer are traced always, as are errors; 0: not for that")
    filter: str = setting(
        "", "plugin that every prompt and answer passes, as MODULE:FACTORY of an installed package; several with "
        "commas between them, in this order, the same at every coordinator; see docs/security.md",
    )  # fmt: skip
    filter_timeout_s: float = setting(5.0, "longest that one call of a filter may take")
    filter_fails: str = setting(
        "closed", "what becomes of text whose filter fails or is late: closed ends its request with an error, open "
        "lets it pass as it is", choices=("closed", "open"),
    )  # fmt: skip
    max_shadows: int = setting(8, "streams of copies that run at shadow versions side by side; more are dropped")
    parent_pid: int = setting(0, "exit when this process is gone; 0 watches nobody")


def default_worker_id(role: str) -> str:
    import os

    return f"{role}-{socket.gethostname()}-{os.getpid()}"


_POSITIVE = {
    "page_size", "gpu_share", "max_batch_tokens", "max_running", "lease_s", "heartbeat_interval_s",
    "heartbeat_timeout_s", "pull_timeout_s", "connect_timeout_s", "drain_timeout_s", "max_requests",
    "max_body_bytes", "request_timeout_s", "max_attempts", "speculate_tokens", "speculate_running", "seconds",
    "discovery_ttl_s", "kv_index_blocks", "workers", "blocks", "filter_timeout_s", "max_connections",
    "head_timeout_s", "idle_timeout_s",
}  # fmt: skip
_NOT_NEGATIVE = {
    "max_model_tokens", "threads", "local_prefill_tokens", "parent_pid", "worker_return_s", "orphan_s", "max_resume_s",
    "max_shadows", "step_ms", "drain_notice_s", "prefill_tokens_per_s", "max_connections_per_address",
}  # fmt: skip
_PORTS = {"port", "grpc_port", "link_port"}
_OPTIONAL_PORTS = {"own_port", "operator_port", "monitor_port"}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_version_label(label: str, where: str) -> None:
    """Raise ConfigurationError for what is no label of a model version."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", label):
        raise ConfigurationError(
            f"{where} has '{label[:80]}'; a version is 1 to 64 letters, digits, dots, dashes and underscores"
        )


def validate(options: object) -> None:
    """Raise ConfigurationError for the first field that cannot work."""
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        name, value = field.name, getattr(options, field.name)
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigurationError(f"{flag(name)} is '{value}'; choose one of {', '.join(choices)}")
        if name in _POSITIVE and not value > 0:
            raise ConfigurationError(f"{flag(name)} is {value}; it must be greater than 0")
        if name in _NOT_NEGATIVE and value < 0:
            raise ConfigurationError(f"{flag(name)} is {value}; it must not be negative")
        if name in _PORTS and not 0 <= value <= 65535:
            raise ConfigurationError(f"{flag(name)} is {value}; a port is 0 to 65535")
        if name in _OPTIONAL_PORTS and not -1 <= value <= 65535:
            raise ConfigurationError(f"{flag(name)} is {value}; a port is 0 to 65535, and -1 none")
    interval, timeout = getattr(options, "heartbeat_interval_s", 0.0), getattr(options, "heartbeat_timeout_s", 1.0)
    if interval * 2 > timeout:
        raise ConfigurationError(
            f"--heartbeat-timeout-s is {timeout}; it must be at least twice --heartbeat-interval-s ({interval})"
        )
    if isinstance(options, DiscoveryOptions):
        if options.discovery.startswith(KUBERNETES):
            parse_kubernetes(options.discovery)
        elif options.discovery:
            parse_etcd(options.discovery)
        if bool(options.discovery_cert) != bool(options.discovery_key) or (
            options.discovery_cert and not options.discovery_ca
        ):
            raise ConfigurationError("--discovery-cert, --discovery-key and --discovery-ca belong together")
    if isinstance(options, TlsOptions):
        _all_or_none(options, ("tls_cert", "tls_key", "tls_ca"))
    if isinstance(options, PublicTlsOptions):
        _all_or_none(options, ("public_tls_cert", "public_tls_key"))
        if options.public_tls_client_ca and not options.public_tls_cert:
            raise ConfigurationError("--public-tls-client-ca needs --public-tls-cert and --public-tls-key")
    if isinstance(options, CoordinatorOptions) and options.audit_log and not options.keys:
        raise ConfigurationError("--audit-log says what tenants did: it needs --keys")
    if isinstance(options, ModelOptions) and options.model_version:
        check_version_label(options.model_version, "--model-version")
    if isinstance(options, WorkerOptions) and options.coordinator:
        parse_addresses(options.coordinator, "--coordinator")
    if isinstance(options, CoordinatorOptions):
        parse_classes(options.service_classes)
        if options.otlp_endpoint:
            parse_otlp(options.otlp_endpoint)
        if not 0 <= options.trace_ratio <= 1:
            raise ConfigurationError(f"--trace-ratio is {options.trace_ratio}; it must be from 0 to 1")
        if not options.trace_slow_s >= 0:
            raise ConfigurationError(f"--trace-slow-s is {options.trace_slow_s}; it must be 0 or more")
    if isinstance(options, TierOptions):
        for text in (options.host_kv_memory, options.disk_kv_memory, options.shared_kv_memory):
            parse_bytes(text)
        if not options.kv_ttl_s >= 0:
            raise ConfigurationError(f"--kv-ttl-s is {options.kv_ttl_s}; it must be 0 or more")
        if not 0 < options.kv_tenant_share <= 1:
            raise ConfigurationError(
                f"--kv-tenant-share is {options.kv_tenant_share}; it must be above 0 and at most 1"
            )
    if isinstance(options, EngineOptions):
        if options.kv_memory != "auto":
            parse_bytes(options.kv_memory)
        parse_bytes(options.draft_kv_memory)
        if options.cores:
            parse_cores(options.cores)
        if (options.speculate == "model") != bool(options.draft_model):
            raise ConfigurationError("--speculate model and --draft-model belong together; give both or neither")
        if options.step_stretch and not options.step_stretch > 1:
            raise ConfigurationError(f"--step-stretch is {options.step_stretch}; it must be 0 or greater than 1")
        if options.deterministic and options.convert_kv_dtype:
            raise ConfigurationError(
                "--deterministic needs KV that this worker would have computed itself; leave --convert-kv-dtype out"
            )
        if options.page_size & (options.page_size - 1):
            raise ConfigurationError(f"--page-size is {options.page_size}; it must be a power of two")


def _all_or_none(options: object, names: tuple[str, ...]) -> None:
    missing = [flag(name) for name in names if not getattr(options, name)]
    if missing and len(missing) < len(names):
        raise ConfigurationError(f"{', '.join(map(flag, names))} belong together; {' and '.join(missing)} is missing")


def add_arguments(parser: argparse.ArgumentParser, *classes: type) -> None:
    """One flag a field, a switch for a bool (False by default); a field that two classes share appears once."""
    seen = {option for action in parser._actions for option in action.option_strings}
    for cls in classes:
        group = parser.add_argument_group(cls.__name__.removesuffix("Options").lower())
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if flag(field.name) in seen:
                continue
            seen.add(flag(field.name))
            if hints[field.name] is bool:
                group.add_argument(flag(field.name), action="store_true", help=field.metadata["help"])
                continue
            group.add_argument(
                flag(field.name),
                type=hints[field.name],
                default=field.default,
                choices=field.metadata.get("choices"),
                help=f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%"),
                metavar=None if field.metadata.get("choices") else hints[field.name].__name__.upper(),
            )


def from_arguments(cls: type[T], arguments: argparse.Namespace) -> T:
    """Build and validate one options object from parsed arguments."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    options = cls(**{field.name: getattr(arguments, field.name) for field in fields})
    validate(options)
    return options


def to_arguments(options: object) -> list[str]:
    """The command line that `from_arguments` would read as these options: only what differs from the defaults."""
    words: list[str] = []
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if value != field.default:
            words += [flag(field.name)] if value is True else [flag(field.name), str(value)]
    return words
