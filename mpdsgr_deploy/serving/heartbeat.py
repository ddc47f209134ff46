"""Detect a process whose event loop hangs: it counts in shared memory, and its supervisor reads the count."""

import asyncio

from mpdsgr_deploy.serving.group import Group, ProcessCounts

LOOKS = 10  # of the supervisor, and counts of a process, within the time that it may stand still
OPENING_FACTOR = 10  # times as long while a process starts or opens a network: some libraries hold the interpreter then


def beat(group: Group, seconds: float) -> None:
    """Count turns of the running event loop from now on, LOOKS of them in so many seconds."""
    group.own.beats += 1
    asyncio.get_running_loop().call_later(seconds / LOOKS, beat, group, seconds)


class Watch:
    """Observes the counter of one process. seconds: how long its event loop may stand still."""

    def __init__(self, seconds: float, now: float) -> None:
        self._seconds, self._seen, self._beats, self._silent = seconds, now, 0, 0.0

    def is_hung(self, counts: ProcessCounts, now: float) -> bool:
        """Read the process's counter, at a time on the monotonic clock; return whether it hangs.

        A late reading proves nothing, because the supervisor may have been stopped, and the process with it.
        """
        self._silent += min(now - self._seen, 2 * self._seconds / LOOKS)
        if counts.beats != self._beats:
            self._silent = 0.0
        self._seen, self._beats = now, counts.beats
        busy = counts.opening or not counts.beats
        return self._silent > self._seconds * (OPENING_FACTOR if busy else 1)
