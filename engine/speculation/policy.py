"""How many guesses are worth verifying, for each request and step.

Right guesses save steps, each guess makes its step longer. Both are measured while serving: how often the guesses of a
request are right, and for each batch size what a plain step takes, what one more row adds to it, and what it takes to
make guesses. The lengths chosen are those with the most expected tokens a second (as in SpecDec++, Huang et al., 2024,
and SmartSpec, Liu et al., 2024); so guesses get longer while they are right, shorter after a wrong one, and stop where
the batch leaves no arithmetic to spare.

What never pays would never be measured again. A fixed share of the time may therefore be spent on guesses that the
books say do not pay: it bounds the loss, and it finds out when things have changed.
"""

from dataclasses import dataclass

MIN_GAIN = 1.01
"""Expected gain below which the noise of the measurements decides."""
FIRST_RIGHT = 0.5
"""Probability that a guess is right, before anything is known."""
WEIGHT_RIGHT, WEIGHT_ALL = 0.1, 0.05
"""Of the newest guess, for its request and for all requests."""
FADE = 0.98
"""What is left, after a step without guesses, of what is known of a request. So an unlucky one is tried again when
others do better."""
WEIGHT_S, KEEP_ROWS = 0.1, 0.95
"""Of the newest plain step; and how much what was known of the rows counts after one more step with guesses."""
OUTLIER = 2.0
"""A step that takes this many times what was expected was disturbed, and counts as so much."""
FIRST_ROW_SHARE = 0.25
"""Of what a plain step takes for each sequence: the first idea of what a row costs. So the first guesses are few."""
PROBE_SHARE = 0.02
"""Of the time may be spent on guesses that are not expected to pay."""
LEAST_PROBE = 0.1
"""Of a plain step: what one is taken to cost at least, where rows seem to cost nothing."""
STALE_STEPS, SURE_GAIN = 64, 1.5
"""A plain step is measured again after so many with guesses, unless these are expected to gain so much."""
PATIENCE, LOOK_EVERY, LOOK_STEPS = 16, 16, 4
"""After PATIENCE steps in a row without guesses they are looked for in 4 steps of 16 only: looking keeps an engine from
planning a step before it knows the tokens of the last."""
SPARE_SHARE = 0.5
"""Of a plain step: what a guesser may take in one step to read a prompt."""


@dataclass(slots=True)
class _Record:
    """How the guesses of one request went; the latest count most."""

    num_right: float = 0.0
    num_judged: float = 0.0

    def observe(self, num_guesses: int, num_right: int) -> None:
        """Guesses after the first wrong one are not judged."""
        for right in [1.0] * num_right + [0.0] * (num_right < num_guesses):
            self.num_right += right - WEIGHT_RIGHT * self.num_right
            self.num_judged += 1 - WEIGHT_RIGHT * self.num_judged

    def fade(self) -> None:
        """It could have been tried and was not: what is known of it becomes old, too."""
        self.num_right *= FADE
        self.num_judged *= FADE

    def probability(self, right_of_all: float) -> float:
        """That a guess is right, if those before it in its step were. What others saw counts as one guess."""
        return (self.num_right + right_of_all) / (self.num_judged + 1)


@dataclass(slots=True)
class StepCost:
    """What steps of one batch size take, in seconds.

    The time a row adds is fitted through the plain step by least squares; older steps count less and less.
    """

    num_sequences: int
    plain_s: float = 0.0
    num_plain: int = 0
    num_since_plain: int = 0
    depth_s: float = 0.0
    """Making one more guess for each sequence."""
    _row_products: float = 0.0
    _row_squares: float = 1.0

    @property
    def row_s(self) -> float:
        return max(self._row_products / self._row_squares, 0.0)

    def observe(self, num_drafts: int, seconds: float) -> None:
        if num_drafts:
            self.num_since_plain += 1
            added = min(seconds, OUTLIER * (self.plain_s + num_drafts * self.row_s)) - self.plain_s
            self._row_products = KEEP_ROWS * self._row_products + num_drafts * added
            self._row_squares = KEEP_ROWS * self._row_squares + num_drafts**2
            return
        self.num_since_plain = 0
        self.num_plain += 1
        if self.num_plain == 1:
            self.plain_s = seconds
            self._row_products = FIRST_ROW_SHARE * seconds / self.num_sequences
        else:
            weight = max(WEIGHT_S, 1 / self.num_plain)
            self.plain_s += weight * (min(seconds, OUTLIER * self.plain_s) - self.plain_s)

    def observe_guessing(self, depth_s: float) -> None:
        self.depth_s += (depth_s - self.depth_s) * (WEIGHT_S if self.depth_s else 1.0)


class Policy:
    """`most_running`: with more sequences in a step than that, nothing is guessed, whatever was measured."""

    def __init__(self, most_running: int) -> None:
        self._most_running = most_running
        self._costs: dict[int, StepCost] = {}
        self._records: dict[str, _Record] = {}
        self._right_of_all = FIRST_RIGHT
        self._probe_s = 0.0
        """What may be spent on probes now; negative after one that took longer than expected."""
        self._num_idle = 0
        """Steps in a row in which there was nothing to guess."""

    def wants(self, num_sequences: int) -> bool:
        """Whether to look for guesses at all."""
        resting = self._num_idle >= PATIENCE and self._num_idle % LOOK_EVERY >= LOOK_STEPS
        return num_sequences <= self._most_running and not resting

    def choose(self, num_sequences: int, reach: dict[str, int]) -> dict[str, int]:
        """How many guesses to make for each request that gets some, of the most that `reach` says.

        `num_sequences`: in the step, those without guesses included.
        """
        cost = self._costs.get(num_sequences)
        if not reach or cost is None:
            return {}  # this step will tell what a plain one takes
        lengths, gain = self._most_tokens_a_second(cost, reach)
        for request_id in reach.keys() - lengths.keys():
            self._record(request_id).fade()
        if lengths and (gain > SURE_GAIN or cost.num_since_plain < STALE_STEPS):
            return lengths
        if lengths:
            return {}
        return self._probe(cost, reach)

    def observe_step(self, num_sequences: int, num_drafts: int, seconds: float) -> None:
        """A step without prompts."""
        if num_sequences > self._most_running:
            return
        cost = self._costs.get(num_sequences)
        if cost is None:
            if num_drafts:  # guesses for a batch of another size, before requests came or went
                return
            cost = self._costs[num_sequences] = StepCost(num_sequences)
        cost.observe(num_drafts, seconds)
        self._probe_s = min(self._probe_s + PROBE_SHARE * seconds, cost.plain_s)

    def observe_guesses(self, request_id: str, num_guesses: int, num_right: int) -> None:
        self._record(request_id).observe(num_guesses, num_right)
        self._right_of_all += WEIGHT_ALL * (float(num_right > 0) - self._right_of_all)

    def observe_guessing(self, num_sequences: int, depth_s: float) -> None:
        """Making one more guess for each sequence took so long."""
        if (cost := self._costs.get(num_sequences)) is not None:
            cost.observe_guessing(depth_s)

    def observe_idle(self, idle: bool) -> None:
        """Whether a step went by without guesses."""
        self._num_idle = self._num_idle + 1 if idle else 0

    def spare_s(self, num_sequences: int) -> float:
        """What a guesser may take once to learn about a request, in one step."""
        cost = self._costs.get(num_sequences)
        return SPARE_SHARE * cost.plain_s if cost is not None else 0.0

    def forget(self, request_id: str) -> None:
        self._records.pop(request_id, None)

    def _record(self, request_id: str) -> _Record:
        return self._records.setdefault(request_id, _Record())

    def _most_tokens_a_second(self, cost: StepCost, reach: dict[str, int]) -> tuple[dict[str, int], float]:
        """Lengths, and the expected gain over a plain step. Nothing when that is too small.

        Guess j of a request adds right^j tokens. Taken from the likeliest down, each beginning of the list is the best
        choice of so many guesses.
        """
        least = cost.row_s * cost.num_sequences / cost.plain_s  # a row that brings less than a plain step does
        candidates: list[tuple[float, int, str]] = []
        for request_id, most in reach.items():
            right = probability = self._record(request_id).probability(self._right_of_all)
            for place in range(1, most + 1):
                if probability <= least:
                    break
                candidates.append((-probability, place, request_id))
                probability *= right
        candidates.sort()
        tokens, depth = float(cost.num_sequences), 0
        best_rate, num_best = MIN_GAIN * tokens / cost.plain_s, 0
        for count, (probability, place, _) in enumerate(candidates, 1):
            tokens -= probability
            depth = max(depth, place)
            rate = tokens / (cost.plain_s + count * cost.row_s + depth * cost.depth_s)
            if rate > best_rate:
                best_rate, num_best = rate, count
        lengths = {request_id: place for _, place, request_id in candidates[:num_best]}  # the last place is the highest
        return lengths, best_rate * cost.plain_s / cost.num_sequences

    def _probe(self, cost: StepCost, reach: dict[str, int]) -> dict[str, int]:
        """One guess, for the request of which least is known, when that much time has been saved up."""
        probe_s = max(cost.row_s, LEAST_PROBE * cost.plain_s) + cost.depth_s
        if probe_s > self._probe_s:
            return {}
        self._probe_s -= probe_s
        return {min(reach, key=lambda request_id: self._record(request_id).num_judged): 1}
