"""Addresses of bundles, as commands take them: PLACE[@PRECISION][@sha256:DIGEST].

PLACE is a directory, an address of a file system that fsspec supports (hf://OWNER/NAME, s3://BUCKET/NAME, gs://...), or
oci://HOST/NAME:TAG for files that `oras push` put into an OCI registry. A remote address needs the bundle's digest, the
`digest` in its manifest.json, by which the copy is verified before anything in it is used. The copy stays in the user's
cache, where later runs find it without a network.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from mpdsgr_deploy.errors import InputError, explained, one_line
from mpdsgr_deploy.locks import LOCK, exclusive
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.stores import PROTOCOL, Stored, place_of

MANIFEST = "manifest.json"
SHA256 = re.compile(r"@sha256:([0-9a-f]{64})$")
OCI = "oci://"
LOOPBACK = ("localhost:", "localhost/", "127.0.0.1:", "127.0.0.1/")


class BundleAddress(NamedTuple):
    """The parts of an address. place: a directory or a remote address; sha256: the manifest's digest."""

    place: str
    precision: str | None = None
    sha256: str | None = None

    @property
    def is_remote(self) -> bool:
        """Whether `place` is an address, from which the bundle has to be fetched, and not a directory."""
        return PROTOCOL.match(self.place) is not None


def parse_address(text: str) -> BundleAddress:
    """Parse PLACE[@PRECISION][@sha256:DIGEST]. An existing path is taken literally, even if it contains "@"."""
    if Path(text).expanduser().exists():
        return BundleAddress(text)
    digest = SHA256.search(text)
    place = SHA256.sub("", text)
    precision = None
    if "@" in place.rpartition("/")[2] and not Path(place).expanduser().exists():
        place, _, precision = place.rpartition("@")
    return BundleAddress(place, precision, digest[1] if digest else None)


def local_copy(address: BundleAddress) -> Path:
    """Return the directory of a bundle, after fetching it into the cache if it is remote.

    Raises InputError for a remote address without a digest or that cannot be read, and a bundle with another digest.
    """
    if not address.is_remote:
        path = Path(address.place).expanduser()
        if address.sha256 is not None:
            _verify(path, address)
        return path
    if address.sha256 is None:
        raise InputError(
            f"{address.place} has no digest; append @sha256:DIGEST of the bundle, by which the download is verified"
        )
    cache = cache_directory() / address.sha256
    cache.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(cache.with_name(f"{cache.name}{LOCK}"), "download", wait=True):
        if not (cache / MANIFEST).is_file():
            _fetch(address, cache)
    _verify(cache, address)
    return cache


def cache_directory() -> Path:
    """Return the directory for fetched bundles, below MPDSGR_CACHE, XDG_CACHE_HOME or ~/.cache."""
    explicit, base = os.environ.get("MPDSGR_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(explicit) if explicit else Path(base or Path.home() / ".cache") / "mpdsgr-deploy" / "bundles"


def _fetch(address: BundleAddress, cache: Path) -> None:
    """Copy a remote bundle into the directory `cache`, which appears only once the copy is complete and verified."""
    copy = _copy_from_registry if address.place.startswith(OCI) else _copy_from_file_system
    log.info("fetching %s into %s", address.place, cache)
    scratch = cache.with_name(f"{cache.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    cannot = f"cannot fetch {address.place}"
    with explained(lambda error: InputError(f"{cannot}: {type(error).__name__}: {one_line(error)}")):
        copy(address.place, scratch)
    _verify(scratch, address)
    shutil.rmtree(cache, ignore_errors=True)
    scratch.rename(cache)


def _copy_from_file_system(place: str, target: Path) -> None:
    source = place_of(place)
    assert isinstance(source, Stored), "only addresses are fetched"
    source.store.get(source.path.rstrip("/") + "/", f"{target}/", recursive=True)


def _copy_from_registry(place: str, target: Path) -> None:
    """Copy files from an OCI registry. As in Docker, TLS is required except for a registry on this machine."""
    name = place.removeprefix(OCI)
    client = need("oras.client", "remote").OrasClient(insecure=name.startswith(LOOPBACK))
    client.pull(target=name, outdir=str(target))


def _verify(directory: Path, address: BundleAddress) -> None:
    """Raise InputError unless the manifest states the digest of the address.

    Whether the bundle really has the digest that it states is verified when it is opened.
    """
    try:
        stated = json.loads((directory / MANIFEST).read_bytes())["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{address.place} is not a bundle (it has no readable {MANIFEST})") from None
    if stated != address.sha256:
        raise InputError(
            f"{address.place} is another bundle than the address names: its digest is {stated}; correct the digest or "
            "the address"
        )
