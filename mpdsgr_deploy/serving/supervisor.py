"""Run several processes as one server: start them, replace those that die or hang, tell them to reload and to end.

The parent opens the ports, and forks before anything has started a thread. It serves nothing itself. Each process
counts turns of its event loop in shared memory, by which the parent notices that one hangs.
"""

import asyncio
import os
import pickle
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mpdsgr_deploy.errors import EvaluationError, InputError, MpdsgrError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.serving.group import Group, ProcessCounts

LOOKS = 10  # how often the supervisor checks, and a process counts, in the time for which a process may hang
OPENING_FACTOR = 10  # how many times longer a process may hang while it loads libraries or networks
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds until a process that died is replaced, which double each time
STEADY = 60.0  # seconds of life after which the next wait is FIRST_WAIT again
LOOK_EVERY = 0.05  # seconds between checks while the processes load
# The work of a process: it gets a file descriptor that becomes readable when the parent ends, and returns the number of
# requests that got no answer.
Work = Callable[[int], int]


def beat(group: Group, seconds: float) -> None:
    """Count turns of the running event loop from now on, LOOKS of them in `seconds`."""
    group.own.beats += 1
    asyncio.get_running_loop().call_later(seconds / LOOKS, beat, group, seconds)


class Watch:
    """Observes the counter of one process. seconds: how long its event loop may stand still; now: the present time."""

    def __init__(self, seconds: float, now: float) -> None:
        self._seconds, self._seen, self._beats, self._silent = seconds, now, 0, 0.0

    def is_hung(self, counts: ProcessCounts, now: float) -> bool:
        """Read the counter of the process at time `now` on the monotonic clock, and return whether the process hangs.

        A late reading counts as only two intervals, because the supervisor may have been stopped, and the process, too.
        """
        self._silent += min(now - self._seen, 2 * self._seconds / LOOKS)
        if counts.beats != self._beats:
            self._silent = 0.0
        self._seen, self._beats = now, counts.beats
        busy = counts.opening or not counts.beats
        return self._silent > self._seconds * (OPENING_FACTOR if busy else 1)


class Child:
    """One place among the processes, and its process. pid: 0 without a process; since: when it started.

    waits: the seconds before the next process of this place; due: the time to start it; watch: the observation of this
    process; hung: whether it stood still and was killed.
    """

    def __init__(self, index: int) -> None:
        self.index, self.pid, self.since, self.waits, self.due = index, 0, 0.0, FIRST_WAIT, 0.0
        self.watch, self.hung = Watch(0.0, 0.0), False


class Supervisor:
    """Runs `work` in each process of a group.

    ports: closed in the parent when the shutdown begins, so that they close with the last child. hang_seconds: a
    process whose event loop stands still for longer is killed.
    """

    def __init__(self, group: Group, work: Work, ports: list[socket.socket], hang_seconds: float) -> None:
        self._group, self._work, self._ports, self._hang_seconds = group, work, ports, hang_seconds
        self._children = [Child(index) for index in range(group.processes)]
        self._alive, self._gone = os.pipe()  # only the parent holds the writing end, so the file ends with it
        self._ending, self.lost = False, 0

    def run(self, announce: Callable[[], None]) -> int:
        """Run until all processes have ended after SIGTERM or SIGINT; return how many accepted requests got no answer.

        announce: called once every process has loaded its models. Raises the error of a process that ends before that.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        # signals arrive through the file descriptor only if they have a handler
        before = signal.set_wakeup_fd(writer.fileno()), [signal.signal(n, lambda *_: None) for n in SIGNALS]
        try:
            for child in self._children:
                self._start(child)
            announced = False
            while any(child.pid for child in self._children) or not self._ending:
                waiting, _, _ = select.select([reader], [], [], self._patience() if announced else LOOK_EVERY)
                for number in reader.recv(4096) if waiting else b"":
                    self._pass_on(signal.Signals(number))
                self._kill_hung()
                self._reap(started=announced)
                if not announced and not self._ending and self._group.loaded:
                    announced = True
                    announce()
                self._replace()
            return self.lost
        finally:
            signal.set_wakeup_fd(before[0])
            for number, handler in zip(SIGNALS, before[1], strict=True):
                signal.signal(number, handler)

    def _start(self, child: Child) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # blocked until the child handles them, so that none is lost
        is_replacement = child.due > 0
        child.pid, child.since = os.fork(), time.monotonic()
        child.watch, child.hung = Watch(self._hang_seconds, child.since), False
        if child.pid == 0:
            self._work_as(child, replacement=is_replacement)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _work_as(self, child: Child, *, replacement: bool) -> NoReturn:
        """Do the work in the forked process, and end the process afterwards, whatever happens."""
        code = EvaluationError.exit_code
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._gone)
            self._group.join(child.index, replacement=replacement)
            self._group.own.lost = self._work(self._alive)
            code = 0
        except MpdsgrError as error:
            self._error_file(child).write_bytes(pickle.dumps(error))
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _error_file(self, child: Child) -> Path:
        return self._group.folder / f"error-{child.index}"

    def _patience(self) -> float:
        """Return the seconds until a process is to be started or the running ones are to be checked."""
        due = [] if self._ending else [child.due for child in self._children if not child.pid]
        return min([self._hang_seconds / LOOKS, *(max(0.0, moment - time.monotonic()) for moment in due)])

    def _pass_on(self, number: signal.Signals) -> None:
        if number == signal.SIGCHLD:
            return
        if number != signal.SIGHUP and not self._ending:
            self._ending = True
            for port in self._ports:
                port.close()
        for child in self._children:
            child.due = min(child.due, time.monotonic()) if number == signal.SIGHUP else child.due
            if child.pid:
                os.kill(child.pid, number)

    def _kill_hung(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.pid and not child.hung and child.watch.is_hung(self._group.rows[child.index], now):
                child.hung = True
                os.kill(child.pid, signal.SIGKILL)

    def _reap(self, *, started: bool) -> None:
        for child in self._children:
            if not child.pid:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                child.pid = 0
                self._ended(child, os.waitstatus_to_exitcode(status), started=started)

    def _ended(self, child: Child, code: int, *, started: bool) -> None:
        row = self._group.rows[child.index]
        unanswered = row.lost if code == 0 else row.requests
        self.lost += unanswered
        row.clear()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if child.hung:
            how = f"was killed because its event loop had not run for over {self._hang_seconds:g} s,"
        error: MpdsgrError = InputError(f"process {child.index} {how} before it was ready")
        with suppress(FileNotFoundError):
            error = pickle.loads(self._error_file(child).read_bytes())
            self._error_file(child).unlink()
            how = f"could not start: {error}"
        if self._ending:
            if code:
                log.error("process %d %s with %d requests in progress", child.index, how, unanswered)
            return
        if not started:
            self._kill()
            raise error
        child.waits = FIRST_WAIT if time.monotonic() - child.since > STEADY else child.waits
        child.due = time.monotonic() + child.waits
        log.error(
            "process %d %s with %d requests in progress; another starts in %g s",
            child.index,
            how,
            unanswered,
            child.waits,
        )
        child.waits = min(2 * child.waits, LONGEST_WAIT)

    def _replace(self) -> None:
        for child in self._children:
            if not child.pid and not self._ending and time.monotonic() >= child.due:
                row = self._group.rows[child.index]
                row.hung += child.hung
                row.died += not child.hung
                self._start(child)

    def _kill(self) -> None:
        for child in self._children:
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
