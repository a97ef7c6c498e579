"""Whose turn it is, where several tenants share an engine. Bookkeeping only.

1. The greatest priority goes first.
2. Within a priority it is the turn of the tenant that was served least: tokens computed for it, by its weight. A long
   prompt and a short one, a prompt and a stream count alike, token by token; what a cache holds costs nothing.
3. Within a tenant it is first come, first served.

The virtual token counter of Sheng et al. (Fairness in Serving Large Language Models, OSDI 2024) on top of fair queueing
by finish times. A tenant that begins to want something starts level with the one served least of those that want
something already, or where nobody did, with the one served most: time in which it wanted nothing is no credit, and
while there is enough for everybody nobody runs into debt.

Nobody starves: where a priority is passed over, its next request moves up to the greatest priority as soon as PASSED
tokens were computed, for those above, for each token that it has to compute. So of what is computed a priority gets one
token in PASSED + 1 at the least, whatever comes in above it.
"""

import heapq
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator

from engine.requests import Standing
from engine.sequence import Sequence

PASSED = 16
MAX_IDLE = 1024
"""Tenants without requests whose counters are kept; beyond it the one that left first is forgotten."""


class Account:
    """What a tenant was served within one priority, and its requests there."""

    __slots__ = ("line", "num_planned", "num_requests", "number", "prompts", "rank", "served", "tenant", "turn")

    def __init__(self, rank: int, tenant: str, number: int) -> None:
        self.rank = rank
        """Priority of its requests, those included that have moved up to it."""
        self.tenant = tenant
        self.number = number
        self.served = 0.0
        """Tokens computed, each divided by the weight of its request."""
        self.turn = 0
        """When it was last its turn: of two that were served the same, the other one is next."""
        self.line: list[Sequence] = []
        """Those that wait, in the order of arrival."""
        self.prompts: list[Sequence] = []
        """Those that run and had more than a token to compute when the latest step was planned."""
        self.num_planned = 0
        """The first of `prompts` that have their part of that step."""
        self.num_requests = 0

    def wants(self) -> bool:
        return bool(self.line or self.prompts)

    def prompt(self) -> Sequence | None:
        """The next one that could go on in the step that is planned."""
        return self.prompts[self.num_planned] if self.num_planned < len(self.prompts) else None


class FairQueue:
    """The waiting line, and the order in which prompts that run go on. Iterates over those that wait."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[int, str], Account] = {}
        """Of tenants that have requests here."""
        self._idle: dict[tuple[int, str], Account] = {}
        self._account_of: dict[str, Account] = {}
        """By request id, of those that wait, run or receive."""
        self._wanting: list[Account] = []
        self._credits: dict[int, float] = {}
        """By rank that was passed over: tokens that it may move up."""
        self._num_accounts = 0
        self._num_turns = 0
        self._num_waiting = 0
        self._num_bounded = 0
        """Requests whose tenants have a share of the blocks to keep to."""

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for account in self._accounts.values() for sequence in account.line)

    def add(self, sequence: Sequence) -> None:
        """A new request waits."""
        standing = sequence.request.standing
        self._num_bounded += standing.kv_share > 0
        self._enroll(sequence, standing.priority)
        self.wait(sequence)

    def wait(self, sequence: Sequence) -> None:
        """It waits, again perhaps: before those of its tenant that came later."""
        account = self._account_of[sequence.id]
        self._level(account)
        insort(account.line, sequence, key=_arrival)
        self._num_waiting += 1

    def leave(self, sequence: Sequence) -> None:
        """It waits no more."""
        line = self._account_of[sequence.id].line
        del line[0 if line[0] is sequence else line.index(sequence)]
        self._num_waiting -= 1

    def forget(self, sequence: Sequence) -> None:
        """It has ended, and is not in the line."""
        self._num_bounded -= sequence.request.standing.kv_share > 0
        self._dismiss(sequence)

    def _dismiss(self, sequence: Sequence) -> None:
        account = self._account_of.pop(sequence.id)
        account.num_requests -= 1
        if not account.num_requests:
            key = (account.rank, account.tenant)
            self._idle[key] = self._accounts.pop(key)
            account.prompts = []
        if not self._accounts:
            self._idle.clear()
            self._credits.clear()
        elif len(self._idle) > MAX_IDLE:
            del self._idle[next(iter(self._idle))]

    def somebody_yields(self) -> bool:
        """Whether some that run may have to make way for one that waits."""
        return self._num_waiting > 0 and (self._num_bounded > 0 or len({rank for rank, _ in self._accounts}) > 1)

    def yielding(self, running: Iterable[Sequence], head: Sequence, holdings: "KvHoldings") -> list[Sequence]:
        """Those that make way for `head`, the first one last; `running` in the order of arrival.

        They are of a lesser rank, or of a tenant that holds more than its share. GIVE requests are left alone.
        """
        rank, yielding = self._account_of[head.id].rank, []
        for sequence in reversed(self.by_claim(running)):
            lent = holdings.is_exceeded(sequence.request.standing)
            if not sequence.gives and (lent or self._account_of[sequence.id].rank < rank):
                yielding.append(sequence)
                holdings.remove(sequence)
        return yielding[::-1]

    def holdings(self, holders: Iterable[Sequence], num_blocks: int) -> "KvHoldings":
        """What tenants hold of the pool, of whom some have to keep to a share of it."""
        return KvHoldings(holders if self._num_bounded else (), num_blocks)

    def serve_singles(self, singles: Iterable[Sequence]) -> None:
        """Each gets a token in the step that is planned."""
        if len(self._accounts) > 1:  # one that is alone is compared with nobody
            for sequence in singles:
                self._serve(self._account_of[sequence.id], sequence, 1)

    def wants_nothing(self) -> bool:
        """Whether nobody waits, and nobody had a prompt when the latest step was planned."""
        return not (self._num_waiting or self._wanting)

    def turns(self, prompts: Iterable[Sequence]) -> "Turns":
        """Of a step that is planned now. `prompts`: all that run and have more than a token to compute, by arrival."""
        for account in self._wanting:
            account.prompts, account.num_planned = [], 0
        for sequence in prompts:
            self._account_of[sequence.id].prompts.append(sequence)
        if len(self._accounts) > 1:
            self._move_up()
        self._wanting = [account for account in self._accounts.values() if account.wants()]
        return Turns(self, self._wanting)

    def heads(self) -> list[Sequence]:
        """The first in line of each tenant, in the order of their turns."""
        return [account.line[0] for account in sorted(self._accounts.values(), key=_place) if account.line]

    def by_claim(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Who has more of a claim to its blocks comes first; `running` in the order of arrival.

        Greater priority, then the tenant that holds fewer blocks for its weight, then who came first: each request has
        a rank by what its tenant would hold if those that came later had given theirs back.
        """
        held: defaultdict[Account, float] = defaultdict(float)
        claims = {}
        for sequence in running:
            account = self._account_of[sequence.id]
            held[account] += len(sequence.block_ids) / sequence.request.standing.weight
            claims[sequence] = (-account.rank, held[account])
        return sorted(claims, key=claims.__getitem__)

    def _serve(self, account: Account, sequence: Sequence, num_tokens: int) -> None:
        account.served += num_tokens / sequence.request.standing.weight
        for rank in self._credits:
            if rank < account.rank:
                self._credits[rank] += num_tokens / PASSED

    def took_turn(self, account: Account, sequence: Sequence, num_tokens: int) -> None:
        self._num_turns += 1
        account.turn = self._num_turns
        self._serve(account, sequence, num_tokens)

    def _enroll(self, sequence: Sequence, rank: int) -> None:
        key = (rank, sequence.request.standing.tenant)
        account = self._accounts.get(key)
        if account is None:
            account = self._idle.pop(key, None)
            if account is None:
                self._num_accounts += 1
                account = Account(*key, self._num_accounts)
            self._accounts[key] = account
        account.num_requests += 1
        self._account_of[sequence.id] = account

    def _level(self, account: Account) -> None:
        """One that wants something from now on is owed nothing for the time before."""
        if account.wants():
            return
        peers = [each for each in self._accounts.values() if each.rank == account.rank and each is not account]
        wanting = [each.served for each in peers if each.wants()]
        past = [each.served for each in (*peers, *self._idle.values()) if each.rank == account.rank]
        account.served = max(account.served, min(wanting) if wanting else max(past, default=0.0))

    def _move_up(self) -> None:
        """Those whose priority has been passed over for long enough."""
        wanting: dict[int, list[Account]] = {}
        for account in self._accounts.values():
            if account.wants():
                wanting.setdefault(account.rank, []).append(account)
        top = max(account.rank for account in self._accounts.values())
        self._credits = {rank: self._credits.get(rank, 0.0) for rank in wanting if rank != top}
        for rank, credit in self._credits.items():
            account = min(wanting[rank], key=_place)
            sequence = account.prompts[0] if account.prompts else account.line[0]
            if credit >= sequence.num_uncomputed:
                self._credits[rank] -= sequence.num_uncomputed
                self._move(sequence, account, top)

    def _move(self, sequence: Sequence, account: Account, rank: int) -> None:
        is_prompt = bool(account.prompts)
        if is_prompt:
            del account.prompts[0]
        else:
            self.leave(sequence)
        self._dismiss(sequence)
        self._enroll(sequence, rank)
        if is_prompt:
            target = self._account_of[sequence.id]
            self._level(target)
            target.prompts.append(sequence)
        else:
            self.wait(sequence)


class Turns:
    """The order in which tenants go on with prompts and start requests within one step, best claim first."""

    def __init__(self, queue: FairQueue, accounts: Collection[Account]) -> None:
        self._queue = queue
        self._heap = [_entry(account) for account in accounts]
        heapq.heapify(self._heap)

    def account(self) -> Account | None:
        """Whose turn it is; None when nobody is left."""
        return self._heap[0][-1] if self._heap else None

    def serve(self, sequence: Sequence, num_tokens: int) -> None:
        """The step computes so many tokens of one of the account's requests."""
        account = self._heap[0][-1]
        if account.prompt() is sequence:
            account.num_planned += 1
        elif num_tokens:  # it is one of those that run, from now on
            account.prompts.insert(account.num_planned, sequence)
            account.num_planned += 1
        self._queue.took_turn(account, sequence, num_tokens)
        if account.line or account.prompt() is not None:
            heapq.heapreplace(self._heap, _entry(account))
        else:
            self.skip()

    def skip(self) -> None:
        """The account gets nothing more in this step."""
        heapq.heappop(self._heap)


class KvHoldings:
    """Blocks that each tenant holds while a step is planned. What tenants share counts for each of them.

    A tenant's first request may hold more than its share: it could not be served otherwise.
    """

    def __init__(self, holders: Iterable[Sequence], num_blocks: int) -> None:
        self._num_requests: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._num_blocks = num_blocks
        for sequence in holders:
            self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        self._change(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        self._change(sequence, -1)

    def is_used_up(self, standing: Standing, more: int) -> bool:
        """Whether the tenant's share does not allow for another request that needs `more` blocks."""
        return self._num_requests[standing.tenant] > 0 and self._is_beyond(standing, more)

    def is_exceeded(self, standing: Standing) -> bool:
        """Whether the tenant should give back what one of its requests holds."""
        return self._num_requests[standing.tenant] > 1 and self._is_beyond(standing, 0)

    def _is_beyond(self, standing: Standing, more: int) -> bool:
        return standing.kv_share > 0 and self._held[standing.tenant] + more > standing.kv_share * self._num_blocks

    def _change(self, sequence: Sequence, sign: int) -> None:
        if sequence.request.placement is None:
            self._num_requests[sequence.request.standing.tenant] += sign
            self._held[sequence.request.standing.tenant] += sign * len(sequence.block_ids)


_Entry = tuple[int, float, int, int, Account]


def _place(account: Account) -> tuple[int, float, int, int]:
    return -account.rank, account.served, account.turn, account.number


def _entry(account: Account) -> _Entry:
    return *_place(account), account


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
