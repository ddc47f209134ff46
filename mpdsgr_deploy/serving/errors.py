"""What a request can be refused for, and how each protocol says it."""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Self

RETRY_AFTER = "1"  # seconds until a server that is busy, or not ready, should be asked again
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Why(Enum):
    """Why a request is refused: the HTTP status, and the name of the gRPC status."""

    INVALID = 400, "INVALID_ARGUMENT"
    UNAUTHENTICATED = 401, "UNAUTHENTICATED"
    FORBIDDEN = 403, "PERMISSION_DENIED"
    NOT_FOUND = 404, "NOT_FOUND"
    METHOD = 405, "UNIMPLEMENTED"
    SLOW = 408, "DEADLINE_EXCEEDED"
    TOO_LARGE = 413, "RESOURCE_EXHAUSTED"
    ENCODING = 415, "UNIMPLEMENTED"
    HEADERS = 431, "RESOURCE_EXHAUSTED"
    CANCELLED = 499, "CANCELLED"  # nobody reads this answer; metrics and log do
    INTERNAL = 500, "INTERNAL"
    BUSY = 503, "RESOURCE_EXHAUSTED"
    NOT_READY = 503, "UNAVAILABLE"
    LATE = 504, "DEADLINE_EXCEEDED"

    def __init__(self, status: int, grpc: str) -> None:
        self.status, self.grpc = status, grpc


class Refused(Exception):  # noqa: N818 - a refusal is an answer
    """A request is answered with this one line. headers: of the HTTP response; a 503 always says when to ask again."""

    def __init__(self, why: Why, message: str, *, headers: Mapping[str, str] = NO_HEADERS) -> None:
        super().__init__(message)
        self.why, self.headers = why, dict(headers)
        if why.status == 503:
            self.headers["retry-after"] = RETRY_AFTER

    def without_frames(self) -> Self:
        """This refusal, for whoever caught it and keeps it.

        The frames that it passed hold the request, and it: such a cycle would stay in memory, with the request's body,
        until a garbage collection.
        """
        self.__traceback__ = self.__context__ = None
        return self


def internal(error: Exception) -> Refused:
    """The refusal for a bug, of ours or of a backend: the answer to this request, not the end of the server.

    It drops the error's frames, as `Refused.without_frames` does: the batch's future keeps the error.
    """
    error.__traceback__ = None
    return Refused(Why.INTERNAL, f"{type(error).__name__}; the server's log has more")


def invalid(message: str) -> Refused:
    """A request that breaks the protocol or does not fit the model."""
    return Refused(Why.INVALID, message)
