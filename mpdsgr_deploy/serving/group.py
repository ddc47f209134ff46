"""The processes of one server: counters in shared memory, and questions to each other over Unix sockets."""

import asyncio
import ctypes
import mmap
import pickle
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 1.0  # seconds that other processes have to answer, after which a stopping or blocked one is left out
Answer = Callable[[], Awaitable[Any]]


class ProcessCounts(ctypes.Structure):
    """The counters that one process shows to the others in shared memory.

    A process has a place in the group; if it dies, another one takes its place.
    """

    requests: int  # requests in progress
    connections: int  # open HTTP connections
    accepting: int  # 1 while it accepts connections
    loaded: int  # 1 once the first process in this place has opened its models
    lost: int  # accepted requests that had no answer when it ended
    beats: int  # turns of its event loop
    opening: int  # networks that it is opening
    died: int  # processes in this place that died
    hung: int  # processes in this place that hung and were killed

    def clear(self) -> None:
        """Reset the counters of a process that has ended; `loaded`, `died` and `hung` belong to its place and stay."""
        self.requests = self.connections = self.accepting = self.lost = self.beats = self.opening = 0


ProcessCounts._fields_ = [(name, ctypes.c_int64) for name in ProcessCounts.__annotations__]


class Group:
    """The processes of one server, with the place `index` of this one. Forked children share the counters.

    folder: the directory of their Unix sockets, if there are several; answers are pickled, so no other user may write
    to it. replacement: whether this process was started in place of one that died.
    """

    def __init__(self, processes: int = 1, folder: Path = Path()) -> None:
        self.processes, self.folder = processes, folder
        rows = ProcessCounts * processes
        self.rows = list(rows.from_buffer(mmap.mmap(-1, ctypes.sizeof(rows))))
        self.replacement = False
        self.join(0)

    def join(self, index: int, *, replacement: bool = False) -> None:
        """Set the place of this process, and whether it replaces one that died."""
        self.index, self.own, self.replacement = index, self.rows[index], replacement

    @property
    def loaded(self) -> bool:
        """Whether every process has opened its models; one that died afterwards still counts."""
        return all(row.loaded for row in self.rows)

    @property
    def accepting(self) -> bool:
        """Whether any process accepts connections."""
        return any(row.accepting for row in self.rows)

    @property
    def has_most_connections(self) -> bool:
        """Whether another process that accepts connections has fewer than this one."""
        return any(row.accepting and row.connections < self.own.connections for row in self.rows)

    def _socket(self, index: int) -> Path:
        return self.folder / str(index)

    async def listen(self, answers: Mapping[str, Answer]) -> None:
        """Answer the questions of other processes from now on. answers: by question, the function that answers it."""
        if self.processes == 1:
            return

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                question = (await reader.readline()).decode().strip()
                writer.write(pickle.dumps(await answers[question]()))
                with suppress(ConnectionError):  # the process that asked has closed the connection
                    await writer.drain()
            finally:
                writer.close()

        self._socket(self.index).unlink(missing_ok=True)  # left by a process that died
        self._server = await asyncio.start_unix_server(answer, self._socket(self.index))

    async def ask(self, question: str) -> dict[int, Any]:
        """Return the answers of the other processes by index; those that do not answer in time are left out."""
        others = [index for index in range(self.processes) if index != self.index]
        answers = await asyncio.gather(*(self._ask(index, question) for index in others), return_exceptions=True)
        return {i: a for i, a in zip(others, answers, strict=True) if not isinstance(a, BaseException)}

    async def _ask(self, index: int, question: str) -> Any:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_unix_connection(self._socket(index))
            try:
                writer.write(f"{question}\n".encode())
                return pickle.loads(await reader.read())
            finally:
                writer.close()


@contextmanager
def group_of(processes: int) -> Iterator[Group]:
    """Provide a group of `processes` for a with block, in the process that starts the others."""
    if processes == 1:  # a single process need not ask others
        yield Group()
        return
    with tempfile.TemporaryDirectory(prefix="mpdsgr-") as folder:
        yield Group(processes, Path(folder))
