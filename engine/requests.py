"""What goes into an engine and what comes out: plain data, no behaviour."""

from dataclasses import dataclass, field
from enum import Enum

from baton.name_changes import Changed


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Every default is already resolved by whoever builds this."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """Random numbers are a function of (seed, position in the output) alone, so another attempt draws the same."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    max_tokens: int = 16
    """Output tokens of the stream as a whole, those of earlier attempts included."""
    stop_token_ids: tuple[int, ...] = ()
    """End-of-sequence ids included, unless the client ignores them."""
    logprobs: int | None = None
    """Number of alternatives to report beside the chosen token; None reports nothing."""


class Handover(Enum):
    """What a request has to do with another worker's pool."""

    NONE = "none"
    """Prefill and decode here."""
    GIVE = "give"
    """Prefill here, sample one token, keep the blocks until the lease is released."""
    TAKE = "take"
    """Reserve blocks for the prompt, wait for `Engine.receive`, then decode."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Blocks of another worker's pool that a GIVE request is computed into, instead of blocks of this one.

    They belong to that worker, which leaves them alone until it hears that the request has ended here.
    """

    block_ids: tuple[int, ...]
    """For the whole prompt, numbered as the runner's pool numbers them: none is below its `num_blocks`."""
    num_cached_blocks: int
    """The first ones hold their KV already, others use them, and they are only read. At least one block is not."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Leading tokens whose KV another worker should have, and what it takes to get it."""

    num_tokens: int
    wait_s: float
    """Until the first block is on its way."""
    block_s: float


@dataclass(frozen=True, slots=True)
class Standing:
    """What a request's turn depends on where several tenants share an engine: see `engine.fair_queue`."""

    tenant: str = ""
    """Of no meaning but equality."""
    weight: float = 1.0
    """Of a tenant that has twice as much, twice as many tokens are computed, while both want more."""
    priority: int = 0
    """The greatest goes first."""
    kv_share: float = 0.0
    """Of the blocks, what the tenant's requests may hold while others wait; 0: no bound."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One attempt at one stream of tokens."""

    id: str
    token_ids: tuple[int, ...]
    """The prompt, then the output tokens that earlier attempts delivered."""
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_root: bytes
    """`baton.block_names.root_name` of this model, adapter and tenant."""
    handover: Handover = Handover.NONE
    placement: Placement | None = None
    elsewhere: Elsewhere | None = None
    """Not of a TAKE request: its giver fetches what it would have to compute."""
    tenant: bytes = b""
    """`baton.block_names.tenant_name`: whose its blocks are in the store."""
    standing: Standing = Standing()


class EndReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    HANDED_OVER = "handed_over"
    """A GIVE request sampled its token; its blocks are now held by the lease of the same id."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own distribution, before temperature, penalties and bias."""

    chosen: float
    alternative_ids: tuple[int, ...] = ()
    """Likeliest first."""
    alternative_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    request_id: str
    index: int
    """Position in the output stream; tokens delivered by earlier attempts count."""
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    request_id: str
    reason: EndReason
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Started:
    """A request left the waiting line."""

    request_id: str
    num_cached_tokens: int
    """Leading tokens found in the prefix cache."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """A request has its blocks; those after the cached ones wait to be written from outside, until `Engine.receive`."""

    request_id: str
    block_ids: tuple[int, ...]
    num_cached_blocks: int
    stored: tuple[bytes, ...]
    """Names of the blocks after the cached ones that are to be loaded from the store."""
    tenant: bytes
    """Whose those blocks are."""
    from_peer: bool
    """What follows comes from another worker, once in the life of a TAKE request. Otherwise it is computed here."""
    elsewhere: tuple[bytes, ...] = ()
    """Names of the blocks after the stored ones that are to be fetched from another worker, as far as it has them."""
    compute_s: float = 0.0
    """What it would take to compute those that it should have; 0 while that is unknown."""


@dataclass(frozen=True, slots=True)
class LeasedBlocks:
    """Blocks of the prefix cache that keep their content until their lease is released."""

    block_ids: tuple[int, ...]
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Named:
    """A block that the store is to keep: its content is final as long as it has this generation."""

    name: bytes
    block_id: int
    generation: int
    tenant: bytes = b""


@dataclass(frozen=True, slots=True)
class Computed:
    """Blocks of a GIVE request whose content is final, in order.

    While a step runs they may be stated for their leading layers first, and then again for more; see `Engine.step`.
    """

    request_id: str
    first_block: int
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    """None for blocks of a placement: they have those of their own pool."""
    num_tokens: int
    """KV positions final so far."""
    last: bool
    """Nothing more follows."""
    num_layers: int | None = None
    """Only these leading layers are final. None: all, and these blocks are not stated again."""

    @property
    def is_whole(self) -> bool:
        return self.num_layers is None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """All that one step changed, in the order in which a reader should apply it."""

    started: list[Started] = field(default_factory=list)
    reserved: list[Reserved] = field(default_factory=list)
    named: list[Named] = field(default_factory=list)
    """Only where there is a store."""
    computed: list[Computed] = field(default_factory=list)
    tokens: list[TokenOutput] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    cached: Changed | None = None
    """Names that the prefix cache has come to hold, or lost, since the output before; only while they are watched."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """free + cached + held + leased + quarantined = total, at every moment."""

    total: int
    free: int
    cached: int
    held: int
    leased: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class EngineRates:
    """As measured lately, under whatever load there was; 0: not yet."""

    prompt_tokens_per_s: float
    """In steps that compute prompts."""
    token_s: float
    """From one token of a running request to its next."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    blocks: BlockCounts
    running: int
    waiting: int
    waiting_prefill_tokens: int
