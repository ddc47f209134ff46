"""Scan the bytes of a gRPC message before it is parsed, and refuse messages with too many fields.

An empty entry takes two bytes in the message but two hundred in memory. A valid inference request has a few dozen
fields, whatever its tensors hold.
"""

from collections.abc import Iterator

from mpdsgr_deploy.serving.refusals import Refused, invalid

MOST = 100  # the largest number of fields of a message and of the messages in it
VARINT, LENGTH = 0, 2  # wire types
FIXED = {1: 8, 5: 4}  # bytes of the wire types of fixed size
# field numbers of ModelInferRequest and of its inputs in grpc_service.proto
INPUTS, OUTPUTS = 5, 6
SHAPE, CONTENTS = 3, 5
DIMENSIONS = 80  # bytes that the four sizes of a shape may take

BROKEN = "the message is not a ModelInferRequest"


class Scan:
    """Reads the fields of one message and of the messages in it, at most `MOST` in all."""

    def __init__(self, content: bytes) -> None:
        self._content, self._left = content, MOST

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield the number of each field, and start and end of its value, between two places in the message.

        Raises Refused for too many fields and for an invalid message.
        """
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
        """Return the number of at most ten bytes at `place`, and the place after it."""
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
    """Raise Refused if a ModelInferRequest, with its inputs and outputs, has more fields than a valid one."""
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
