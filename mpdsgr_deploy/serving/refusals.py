"""The reasons for refusing a request, and their status in each protocol."""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Self

RETRY_AFTER = "1"  # seconds after which a client should ask a server again that is busy or not ready
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Why(Enum):
    """Why a request is refused, with the HTTP status and the name of the gRPC status."""

    INVALID = 400, "INVALID_ARGUMENT"
    UNAUTHENTICATED = 401, "UNAUTHENTICATED"
    FORBIDDEN = 403, "PERMISSION_DENIED"
    NOT_FOUND = 404, "NOT_FOUND"
    METHOD = 405, "UNIMPLEMENTED"
    SLOW = 408, "DEADLINE_EXCEEDED"
    TOO_LARGE = 413, "RESOURCE_EXHAUSTED"
    ENCODING = 415, "UNIMPLEMENTED"
    HEADERS = 431, "RESOURCE_EXHAUSTED"
    CANCELLED = 499, "CANCELLED"  # the client has left, so only metrics and log show it
    INTERNAL = 500, "INTERNAL"
    BUSY = 503, "RESOURCE_EXHAUSTED"
    NOT_READY = 503, "UNAVAILABLE"
    LATE = 504, "DEADLINE_EXCEEDED"

    def __init__(self, status: int, grpc: str) -> None:
        self.status, self.grpc = status, grpc


class Refused(Exception):  # noqa: N818 - a refusal is an answer
    """Ends a request with a message of one line. headers: for the HTTP response; a 503 always has Retry-After."""

    def __init__(self, why: Why, message: str, *, headers: Mapping[str, str] = NO_HEADERS) -> None:
        super().__init__(message)
        self.why, self.headers = why, dict(headers)
        if why.status == 503:
            self.headers["retry-after"] = RETRY_AFTER

    def without_frames(self) -> Self:
        """Return this refusal without its traceback, for callers that keep it.

        The frames of the traceback hold the request, which holds the refusal: the cycle would stay in memory, with the
        request's body, until a garbage collection.
        """
        self.__traceback__ = self.__context__ = None
        return self


def internal(error: Exception) -> Refused:
    """Return the refusal for an unexpected error of this package or a backend, after which the server goes on.

    The error loses its frames, as by `Refused.without_frames`, because the batch's future keeps it.
    """
    error.__traceback__ = None
    return Refused(Why.INTERNAL, f"the server failed with {type(error).__name__}; its log says more")


def invalid(message: str) -> Refused:
    """Return the refusal of a request that violates the protocol or does not fit the model."""
    return Refused(Why.INVALID, message)
