"""What one engine can hold, and which requests it could therefore never serve."""

import math
from dataclasses import dataclass

from baton.errors import ConfigurationError, InvalidRequestError
from engine.requests import EngineRequest
from engine.sequence import most_positions


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Raises ConfigurationError when they contradict each other."""

    page_size: int
    max_batch_tokens: int
    """Tokens computed in one step."""
    max_running: int
    """Requests that hold blocks side by side, those that wait for KV from outside included."""
    max_model_tokens: int
    """Prompt plus output."""
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        if self.max_batch_tokens < self.max_running:
            raise ConfigurationError(
                f"--max-batch-tokens is {self.max_batch_tokens}; it must be at least --max-running "
                f"({self.max_running}), or some requests would never get a token"
            )


def check_servable(request: EngineRequest, limits: SchedulerLimits, num_blocks: int) -> None:
    """Raises InvalidRequestError when no order of events could serve the request from a pool of `num_blocks`."""
    num_tokens, limit = len(request.token_ids), limits.max_model_tokens
    if not 1 <= request.num_prompt_tokens <= num_tokens:
        raise InvalidRequestError("the prompt is empty", "prompt")
    if num_tokens >= limit:
        raise InvalidRequestError(
            f"{num_tokens} tokens leave no room for output; this model takes {limit} in all", "prompt"
        )
    if request.sampling.max_tokens <= num_tokens - request.num_prompt_tokens:
        raise InvalidRequestError("max_tokens leaves no token to generate", "max_tokens")
    standing = request.standing
    if not 0 < standing.weight < math.inf or not 0 <= standing.kv_share <= 1:
        raise InvalidRequestError(
            f"a tenant's weight must be a positive number and its share of the KV blocks between 0 and 1; "
            f"this one's are {standing.weight} and {standing.kv_share}"
        )
    num_needed = -(-most_positions(request, limit) // limits.page_size)
    if num_needed > num_blocks:
        raise InvalidRequestError(
            f"prompt and max_tokens need {num_needed} KV blocks, this worker has {num_blocks}; shorten one of them",
            "max_tokens",
        )
