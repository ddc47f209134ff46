"""Recordings of event cameras in the file format of N-MNIST (Orchard et al., arXiv 1507.07629), binned to frames.

A file is a sequence of records of 40 bits, big-endian, without a header:

    x 8 bits | y 8 bits | polarity 1 bit (0 off, 1 on) | time 23 bits, in microseconds
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError

RECORDINGS = ".bin"
SIDE = 34  # height and width in pixels
RECORD = 5  # bytes per event
# A record whose y is WRAPPED is not an event: the camera's clock has wrapped, and later times grow by CLOCK, as in the
# readers that the data set's authors publish. The 23 bits last 8.4 s, so they do not wrap within a recording of 0.3 s.
WRAPPED, CLOCK = 240, 2**13
# Larger counts are cut to this: few pixels fire more often within a frame, and one that flickers must not set the
# scale. It divides 255, so that every count is a whole number of grey levels.
COUNT_CAP = 5


class Events(NamedTuple):
    """A recording's events: x and y in [0, 34), polarity in {0, 1}, t >= 0 in microseconds; int64 [E >= 1] each."""

    x: NDArray[np.int64]
    y: NDArray[np.int64]
    polarity: NDArray[np.int64]
    t: NDArray[np.int64]


def parse_events(data: bytes, name: str) -> Events:
    """Return the events of a recording in file order; `name` is the file's name for error messages.

    Raises InputError for a recording that is cut off, has no events, or has events outside the 34x34 pixels.
    """
    if len(data) % RECORD:
        raise InputError(f"{name} is cut off: its {len(data)} bytes are not a multiple of {RECORD}; copy it again")
    x, y, high, middle, low = np.frombuffer(data, np.uint8).reshape(-1, RECORD).T.astype(np.int64)
    t = (high & 0x7F) << 16 | middle << 8 | low
    wraps = y == WRAPPED
    t += CLOCK * np.cumsum(wraps)
    events = Events(*(values[~wraps] for values in (x, y, high >> 7, t)))
    if not len(events.t):
        raise InputError(f"{name} holds no events; copy it again or remove it")
    if max(events.x.max(), events.y.max()) >= SIDE:
        raise InputError(
            f"{name} has an event at x = {events.x.max()} or y = {events.y.max()}, outside {SIDE}x{SIDE} pixels; "
            f"it is not an N-MNIST recording"
        )
    return events


def to_frames(events: Events, T: int) -> NDArray[np.uint8]:
    """Count the events of each pixel and polarity in T frames, which divide the time from the first event to the last.

    Returns uint8 [2 T, 34, 34] with channels 2 t + polarity: counts, cut at COUNT_CAP and scaled to 0..255.
    """
    since = events.t - events.t.min()
    frame = since * T // (since.max() + 1)
    shape = (T * 2, SIDE, SIDE)
    cells = np.ravel_multi_index((2 * frame + events.polarity, events.y, events.x), shape)
    counts = np.bincount(cells, minlength=T * 2 * SIDE * SIDE).reshape(shape)
    return (np.minimum(counts, COUNT_CAP) * (255 // COUNT_CAP)).astype(np.uint8)


def read_frames(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Read a file and decode it as `decode_frames` does. Raises InputError, too, if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return decode_frames(content, str(path), shape)


def decode_frames(content: bytes, name: str, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Decode a recording to frames uint8 of `shape` = (2 T, 34, 34).

    name: the file's name. Raises InputError for another shape, for a name that does not end in .bin, and as
    `parse_events` does.
    """
    channels, *size = shape
    if not name.lower().endswith(RECORDINGS) or channels % 2 or size != [SIDE, SIDE]:
        raise InputError(
            f"{name}: a network with input {list(shape)} takes arrays, and {RECORDINGS} recordings only if its "
            f"input is [2 T, {SIDE}, {SIDE}]"
        )
    return to_frames(parse_events(content, name), channels // 2)
