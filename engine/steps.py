"""One step of the engine, from the moment it is planned until its result is applied. Bookkeeping only."""

from engine.blocks import BlockAllocator
from engine.in_flight import StepBlocks
from engine.plan import PlannedSequence, StepPlan
from engine.sequence import Sequence


class Step:
    """Who takes part in a step. `budget`: tokens that it may still take up."""

    def __init__(self, allocator: BlockAllocator, number: int, budget: int) -> None:
        self.blocks = StepBlocks(allocator, number)
        self.budget = budget
        self.prompt_budget = budget
        """Of `budget`, what prompts may take."""
        self.singles: list[Sequence] = []
        self.sequences: list[Sequence] = []
        """In the order of the plan, once it is made."""
        self.planned: list[PlannedSequence] = []
        self._chunks: list[tuple[Sequence, int]] = []
        self._drafts: dict[str, list[int]] = {}

    def schedule(self, sequence: Sequence) -> int:
        """As many of its tokens as there is room for, which is at least one. Returns how many."""
        num_tokens = min(sequence.num_uncomputed, self.prompt_budget)
        if num_tokens == 1:
            self.singles.append(sequence)
        else:
            self._chunks.append((sequence, num_tokens))
        self.budget -= num_tokens
        self.prompt_budget -= num_tokens
        return num_tokens

    def add_drafts(self, sequence: Sequence, drafts: list[int]) -> None:
        """Guesses that follow its single token."""
        self._drafts[sequence.id] = drafts
        self.budget -= len(drafts)

    def plan(self) -> StepPlan:
        """Nothing is added any more; the sequences take note of what they do in this step."""
        parts = [(sequence, 1) for sequence in self.singles] + self._chunks
        self.sequences = [sequence for sequence, _ in parts]
        self.planned = [
            sequence.launch(num_tokens, self._drafts.get(sequence.id, ()), self.blocks)
            for sequence, num_tokens in parts
        ]
        return StepPlan(self.planned, self.blocks.copies)

    def samples_on_device(self) -> bool:
        """Whether it gives at most one token a sequence, and each is chosen from the logits without the host."""
        return not any(
            planned.num_drafts or (planned.sample is not None and planned.sample.adjusts(planned.sample_index))
            for planned in self.planned
        )
