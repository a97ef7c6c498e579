"""Why a request that was written correctly could not be served, in words for its client."""

from enum import Enum

from baton.errors import BatonError


class FailureKind(Enum):
    """Each front end maps these to its own status codes."""

    UNKNOWN_MODEL = "unknown_model"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    UNKNOWN_PIN = "unknown_pin"
    UNKNOWN_REQUEST = "unknown_request"
    ID_IN_USE = "id_in_use"
    SUPERSEDED = "superseded"
    DIFFERS = "differs"
    CANNOT_PIN = "cannot_pin"
    UNAVAILABLE = "unavailable"
    HANDED_ON = "handed_on"
    FILTERED = "filtered"
    FILTER_FAILED = "filter_failed"
    POISON = "poison"
    TIMEOUT = "timeout"
    INTERNAL = "internal"


class RequestFailed(BatonError):
    """The message is shown to the client: no text of the prompt, no worker's name or address."""

    def __init__(self, kind: FailureKind, message: str, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: when it would be worth trying again; None where the kind alone says that."""
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


def poison() -> RequestFailed:
    message = "workers died each time that they computed this request, the last one with nothing else to do; change it"
    return RequestFailed(FailureKind.POISON, message)


def handed_on() -> RequestFailed:
    message = "this coordinator has shut down, and its workers keep the request: resume it by its id at another one"
    return RequestFailed(FailureKind.HANDED_ON, message)


def moved() -> RequestFailed:
    return RequestFailed(FailureKind.SUPERSEDED, "another connection goes on with this request")


def revoked() -> RequestFailed:
    return RequestFailed(FailureKind.FORBIDDEN, "the tenant of this API key was removed")


def cut_off() -> RequestFailed:
    return unavailable("this coordinator has lost all workers; go on at another, or later")


def shutting_down() -> RequestFailed:
    message = "this coordinator is shutting down; try another or later"
    return RequestFailed(FailureKind.UNAVAILABLE, message, retry_after_s=1.0)  # which a balancer leads elsewhere


def internal() -> RequestFailed:
    return RequestFailed(FailureKind.INTERNAL, "internal error; the log has it under the request id")


def unavailable(message: str) -> RequestFailed:
    return RequestFailed(FailureKind.UNAVAILABLE, message)
