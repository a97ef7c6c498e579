"""Errors that cross a boundary between parts. Each message says what to change, and none holds text of a prompt."""


class BatonError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigurationError(BatonError):
    """A flag, file or environment variable is unusable. Raised before any port is opened."""


class ModelError(ConfigurationError):
    """A model folder is unusable. The message names the file and the field."""


class InvalidRequestError(BatonError):
    """A client's request cannot be served as written: HTTP 400, gRPC INVALID_ARGUMENT.

    `param` names the offending field in the words of the API, where there is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PeerError(BatonError):
    """A peer broke the protocol, went silent, or refused. The caller falls back; nothing of the peer is trusted."""


class TransferError(PeerError):
    """Blocks could not be copied, or what arrived fails its check. It is a miss, never an answer."""
