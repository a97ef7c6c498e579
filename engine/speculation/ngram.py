"""Guesses what followed when the latest tokens occurred before.

Prompt lookup decoding (Saxena, 2023) and LLMA (Yang et al., 2023): text that quotes, edits or repeats continues as it
did the last time. No model is asked, so a guess costs a few microseconds.

    tokens   ... A B C D | E F G ...... A B C D |
                         ^ end of the latest earlier match, and what is guessed: E F G ...
"""

from collections.abc import Sequence

from engine.plan import DraftRequest
from engine.speculation.speculator import Guesses

LENGTHS = (4, 3, 2)
"""Tokens that must agree; the longest match wins. Single tokens recur everywhere and say little."""
WINDOW_TOKENS = 2**14
"""Latest tokens of a request that are searched."""
MAX_TOKENS = 2**17
"""Indexed tokens of all requests together; at about 300 bytes each."""
TOKENS_PER_STEP = 1024
"""Indexed in one step, so that a long prompt delays a step by about a millisecond."""


class NgramIndex:
    """Where each run of 2 to 4 tokens of a growing text ended last. Constant time a token."""

    def __init__(self, window: int = WINDOW_TOKENS) -> None:
        self.num_indexed = 0
        """Tokens looked at; n-grams that end there are in the index."""
        self._window = window
        self._ends: dict[int, int] = {}
        """Hash of an n-gram -> its latest end. Two that share a hash cost a wrong guess, never a wrong token."""

    def __len__(self) -> int:
        """Tokens in the window."""
        return min(self.num_indexed, self._window)

    def extend(self, tokens: Sequence[int], limit: int) -> int:
        """Index up to `limit` more tokens, the last one excepted: it must not be found as its own match.

        Returns how many. `tokens` begins with those of the last call.
        """
        start, stop = self.num_indexed, min(self.num_indexed + limit, len(tokens) - 1)
        ends = self._ends
        for end in range(start + 1, stop + 1):
            for length in LENGTHS:
                if end >= length:
                    ends[hash(tuple(tokens[end - length : end]))] = end
            if end > self._window:
                self._drop(tokens, end - self._window)
        self.num_indexed = max(start, stop)
        return self.num_indexed - start

    def match(self, tokens: Sequence[int]) -> int | None:
        """Where the latest earlier occurrence of the longest matching end of `tokens` ended.

        None also while `extend` is behind.
        """
        if self.num_indexed < len(tokens) - 1:
            return None
        for length in LENGTHS:
            if len(tokens) > length:
                end = self._ends.get(hash(tuple(tokens[-length:])))
                if end is not None:
                    return end
        return None

    def _drop(self, tokens: Sequence[int], end: int) -> None:
        """Forget the n-grams that end at `end` and not later."""
        for length in LENGTHS:
            if end >= length:
                ngram = hash(tuple(tokens[end - length : end]))
                if self._ends.get(ngram) == end:
                    del self._ends[ngram]


def continuation(tokens: Sequence[int], end: int, count: int) -> list[int]:
    """The `count` tokens from `end` on. Where `tokens` ends first, the text is taken to have that period."""
    period = len(tokens) - end
    return [tokens[end + place % period] for place in range(count)]


class NgramGuesser:
    """Implements engine.speculation.speculator.Guesser."""

    def __init__(self, max_tokens: int = MAX_TOKENS, window: int = WINDOW_TOKENS) -> None:
        self._room = max_tokens
        """Tokens that may still be indexed."""
        self._window = window
        self._indexes: dict[str, NgramIndex] = {}
        self._ends: dict[str, int] = {}
        """Of the matches that `reach` found."""

    def reach(self, requests: Sequence[DraftRequest]) -> dict[str, int]:
        self._ends.clear()
        limit = TOKENS_PER_STEP
        for request in requests:
            index = self._indexes.get(request.request_id)
            if index is None:
                index = self._indexes[request.request_id] = NgramIndex(self._window)
            limit -= self._extend(index, request.token_ids, limit)
            if (end := index.match(request.token_ids)) is not None:
                self._ends[request.request_id] = end
        return {request.request_id: request.max_drafts for request in requests if request.request_id in self._ends}

    def guess(self, requests: Sequence[DraftRequest], lengths: dict[str, int], spare_s: float) -> Guesses:
        tokens = {
            request.request_id: continuation(request.token_ids, self._ends[request.request_id], length)
            for request in requests
            if (length := lengths.get(request.request_id))
        }
        return Guesses(tokens, depth_s=0.0)

    def forget(self, request_id: str) -> None:
        if (index := self._indexes.pop(request_id, None)) is not None:
            self._room += len(index)

    def _extend(self, index: NgramIndex, tokens: Sequence[int], limit: int) -> int:
        before = len(index)
        fits = self._window - before <= self._room
        count = index.extend(tokens, limit if fits else min(limit, self._room))
        self._room -= len(index) - before
        return count
