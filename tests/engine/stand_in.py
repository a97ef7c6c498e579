"""A runner without a model, and the world around an engine: both notice every wrong byte.

The "KV" of a position is a number chained over all tokens up to it and over what else it may depend on (the cache
root, and for a prompt beyond the shareable length that length, as with dynamic rotary scaling). The next token is a
function of the last number, so each stream has one undisturbed form that can be computed without an engine.
"""

from dataclasses import dataclass, field

from baton.block_names import root_name
from engine.blocks import BlockAllocator, Owner, OwnerKind
from engine.engine import Engine
from engine.plan import Sampled, StepPlan, StepResult
from engine.requests import EndReason, EngineRequest, Handover, SamplingParams, StepOutput

PAGE = 4
VOCABULARY = 40
ROOT = root_name("stand-in")
LONG_PROMPT = 26
GARBAGE = -1


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

    @property
    def tokens(self) -> list[int]:
        return [*self.request.token_ids[: self.request.num_prompt_tokens], *self.outputs]


def undisturbed(request: EngineRequest, max_model_tokens: int) -> Stream:
    """The stream as a function of the prompt alone. `request.token_ids` past the prompt are not looked at."""
    prompt, sampling = list(request.token_ids[: request.num_prompt_tokens]), request.sampling
    values = kv_of(request.cache_root, prompt, len(prompt))
    outputs: list[int] = []
    while True:
        token = sampled_token(values[-1])
        values.append(next_kv(values[-1], len(values), token, len(prompt)))
        outputs.append(token)
        if token in sampling.stop_token_ids and len(outputs) >= sampling.min_tokens:
            return Stream(request, outputs, EndReason.STOP, values)
        if len(outputs) >= sampling.max_tokens or len(prompt) + len(outputs) >= max_model_tokens:
            return Stream(request, outputs, EndReason.LENGTH, values)


class StandInRunner:
    """Executes plans on numbers and refuses every plan that reads wrong KV or writes where others can read."""

    def __init__(self, max_model_tokens: int) -> None:
        self.max_model_tokens = max_model_tokens
        self.kv: dict[tuple[int, int], int] = {}
        self.streams: dict[str, Stream] = {}
        self.plans: list[StepPlan] = []
        self.allocator: BlockAllocator | None = None

    def expect(self, request: EngineRequest) -> Stream:
        self.streams[request.id] = undisturbed(request, self.max_model_tokens)
        return self.streams[request.id]

    def write(self, block_ids: list[int], position: int, value: int) -> None:
        self.kv[block_ids[position // PAGE], position % PAGE] = value

    def read(self, block_ids: list[int], position: int) -> int | None:
        return self.kv.get((block_ids[position // PAGE], position % PAGE))

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        assert not {source for source, _ in plan.copies} & {target for _, target in plan.copies}
        assert len({target for _, target in plan.copies}) == len(plan.copies)
        for source, target in plan.copies:
            for offset in range(PAGE):
                self.kv[target, offset] = self.kv[source, offset]
        self._check_exclusive(plan)
        sampled = {}
        for sequence in plan.sequences:
            stream = self.streams[sequence.request_id]
            end = sequence.start + len(sequence.token_ids)
            assert sequence.token_ids == stream.tokens[sequence.start : end]
            assert sequence.rope_length == stream.request.num_prompt_tokens
            for position in range(sequence.start):
                assert self.read(sequence.block_ids, position) == stream.kv[position], "wrong KV is read"
            for position in range(sequence.start, end):
                self.write(sequence.block_ids, position, stream.kv[position])
            if sequence.sample is not None:
                known = sequence.sample.prompt_token_ids + sequence.sample.output_token_ids
                assert known == stream.tokens[:end]
                sampled[sequence.request_id] = [Sampled(sampled_token(stream.kv[end - 1]))]
        return StepResult(sampled)

    def _check_exclusive(self, plan: StepPlan) -> None:
        """No block has two writers, or a writer and a reader, whoever they are."""
        writer: dict[int, str] = {}
        for sequence in plan.sequences:
            end = sequence.start + len(sequence.token_ids)
            for index in range(sequence.start // PAGE, (end - 1) // PAGE + 1):
                block = sequence.block_ids[index]
                assert writer.setdefault(block, sequence.request_id) == sequence.request_id
                if self.allocator is not None:
                    assert self.allocator.is_private(block)
        assert not writer.keys() & {source for source, _ in plan.copies}
        for sequence in plan.sequences:
            for block in sequence.block_ids:
                assert writer.get(block, sequence.request_id) == sequence.request_id


@dataclass
class Announced:
    """Blocks of a GIVE request that a reader may look at."""

    block_ids: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    num_tokens: int = 0
    last: bool = False


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
    ) -> None:
        self.max_model_tokens = max_model_tokens
        self.runner = StandInRunner(max_model_tokens)
        self.engine = Engine(
            self.runner,
            num_blocks=num_blocks,
            page_size=PAGE,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            max_model_tokens=max_model_tokens,
            shareable_tokens=shareable_tokens,
            max_waiting=max_waiting,
        )
        self.allocator = self.engine._scheduler._allocator
        self.runner.allocator = self.allocator
        self.outputs: dict[str, list[int]] = {}
        self.started: list[str] = []
        self.ended: dict[str, EndReason] = {}
        self.reserved: dict[str, list[int]] = {}
        """Blocks that a giver may write into: RECEIVING or quarantined."""
        self.num_cached: dict[str, int] = {}
        self.announced: dict[str, Announced] = {}
        self.leases: set[str] = set()
        self.quarantined: set[str] = set()
        self.aborting: set[str] = set()

    def add(self, request: EngineRequest) -> Stream:
        stream = self.runner.expect(request)
        self.engine.add(request)
        self.outputs[request.id] = list(request.token_ids[request.num_prompt_tokens :])
        return stream

    def step(self) -> StepOutput:
        output = self.engine.step()
        self.started += [started.request_id for started in output.started]
        assert len(set(self.started)) == len(self.started)
        for reserved in output.reserved:
            assert self.runner.streams[reserved.request_id].request.handover is Handover.TAKE
            self.reserved[reserved.request_id] = list(reserved.block_ids)
            self.num_cached[reserved.request_id] = reserved.num_cached_blocks
        for computed in output.computed:
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
        for ended in output.ended:
            self._note_end(ended.request_id, ended.reason, ended.num_output_tokens)
        self.check()
        return output

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
        if request_id in self.announced:
            self.leases.add(request_id)

    def check(self) -> None:
        """What holds between any two events."""
        self.engine.check_idle()
        for line in (self.engine._scheduler._waiting, self.engine._scheduler._running):
            assert line == sorted(line, key=lambda sequence: sequence.arrival)
        counts = self.allocator.counts()
        parts = (counts.free, counts.cached, counts.held, counts.leased, counts.quarantined)
        assert min(parts) >= 0
        assert sum(parts) == counts.total
        for request_id, announced in self.announced.items():
            kv = self.runner.streams[request_id].kv
            assert self.allocator.generations[announced.block_ids].tolist() == announced.generations
            for position in range(announced.num_tokens):
                assert self.runner.read(announced.block_ids, position) == kv[position], "a reader would be given this"
        for request_id in self.quarantined:
            assert self.allocator.owns_any(Owner(OwnerKind.QUARANTINE, request_id))

    # -- The giver of a TAKE request -----------------------------------------------------------------------------

    def deliver(self, request_id: str, num_tokens: int) -> None:
        """Write the right KV of the first positions; those before the cached blocks' end are never written."""
        stream = self.runner.streams[request_id]
        for position in range(self.num_cached[request_id] * PAGE, num_tokens):
            self.runner.write(self.reserved[request_id], position, stream.kv[position])

    def scribble(self, request_id: str) -> None:
        """What a stray or torn write does to every block that it may still reach."""
        for block in self.reserved[request_id][self.num_cached[request_id] :]:
            for offset in range(PAGE):
                self.runner.kv[block, offset] = GARBAGE

    def receive(self, request_id: str, num_tokens: int, with_first_token: bool) -> bool:
        request = self.runner.streams[request_id].request
        index = len(request.token_ids) - request.num_prompt_tokens
        first_token = self.runner.streams[request_id].outputs[index] if with_first_token else None
        received = self.engine.receive(request_id, num_tokens, first_token)
        assert received == (request_id in self.reserved and request_id not in self.quarantined)
        if received:
            del self.reserved[request_id]
        return received

    def receive_all(self, request_id: str, with_first_token: bool = True) -> bool:
        num_tokens = len(self.runner.streams[request_id].request.token_ids)
        self.deliver(request_id, num_tokens)
        return self.receive(request_id, num_tokens, with_first_token)

    # -- Ends ----------------------------------------------------------------------------------------------------

    def abort(self, request_id: str) -> bool:
        aborted = self.engine.abort(request_id)
        if aborted:
            self.aborting.add(request_id)
            if request_id in self.announced:
                self.leases.add(request_id)
            if len(self.reserved.get(request_id, [])) > self.num_cached.get(request_id, 0):
                self.quarantined.add(request_id)
            else:
                self.reserved.pop(request_id, None)
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
            self.announced.pop(request_id, None)
        return resolved

    def run_to_the_end(self, max_steps: int = 2000) -> None:
        """The outside answers everything at once; whatever was not aborted must end, and right."""
        for request_id in list(self.quarantined):
            self.resolve(request_id)
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
        """The pool is whole, the scheduler is empty."""
        assert not self.engine.has_work()
        assert self.outputs.keys() == self.ended.keys()
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
) -> EngineRequest:
    """`num_delivered` output tokens came from earlier attempts."""
    sampling = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stop)
    request = EngineRequest(request_id, tuple(prompt), len(prompt), sampling, cache_root, handover)
    outputs = undisturbed(request, 1 << 30).outputs[:num_delivered]
    return EngineRequest(request_id, (*prompt, *outputs), len(prompt), sampling, cache_root, handover)
