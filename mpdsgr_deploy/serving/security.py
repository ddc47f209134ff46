"""Decide which clients may send requests, and on which addresses a server may listen."""

import hmac
import ipaddress
import time
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.serving.refusals import Refused, Why

SHORTEST = 16  # fewest characters of a key
CHECK_EVERY = 1.0  # seconds after which the file is checked for changes again


class ApiKeys:
    """The API keys of a file, one per line, with # before comments. It is read again when it changes.

    While the file is missing or holds an invalid key, every client is refused, so deleting it revokes every key. Raises
    InputError for a file that has no keys, or one that is shorter than SHORTEST, not ASCII, or contains spaces.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp, self._digests = self._read()
        self._next = 0.0
        self._trouble = ""  # the problem that was logged last

    def _read(self) -> tuple[tuple[int, int], list[bytes]]:
        try:
            status = self._path.stat()
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the keys of {self._path}: {error}") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys or any(len(key) < SHORTEST or not key.isascii() or " " in key for key in keys):
            raise InputError(
                f"{self._path} must hold keys of at least {SHORTEST} ASCII characters without spaces, one per "
                "line; make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        return (status.st_mtime_ns, status.st_size), [sha256(key.encode()).digest() for key in keys]

    def accepts(self, authorization: str) -> bool:
        """Whether an Authorization header is `Bearer KEY` with one of the keys; it takes the same time for all keys."""
        self._refresh()
        kind, _, key = authorization.partition(" ")
        digest = sha256(key.strip().encode()).digest()
        # compare all keys, so that the time does not depend on the key
        equal = [hmac.compare_digest(digest, known) for known in self._digests]
        return kind.lower() == "bearer" and any(equal)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + CHECK_EVERY
        try:
            status = self._path.stat()
            if (status.st_mtime_ns, status.st_size) != self._stamp:
                self._stamp, self._digests = self._read()
                log.info("read the changed keys, %d of them, from %s", len(self._digests), self._path)
                self._trouble = ""
        except (OSError, InputError) as error:
            self._stamp, self._digests = (0, 0), []
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.error("every key is refused until this is corrected: %s", error)


def check_exposure(host: str, *, authenticated: bool, insecure: bool) -> None:
    """Raise InputError if other machines reach the address, unless clients are authenticated or `insecure` is set."""
    if authenticated or insecure or is_loopback(host):
        return
    raise InputError(
        f"--host {host} can be reached by other machines; give --api-key-file or --tls-client-ca, or --insecure "
        "if a proxy or firewall decides who may send requests"
    )


def check_caller(host: str, origin: str | None) -> None:
    """Raise Refused for a request that another site's page, in a browser on this machine, sends to a loopback server.

    host, origin: the headers. A browser names the page's site in Origin; after DNS rebinding, Host is that site's name.
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if not is_loopback(name.strip("[]")[:100]) or origin not in (None, f"http://{host}", f"https://{host}"):
        raise Refused(
            Why.FORBIDDEN,
            f"this server answers only requests from its own machine, not for {(origin or host)[:100]}; start it "
            "with --api-key-file, or with --insecure if a proxy or firewall decides who may send requests",
        )


@lru_cache(maxsize=64)  # cached, because it is called for every request
def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address. Of names, only localhost counts; others may be any address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
