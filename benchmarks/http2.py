"""A gRPC client that breaks the rules on purpose: HTTP/2 frames as they are, on a socket."""

import socket
import struct
from typing import Self

SERVICE = "/inference.GRPCInferenceService/"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
FRAME = 16384  # bytes of a DATA frame, at most


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header that needs no table and no Huffman code."""
    parts = [bytes([0])]
    for text in (name.encode(), value.encode()):
        assert len(text) < 127
        parts += [bytes([len(text)]), text]
    return b"".join(parts)


class Http2:
    """One connection. `open` starts a call; `send` sends as much of its message as the server's window lets through."""

    def __init__(self, port: int, seconds: float = 10) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), seconds)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))
        self.next, self.initial, self.window = 1, 65535, 65535
        self.windows: dict[int, int] = {}
        self.ended: dict[int, int] = {}  # streams that the server has reset, and its code
        self.answered: set[int] = set()  # streams whose trailers came
        self.gone = False
        self._rest = b""

    def open(self, method: str, service: str = SERVICE, *, end: bool = False, **headers: str) -> int:
        """The number of a new stream, whose headers are sent."""
        stream, self.next = self.next, self.next + 2
        lines = {
            ":method": "POST",
            ":scheme": "http",
            ":path": service + method,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
            **headers,
        }
        block = b"".join(_literal(name, value) for name, value in lines.items())
        self.socket.sendall(frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, block))
        self.windows[stream] = self.initial
        return stream

    def reset(self, stream: int) -> None:
        self.socket.sendall(frame(RESET, 0, stream, struct.pack(">I", 8)))

    def send(self, stream: int, content: bytes, *, end: bool = True, patience: float = 1.0) -> int:
        """How many bytes the server let through; it stops where no window came for `patience` seconds."""
        view, sent = memoryview(content), 0
        while sent < len(content):
            room = min(self.window, self.windows[stream], FRAME, len(content) - sent)
            if room <= 0:
                if not self.read(patience) or stream in self.ended or stream in self.answered:
                    return sent
                continue
            last = end and sent + room == len(content)
            self.socket.sendall(frame(DATA, END_STREAM if last else 0, stream, bytes(view[sent : sent + room])))
            sent += room
            self.window -= room
            self.windows[stream] -= room
        return sent

    def read(self, seconds: float = 1.0) -> bool:
        """Take in what the server sends; whether anything came in this time."""
        self.socket.settimeout(seconds)
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return False
        except OSError:
            data = b""
        if not data:
            self.gone = True
            return False
        self._rest += data
        try:
            self._take_frames()
        except OSError:  # it has closed, and takes no acknowledgement
            self.gone = True
        return True

    def _take_frames(self) -> None:
        while len(self._rest) >= 9:
            length = int.from_bytes(self._rest[:3], "big")
            if len(self._rest) < 9 + length:
                break
            kind, flags = self._rest[3:5]
            stream = int.from_bytes(self._rest[5:9], "big")
            payload, self._rest = self._rest[9 : 9 + length], self._rest[9 + length :]
            self._frame(kind, flags, stream, payload)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            for key, value in struct.iter_unpack(">HI", payload):
                if key == 4:
                    change, self.initial = value - self.initial, value
                    self.windows = {number: window + change for number, window in self.windows.items()}
            self.socket.sendall(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.socket.sendall(frame(PING, ACK, 0, payload))
        elif kind == WINDOW:
            (more,) = struct.unpack(">I", payload)
            if stream:
                self.windows[stream] = self.windows.get(stream, self.initial) + more
            else:
                self.window += more
        elif kind == RESET:
            self.ended[stream] = int.from_bytes(payload, "big")
        elif kind == HEADERS and flags & END_STREAM:
            self.answered.add(stream)
        elif kind == GOAWAY:
            self.gone = True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def message(content: bytes) -> bytes:
    """As gRPC frames it."""
    return b"\0" + struct.pack(">I", len(content)) + content
