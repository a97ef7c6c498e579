"""What a plugin implements that looks at text on its way in or out: redaction, moderation.

    baton coordinator --filter my_package.redaction:EmailFilter

names a class, or a function without arguments, that makes a `Filter`. It runs in the coordinator's event loop: whatever
it waits for is awaited, and what computes for longer than a millisecond belongs into a thread. See docs/security.md.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from baton.errors import BatonError


class Text(NamedTuple):
    """A piece of what a client wrote and the model will read."""

    role: str
    """Of a message: system, user or assistant. "prompt" outside of chats, "variable" for one of the chat template."""
    text: str


class Shown(NamedTuple):
    """What becomes of text that the model wrote."""

    decided: int
    """So many of the characters given need not be seen again; the rest is held back until more has come."""
    text: str
    """To show for these: themselves, other words, nothing."""
    end: bool = False
    """Nothing follows: the answer ends here, with the finish reason content_filter."""


class Refused(BatonError):
    """Raised by `input`: this must not reach the model. The message is shown to the client, and says nothing of it."""


class OutputFilter(Protocol):
    """Of one choice of one request."""

    async def __call__(self, text: str, final: bool) -> Shown:
        """`text`: what is not decided yet, so that what was held back comes again, with what is new at its end.

        Called for the text of every token, in order, whoever reads the answer and however often: pieces are the same
        whenever the tokens are. `final`: nothing follows; what is not decided then is not shown.
        """


class Filter:
    """Lets everything pass. Any exception but `Refused` counts as its failure: see --filter-fails."""

    async def input(self, texts: Sequence[Text]) -> Sequence[str]:
        """The texts of one request, as many as there are, to give to the model instead. Raises Refused."""
        return [each.text for each in texts]

    def output(self) -> OutputFilter | None:
        """For a new choice; None, then always, where answers are none of its business."""
        return None
