"""Let a listening socket take no new connections while those that the system has accepted are taken from it."""

import ctypes
import socket
import struct
import sys
from contextlib import suppress

SO_ATTACH_FILTER = 26  # asm-generic/socket.h; the socket module lacks it
# Linux's classic BPF, as (code, jump if true, jump if false, operand); a filter sees a segment from its TCP header on
DROP_SYN = (
    (0x30, 0, 0, 13),  # load the byte of flags
    (0x45, 0, 1, 0x02),  # is it a SYN, which asks for a connection?
    (0x06, 0, 0, 0),  # then drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # keep every other segment
)


def take_no_more(sock: socket.socket) -> None:
    """Let `sock` ignore requests for connections; handshakes that have begun still end in its backlog.

    A client whose request is ignored repeats it after a second and is refused then, if the socket has been closed.
    Where sockets have no such filter, the backlog gets the smallest size instead, and a connection that comes between
    the last `accept` and the end of the socket is lost.
    """
    if sys.platform == "linux":
        steps = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in DROP_SYN))
        program = struct.pack("HP", len(DROP_SYN), ctypes.addressof(steps))
        with suppress(OSError):  # a sandbox may lack filters
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
            return
    sock.listen(0)
