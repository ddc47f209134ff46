"""Scan a gRPC message's bytes before a parser makes objects of them.

An empty entry takes two bytes on the wire and two hundred in memory. A valid inference request has a few dozen fields,
whatever its tensors hold, so a message with more is refused.
"""

from collections.abc import Iterator

from mpdsgr_deploy.serving.refusals import Refused, invalid

MOST = 100  # fields of a message and of the messages in it
VARINT, LENGTH = 0, 2  # wire types; 1 and 5: eight and four bytes
FIXED = {1: 8, 5: 4}
# of ModelInferRequest, of its inputs and of their contents: the numbers in grpc_service.proto
INPUTS, OUTPUTS = 5, 6
SHAPE, CONTENTS = 3, 5
DIMENSIONS = 80  # bytes that the four sizes of a shape may take

BROKEN = "the message is not a ModelInferRequest"


class Scan:
    """The fields of one message, of which at most `MOST` are read in all."""

    def __init__(self, content: bytes) -> None:
        self._content, self._left = content, MOST

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield number, start and end of each field's value. Raises Refused for too many, or for an invalid message."""
        place = start
        while place < end:
            self._left -= 1
            if self._left < 0:
                raise invalid(f"the message has more than {MOST} fields; send tensors in raw or packed form")
            tag, place = self._varint(place, end)
            kind = tag & 7
            if kind == LENGTH:
                length, place = self._varint(place, end)
                stop = place + length
            elif kind == VARINT:
                value = place
                _, stop = self._varint(place, end)
                place = value
            elif kind in FIXED:
                stop = place + FIXED[kind]
            else:
                raise _broken()  # groups, which proto3 does not have
            if stop > end:
                raise _broken()
            yield tag >> 3, place, stop
            place = stop

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        """Return a number of at most ten bytes, and its end."""
        content, value = self._content, 0
        for shift in range(0, 70, 7):
            if place >= end:
                raise _broken()
            byte = content[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, place
        raise _broken()


def check_infer_request(content: bytes) -> None:
    """Raise Refused if a ModelInferRequest has more fields than a valid one, at any level where they take memory."""
    scan = Scan(content)
    for number, start, end in scan.fields(0, len(content)):
        if number == INPUTS:
            _check_input(scan, start, end)
        elif number == OUTPUTS:
            for _ in scan.fields(start, end):
                pass


def _check_input(scan: Scan, start: int, end: int) -> None:
    for number, inner, stop in scan.fields(start, end):
        if number == SHAPE and stop - inner > DIMENSIONS:
            raise invalid("an input's shape has more than four sizes")
        if number == CONTENTS:
            for _ in scan.fields(inner, stop):
                pass


def _broken() -> Refused:
    return invalid(BROKEN)
