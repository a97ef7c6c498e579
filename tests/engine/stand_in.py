"""A runner without a model, and the world around an engine: both notice every wrong byte.

The "KV" of a position is a number chained over all tokens up to it and over what else it may depend on (the cache
root, and for a prompt beyond the shareable length that length, as with dynamic rotary scaling). The next token is a
function of the last number, so each stream has one undisturbed form that can be computed without an engine.
"""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from random import Random

from baton.block_names import root_name
from engine.block_tables import fence_id
from engine.blocks import BlockAllocator, BlockState, Owner, OwnerKind
from engine.engine import Engine
from engine.plan import PENDING, DraftRequest, OnLayer, PlannedSequence, Sampled, StepPlan, StepResult
from engine.requests import (
    EndReason,
    EngineRequest,
    Handover,
    LeasedBlocks,
    Named,
    Placement,
    SamplingParams,
    Standing,
    StepOutput,
)
from engine.scheduler import Scheduler
from engine.sequence import Phase, Sequence
from tests.told import Told

PAGE = 4
LAYERS, GROUPS = 5, (2, 4, 5)
VOCABULARY = 40
ROOT = root_name("stand-in")
LONG_PROMPT = 26
GARBAGE = -7
BEYOND = 10
"""Tokens after its end that each stream is known for: a guess may go on where the stream does not."""


def shareable_tokens(num_prompt_tokens: int) -> int:
    return 10 if num_prompt_tokens > LONG_PROMPT else 1 << 40


def next_kv(parent: int, position: int, token_id: int, num_prompt_tokens: int) -> int:
    private = position >= shareable_tokens(num_prompt_tokens)
    return hash((parent, token_id, num_prompt_tokens if private else 0))


def kv_of(cache_root: bytes, token_ids: list[int], num_prompt_tokens: int) -> list[int]:
    values, parent = [], int.from_bytes(cache_root[:7], "little")
    for position, token_id in enumerate(token_ids):
        parent = next_kv(parent, position, token_id, num_prompt_tokens)
        values.append(parent)
    return values


def sampled_token(kv_value: int) -> int:
    return hash((kv_value, 1)) % VOCABULARY


@dataclass
class Stream:
    """What a client must see of one request."""

    request: EngineRequest
    outputs: list[int]
    reason: EndReason
    kv: list[int]
    endless: list[int]
    """`outputs`, and BEYOND tokens more."""

    @property
    def tokens(self) -> list[int]:
        return [*self.request.token_ids[: self.request.num_prompt_tokens], *self.outputs]


def undisturbed(request: EngineRequest, max_model_tokens: int) -> Stream:
    """The stream as a function of the prompt alone. `request.token_ids` past the prompt are not looked at."""
    prompt, sampling = list(request.token_ids[: request.num_prompt_tokens]), request.sampling
    values = kv_of(request.cache_root, prompt, len(prompt))
    outputs: list[int] = []
    length, reason = 0, None
    while reason is None or len(outputs) < length + BEYOND:
        token = sampled_token(values[-1])
        values.append(next_kv(values[-1], len(values), token, len(prompt)))
        outputs.append(token)
        if reason is None:
            length = len(outputs)
            if token in sampling.stop_token_ids and length >= sampling.min_tokens:
                reason = EndReason.STOP
            elif length >= sampling.max_tokens or len(prompt) + length >= max_model_tokens:
                reason = EndReason.LENGTH
    return Stream(request, outputs[:length], reason, values, outputs)


@dataclass
class Flight:
    """A step that was launched and takes effect when its result is asked for, which is as late as can be."""

    runner: "StandInRunner"
    plan: StepPlan
    live: list[Sequence | None]
    generations: list[int]
    """Of the sources of copies."""

    groups: tuple[int, ...] = ()
    landed: StepResult | None = None

    def layers(self) -> Iterator[int]:
        """KV is on the device by then, as far as the stand-in goes."""
        if any(len(sequence.token_ids) > 1 for sequence in self.plan.sequences):
            self.landed = self.runner.land(self)
            yield from self.groups

    def result(self) -> StepResult:
        return self.runner.land(self) if self.landed is None else self.landed


class StandInRunner:
    """Executes plans on numbers and refuses every plan that reads wrong KV or writes where others can read."""

    def __init__(self, max_model_tokens: int) -> None:
        self.max_model_tokens = max_model_tokens
        self.kv: dict[tuple[int, int], int] = {}
        self.streams: dict[str, Stream] = {}
        self.plans: list[StepPlan] = []
        self.scheduler: Scheduler | None = None
        self.num_ahead = 0
        """Steps launched while another was in flight."""
        self.num_in_vain = 0
        """Sequences that had ended when their step took effect."""
        self._flights: deque[Flight] = deque()
        self._latest = StepResult({})

    def expect(self, request: EngineRequest) -> Stream:
        self.streams[request.id] = undisturbed(request, self.max_model_tokens)
        return self.streams[request.id]

    def write(self, block_ids: list[int], position: int, value: int) -> None:
        self.kv[block_ids[position // PAGE], position % PAGE] = value

    def read(self, block_ids: list[int], position: int) -> int | None:
        return self.kv.get((block_ids[position // PAGE], position % PAGE))

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        result = self.launch(plan).result()
        for num_layers in range(1, LAYERS + 1):
            if on_layer is not None:
                on_layer(num_layers)
        return result

    def launch(self, plan: StepPlan, layer_groups: Many[int] = ()) -> Flight:
        self.plans.append(plan)
        assert not {source for source, _ in plan.copies} & {target for _, target in plan.copies}
        assert len({target for _, target in plan.copies}) == len(plan.copies)
        self._check_exclusive(plan)
        self._check_known(plan)
        live: list[Sequence | None] = [None] * len(plan.sequences)
        generations = []
        if self.scheduler is not None:
            live = [self.scheduler._sequences[sequence.request_id] for sequence in plan.sequences]
            generations = [self.scheduler._allocator.generations[source] for source, _ in plan.copies]
        frozen = [replace(sequence, block_ids=list(sequence.block_ids)) for sequence in plan.sequences]
        self._flights.append(Flight(self, StepPlan(frozen, list(plan.copies)), live, generations, tuple(layer_groups)))
        return self._flights[-1]

    def land(self, flight: Flight) -> StepResult:
        assert self._flights.popleft() is flight, "results are taken in the order of the launches"
        for source, target in flight.plan.copies:
            for offset in range(PAGE):
                self.kv[target, offset] = self.kv[source, offset]
        if self.scheduler is not None:
            now = [self.scheduler._allocator.generations[source] for source, _ in flight.plan.copies]
            assert now == flight.generations, "the source of a copy was handed out before the copy was made"
        sampled = {}
        for sequence, live in zip(flight.plan.sequences, flight.live, strict=True):
            ended = live is not None and live.phase is Phase.ENDED
            tokens = self._stray(sequence) if ended else self._compute(sequence)
            if sequence.sample is not None:
                sampled[sequence.request_id] = [Sampled(token_id) for token_id in tokens]
        self._latest = StepResult(sampled)
        return self._latest

    def _compute(self, sequence: PlannedSequence) -> list[int]:
        """What the step samples of this sequence, if it samples."""
        stream = self.streams[sequence.request_id]
        end = sequence.start + len(sequence.token_ids) - sequence.num_drafts
        known, guesses = sequence.token_ids[: end - sequence.start], sequence.token_ids[end - sequence.start :]
        if known == [PENDING]:
            known = [token.token_id for token in self._latest.sampled[sequence.request_id]]
        assert known == stream.tokens[sequence.start : end]
        assert sequence.rope_length == stream.request.num_prompt_tokens
        for position in range(sequence.start):
            assert self.read(sequence.block_ids, position) == stream.kv[position], "wrong KV is read"
        for position in range(sequence.start, end):
            self.write(sequence.block_ids, position, stream.kv[position])
        tokens = [sampled_token(stream.kv[end - 1])]
        for position, guess in enumerate(guesses, end):
            right = len(tokens) == position - end + 1 and guess == tokens[-1]
            self.write(sequence.block_ids, position, stream.kv[position] if right else GARBAGE)
            if right:
                tokens.append(sampled_token(stream.kv[position]))
        return tokens

    def _stray(self, sequence: PlannedSequence) -> list[int]:
        """The request ended while the step was in flight: it reads whatever is there, and writes all the same."""
        self.num_in_vain += 1
        assert self.scheduler is not None
        for position in range(sequence.start, sequence.start + len(sequence.token_ids)):
            block = sequence.block_ids[position // PAGE]
            assert self.scheduler._allocator._states[block] is BlockState.QUARANTINED
            assert not self.scheduler._allocator.is_cached(block)
            self.write(sequence.block_ids, position, GARBAGE)
        return [0]

    def _check_known(self, plan: StepPlan) -> None:
        """Whatever is planned is known to the host or will be on the device."""
        before = {}
        if self._flights:
            self.num_ahead += 1
            (flight,) = self._flights
            before = {sequence.request_id: sequence for sequence in flight.plan.sequences if sequence.sample}
            for sequence in before.values():
                assert sequence.sample is not None
                assert not sequence.num_drafts
                assert not sequence.sample.adjusts(sequence.sample_index)
        for sequence in plan.sequences:
            pending = PENDING in sequence.token_ids
            assert not pending or (sequence.token_ids == [PENDING] and sequence.request_id in before)
            request = self.streams[sequence.request_id].request
            longest = min(request.num_prompt_tokens + request.sampling.max_tokens, self.max_model_tokens)
            assert sequence.start + len(sequence.token_ids) < longest, "the last token of a stream is never computed"
            if sequence.sample is not None:
                end = sequence.start + len(sequence.token_ids) - sequence.num_drafts
                assert sequence.sample_index == end - sequence.rope_length
                assert len(sequence.sample.output_token_ids) == sequence.sample_index - pending
            else:
                assert not sequence.num_drafts

    def _check_exclusive(self, plan: StepPlan) -> None:
        """No block has two writers, or a writer and a reader, whoever they are."""
        writer: dict[int, str] = {}
        for sequence in plan.sequences:
            end = sequence.start + len(sequence.token_ids)
            for index in range(sequence.start // PAGE, (end - 1) // PAGE + 1):
                block = sequence.block_ids[index]
                assert writer.setdefault(block, sequence.request_id) == sequence.request_id
                if self.scheduler is not None and block < self.scheduler._allocator.num_blocks:
                    assert self.scheduler._allocator.is_private(block)
        assert not writer.keys() & {source for source, _ in plan.copies}
        for sequence in plan.sequences:
            for block in sequence.block_ids:
                assert writer.get(block, sequence.request_id) == sequence.request_id


class StandInDrafter:
    """Guesses for everybody, asked for or not, right and wrong as `pattern` says, one list after the other."""

    def __init__(self, runner: StandInRunner) -> None:
        self.pattern: list[list[bool]] = []
        self.known: dict[str, list[int]] = {}
        """Output tokens of the requests that have not ended, as their clients saw them."""
        self.asked: list[DraftRequest] = []
        self.num_observed = 0
        self._runner = runner
        self._next = 0

    def wants_drafts(self, num_requests: int) -> bool:
        assert num_requests > 0
        return bool(self.pattern)

    def propose(self, requests: list[DraftRequest]) -> dict[str, list[int]]:
        assert requests
        self.asked = requests
        for request in requests:
            stream = self._runner.streams[request.request_id]
            assert request.request_id in self.known, "nobody who has ended is asked for"
            assert request.token_ids[: request.num_prompt_tokens] == stream.tokens[: request.num_prompt_tokens]
            limit = request.num_prompt_tokens + request.sample.params.max_tokens
            longest = min(limit, self._runner.max_model_tokens)
            assert 1 <= request.max_drafts == longest - 1 - len(request.token_ids)
        return {request_id: self._guesses(request_id) for request_id in self.known}

    def _guesses(self, request_id: str) -> list[int]:
        self._next += 1
        pattern = self.pattern[self._next % len(self.pattern)]
        coming = self._runner.streams[request_id].endless[len(self.known[request_id]) :]
        # Past the end of what is known even a right guess would be chance: the engine must have cut it off.
        return [token if right else (token + 1) % VOCABULARY for token, right in zip(coming, pattern, strict=False)] + [
            0
        ] * (len(pattern) - len(coming))

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        assert {s.request_id for s in plan.sequences if s.sample is not None} == result.sampled.keys()
        assert seconds >= 0
        self.num_observed += 1

    def forget(self, request_id: str) -> None:
        del self.known[request_id]


@dataclass
class Announced:
    """Blocks of a GIVE request that a reader may look at."""

    block_ids: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    num_tokens: int = 0
    last: bool = False


class StandInStore:
    """Keeps copies of named blocks, as many as `keeps` says, and would load whatever it has."""

    def __init__(self, keeps: float) -> None:
        self.keeps = keeps
        self.kv: dict[bytes, list[int]] = {}
        self._random = Random(1)

    def worth_loading(self, names: Many[bytes], compute_s: float | None) -> int:
        assert compute_s is None or compute_s > 0
        return next((index for index, name in enumerate(names) if name not in self.kv), len(names))

    def save(self, named: Named, runner: StandInRunner) -> None:
        if self._random.random() < self.keeps:
            self.kv[named.name] = [runner.kv[named.block_id, offset] for offset in range(PAGE)]


class World:
    """An engine, the clients that check its streams, the giver of TAKE requests and the reader of GIVE requests."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        max_batch_tokens: int = 16,
        max_running: int = 4,
        max_model_tokens: int = 64,
        max_waiting: int = 64,
        look_ahead: bool = False,
        keeps: float = 0.0,
        save_at_eviction: bool = False,
        early: bool = False,
    ) -> None:
        """`keeps`: share of the named blocks that the store keeps. `early`: hear what a step says while it runs."""
        self.max_model_tokens = max_model_tokens
        self.runner = StandInRunner(max_model_tokens)
        self.drafter = StandInDrafter(self.runner)
        self.store = StandInStore(keeps)
        self.engine = Engine(
            self.runner,
            num_blocks=num_blocks,
            page_size=PAGE,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            max_model_tokens=max_model_tokens,
            shareable_tokens=shareable_tokens,
            max_waiting=max_waiting,
            drafter=self.drafter,
            look_ahead=look_ahead,
            store=self.store,
            save_at_eviction=save_at_eviction,
            layer_groups=GROUPS,
        )
        self.early = early
        self.allocator: BlockAllocator = self.engine._scheduler._allocator
        self.runner.scheduler = self.engine._scheduler
        self.outputs: dict[str, list[int]] = {}
        self.started: list[str] = []
        self.ended: dict[str, EndReason] = {}
        self.reserved: dict[str, list[int]] = {}
        """Blocks that a giver may write into: RECEIVING or quarantined."""
        self.from_peer: set[str] = set()
        """Of these, the ones that wait for a giver."""
        self.num_cached: dict[str, int] = {}
        self.num_stored = 0
        """Blocks that were to be loaded."""
        self.announced: dict[str, Announced] = {}
        self.announced_layers: list[tuple[str, int, int]] = []
        """(request id, number of leading blocks, of how many layers), as they come."""
        self.leases: set[str] = set()
        self.readers: dict[str, tuple[LeasedBlocks, list[int]]] = {}
        """Of the prefix cache: what each has leased, and the KV in it."""
        self.quarantined: set[str] = set()
        self.aborting: set[str] = set()
        self.fenced: dict[str, list[int]] = {}
        """Blocks of requests that went on without them: a giver may write there until `lower_fence`."""
        self.num_placed = 0
        self.told: Told | None = None
        """What somebody knows of the prefix cache."""

    def add(self, request: EngineRequest) -> Stream:
        stream = self.runner.expect(request)
        self.engine.add(request)
        self.outputs[request.id] = list(request.token_ids[request.num_prompt_tokens :])
        self.drafter.known[request.id] = self.outputs[request.id]
        return stream

    def step(self) -> StepOutput:
        """What the engine returned."""
        output = self.engine.step(self._note if self.early else None)
        self._note(output)
        self.check()
        assert self.told is None or self.told.names == self.engine._scheduler.tables.cache._block_of.keys()
        return output

    def watch_cache(self) -> None:
        """From now on somebody wants to know what the prefix cache holds; once more, if somebody did."""
        held = self.engine.watch_cache()
        if self.told is not None:
            self.told.hear(held.before)
            assert self.told.names == set(held.names)
        self.told = Told(held)

    def _note(self, output: StepOutput) -> None:
        self.started += [started.request_id for started in output.started]
        assert len(set(self.started)) == len(self.started)
        for reserved in output.reserved:
            stream = self.runner.streams[reserved.request_id]
            assert reserved.from_peer or reserved.stored or reserved.elsewhere
            assert not (reserved.from_peer and reserved.elsewhere)
            assert stream.request.handover is Handover.TAKE or not reserved.from_peer
            for index, name in enumerate(reserved.stored, reserved.num_cached_blocks):
                assert self.store.kv[name] == stream.kv[index * PAGE : (index + 1) * PAGE], (
                    "the store has another block"
                )
            self.reserved[reserved.request_id] = list(reserved.block_ids)
            self.num_cached[reserved.request_id] = reserved.num_cached_blocks
            if reserved.from_peer:
                self.from_peer.add(reserved.request_id)
            self.num_stored += len(reserved.stored)
        for named in output.named:
            if self.allocator.generations[named.block_id] == named.generation:  # else it was handed out again
                self.store.save(named, self.runner)
        for computed in output.computed:
            num_blocks = computed.first_block + len(computed.block_ids)
            self.announced_layers.append((computed.request_id, num_blocks, computed.num_layers or LAYERS))
            if not computed.is_whole:
                continue
            announced = self.announced.setdefault(computed.request_id, Announced())
            assert computed.first_block == len(announced.block_ids)
            assert not announced.last
            announced.block_ids += computed.block_ids
            announced.generations += computed.generations
            announced.num_tokens, announced.last = computed.num_tokens, computed.last
        for token in output.tokens:
            stream, seen = self.runner.streams[token.request_id], self.outputs[token.request_id]
            assert token.request_id not in self.ended
            assert token.index == len(seen)
            assert token.token_id == stream.outputs[token.index]
            seen.append(token.token_id)
        if self.told is not None:
            self.told.hear(output.cached)
        assert self.told is not None or output.cached is None
        for ended in output.ended:
            self._note_end(ended.request_id, ended.reason, ended.num_output_tokens)
            assert ended.request_id not in self.drafter.known, "the drafter was told"

    def _note_end(self, request_id: str, reason: EndReason, num_output_tokens: int) -> None:
        assert request_id not in self.ended
        self.ended[request_id] = reason
        stream, seen = self.runner.streams[request_id], self.outputs[request_id]
        assert num_output_tokens == len(seen)
        if reason is EndReason.HANDED_OVER:
            announced = self.announced[request_id]
            assert len(seen) == len(stream.request.token_ids) - stream.request.num_prompt_tokens + 1
            assert announced.last
            assert announced.num_tokens == len(stream.request.token_ids)
        elif reason is EndReason.ABORTED:
            assert request_id in self.aborting
            return  # `abort` noted the lease
        else:
            assert (seen, reason) == (stream.outputs, stream.reason)
        self._note_lease(request_id)

    def _note_lease(self, request_id: str) -> None:
        if self.runner.streams[request_id].request.placement is not None:
            self.check()  # the last look: the blocks are the reader's
            self.announced.pop(request_id, None)
        elif request_id in self.announced:
            self.leases.add(request_id)

    def check(self) -> None:
        """What holds between any two events."""
        self.engine.check_idle()
        lines = [account.line for account in self.engine._scheduler._queue._accounts.values()]
        for line in (*lines, self.engine._scheduler._running):
            assert line == sorted(line, key=lambda sequence: sequence.arrival)
        counts = self.allocator.counts()
        parts = (counts.free, counts.cached, counts.held, counts.leased, counts.quarantined)
        assert min(parts) >= 0
        assert sum(parts) == counts.total
        for request_id, announced in self.announced.items():
            kv = self.runner.streams[request_id].kv
            if self.runner.streams[request_id].request.placement is None:
                assert self.allocator.generations[announced.block_ids].tolist() == announced.generations
            for position in range(announced.num_tokens):
                assert self.runner.read(announced.block_ids, position) == kv[position], "a reader would be given this"
        for request_id in self.quarantined:
            assert self.allocator.owns_any(Owner(OwnerKind.QUARANTINE, request_id))
        for leased, values in self.readers.values():
            assert tuple(self.allocator.generations[list(leased.block_ids)].tolist()) == leased.generations
            for position, value in enumerate(values):
                assert self.runner.read(list(leased.block_ids), position) == value, "a reader would be given this"

    # -- Readers of the prefix cache -------------------------------------------------------------------------------

    def lease_prefix(self, reader: str, request_id: str) -> int:
        """What is cached of the tokens of a request, for a reader. Returns how many blocks."""
        stream = self.runner.streams[request_id]
        tables = self.engine._scheduler.tables
        names = tables.names(stream.request.cache_root, stream.request.num_prompt_tokens).extend(stream.tokens)
        leased = self.engine.lease(reader, names)
        assert reader not in self.readers or not leased.block_ids
        if leased.block_ids:
            self.readers[reader] = leased, stream.kv[: len(leased.block_ids) * PAGE]
        return len(leased.block_ids)

    def end_reader(self, reader: str, expired: bool) -> None:
        if expired:
            assert self.engine.quarantine_lease(reader)
            self.check()
        assert self.engine.release_lease(reader) != expired
        assert self.engine.resolve(reader) == expired
        del self.readers[reader]

    # -- The giver of a TAKE request, and the store ---------------------------------------------------------------

    def deliver(self, request_id: str, num_tokens: int) -> None:
        """Write the right KV of the first positions; those before the cached blocks' end are never written."""
        stream = self.runner.streams[request_id]
        for position in range(self.num_cached[request_id] * PAGE, num_tokens):
            self.runner.write(self.reserved[request_id], position, stream.kv[position])

    def scribble(self, request_id: str) -> None:
        """What a stray or torn write does to every block that it may still reach."""
        behind = self.reserved.get(request_id, [])[self.num_cached.get(request_id, 0) :]
        for block in behind + self.fenced.get(request_id, []):
            for offset in range(PAGE):
                self.runner.kv[block, offset] = GARBAGE

    def receive(
        self, request_id: str, num_tokens: int, with_first_token: bool, same_bits: bool = True, fenced: bool = False
    ) -> bool:
        request = self.runner.streams[request_id].request
        index = len(request.token_ids) - request.num_prompt_tokens
        sampled = with_first_token and request_id in self.from_peer
        first_token = self.runner.streams[request_id].outputs[index] if sampled else None
        received = self.engine.receive(request_id, num_tokens, first_token, same_bits=same_bits, fenced=fenced)
        assert received == (request_id in self.reserved and request_id not in self.quarantined)
        if received:
            blocks = self.reserved.pop(request_id)
            self.from_peer.discard(request_id)
            if fenced:
                self.fenced[request_id] = blocks[max(self.num_cached[request_id], num_tokens // PAGE) :]
        return received

    def lower_fence(self, request_id: str) -> None:
        del self.fenced[request_id]
        assert self.engine.resolve(fence_id(request_id))
        assert not self.engine.resolve(fence_id(request_id))

    def receive_all(self, request_id: str, with_first_token: bool = True) -> bool:
        num_tokens = len(self.runner.streams[request_id].request.token_ids)
        self.deliver(request_id, num_tokens)
        return self.receive(request_id, num_tokens, with_first_token)

    # -- The taker of a GIVE request whose blocks it lends -----------------------------------------------------------

    def placed(self, request: EngineRequest, num_cached_blocks: int) -> EngineRequest:
        """The same request, to be computed into blocks of another pool, of which the first have their KV."""
        first = self.allocator.num_blocks + 100 * self.num_placed
        self.num_placed += 1
        block_ids = tuple(range(first, first + -(-len(request.token_ids) // PAGE)))
        stream = self.runner.expect(request)
        for position in range(num_cached_blocks * PAGE):
            self.runner.write(list(block_ids), position, stream.kv[position])
        return replace(request, placement=Placement(block_ids, num_cached_blocks))

    # -- Ends ----------------------------------------------------------------------------------------------------

    def abort(self, request_id: str) -> bool:
        aborted = self.engine.abort(request_id)
        if aborted:
            self.aborting.add(request_id)
            self._note_lease(request_id)
            if request_id in self.reserved:
                self.quarantined.add(request_id)
        return aborted

    def release_lease(self, request_id: str) -> bool:
        released = self.engine.release_lease(request_id)
        assert released == (request_id in self.leases)
        if released:
            self.leases.remove(request_id)
            del self.announced[request_id]
        return released

    def quarantine_lease(self, request_id: str) -> bool:
        quarantined = self.engine.quarantine_lease(request_id)
        assert quarantined == (request_id in self.leases)
        if quarantined:
            self.leases.remove(request_id)
            self.quarantined.add(request_id)
        return quarantined

    def resolve(self, request_id: str) -> bool:
        resolved = self.engine.resolve(request_id)
        assert resolved == (request_id in self.quarantined)
        if resolved:
            self.quarantined.remove(request_id)
            self.reserved.pop(request_id, None)
            self.from_peer.discard(request_id)
            self.announced.pop(request_id, None)
        return resolved

    def run_to_the_end(self, max_steps: int = 2000) -> None:
        """The outside answers everything at once; whatever was not aborted must end, and right."""
        for request_id in list(self.quarantined):
            self.resolve(request_id)
        for request_id in list(self.fenced):
            self.lower_fence(request_id)
        for reader in list(self.readers):
            self.end_reader(reader, expired=False)
        for _ in range(max_steps):
            for request_id in list(self.reserved):
                self.receive_all(request_id)
            for request_id in list(self.leases):
                self.release_lease(request_id)
            if not self.engine.has_work():
                break
            self.step()
        self.assert_idle()

    def assert_idle(self) -> None:
        """The pool is whole, the scheduler is empty, and everybody knows what is cached."""
        assert not self.engine.has_work()
        assert self.told is None or self.told.names == self.engine._scheduler.tables.cache._block_of.keys()
        assert self.outputs.keys() == self.ended.keys()
        assert not self.drafter.known
        assert not self.runner._flights
        assert self.drafter.num_observed == len(self.runner.plans) == self.engine.counters["engine_steps"]
        assert self.engine._scheduler.is_empty()
        counts = self.allocator.counts()
        assert (counts.held, counts.leased, counts.quarantined) == (0, 0, 0)
        assert counts.free + counts.cached == counts.total
        load = self.engine.load()
        assert (load.running, load.waiting, load.waiting_prefill_tokens) == (0, 0, 0)
        self.engine.check_idle()


def make_request(
    request_id: str,
    prompt: list[int],
    handover: Handover = Handover.NONE,
    *,
    max_tokens: int = 4,
    min_tokens: int = 0,
    stop: tuple[int, ...] = (),
    num_delivered: int = 0,
    cache_root: bytes = ROOT,
    standing: Standing = Standing(),  # noqa: B008 - frozen
) -> EngineRequest:
    """`num_delivered` output tokens came from earlier attempts."""
    sampling = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stop)
    request = EngineRequest(request_id, tuple(prompt), len(prompt), sampling, cache_root, handover, standing=standing)
    outputs = undisturbed(request, 1 << 30).outputs[:num_delivered]
    return replace(request, token_ids=(*prompt, *outputs))
