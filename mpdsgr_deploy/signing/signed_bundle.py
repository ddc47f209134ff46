"""Sign a bundle in the OpenSSF model-signing format (BUNDLE/model.sig), and copy a signed bundle after verifying it.

    model.sig              names every file of the bundle with its sha256; the tool `model_signing verify` reads it
    verdicts/PRECISION.sig signed statements about the bundle (`signing.verdict`), each with its own signature

Neither is listed in the manifest or in model.sig, so both can be added to a bundle without changing a digest. Commands
that change the bundle, such as `mpdsgr build`, remove them, because they do not cover the changed files.
"""

import hashlib
import os
import shutil
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.errors import InputError, explained
from mpdsgr_deploy.locks import LOCK
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.signing.envelope import Signer, Statement, read_signature, verified_statement
from mpdsgr_deploy.signing.trust import Trust

SIGNATURE, VERDICTS = "model.sig", "verdicts"
FORMAT = "https://model_signing/signature/v1.0"
OUTSIDE = (SIGNATURE, VERDICTS, LOCK)  # names at the top of a bundle that its signature does not cover
GIT = (".git", ".gitattributes", ".github", ".gitignore")  # names that model-signing itself does not cover
CHUNK = 1 << 20  # bytes that are copied at a time


class SignedCopy:
    """A verified copy of a bundle's signed files in a private directory, which is removed together with this object.

    root: that directory; signer: a description of the signer. If this is sent to another process, the bundle is
    verified and copied again there, and must have the same signature. Raises InputError for a bundle that is not signed
    by `trust`, and for files that its signature does not cover.
    """

    def __init__(self, path: Path, trust: Trust) -> None:
        self.path, self.trust = path, trust
        content = read_signature(path / SIGNATURE)
        if content is None:
            raise InputError(
                f"{path} is not signed (it has no {SIGNATURE}), and a signature by {trust} is required; get the signed "
                "bundle, or let its signer run `mpdsgr sign`"
            )
        statement, self.signer = verified_statement(content, path / SIGNATURE, trust)
        self.signature_sha256 = hashlib.sha256(content).hexdigest()
        self.root = Path(mkdtemp(prefix="mpdsgr-"))  # readable only for this user
        weakref.finalize(self, _remove, self.root, os.getpid())
        _copy(path, self.root, _signed_files(statement, path / SIGNATURE))
        (self.root / SIGNATURE).write_bytes(content)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied_again, (self.path.absolute(), self.trust, self.signature_sha256)


def _copied_again(path: Path, trust: Trust, signature_sha256: str) -> SignedCopy:
    copy = SignedCopy(path, trust)
    if copy.signature_sha256 != signature_sha256:
        raise InputError(f"{path} was replaced while it was being read; run the command again")
    return copy


def _remove(directory: Path, process: int) -> None:
    if os.getpid() == process:  # a forked process shares the directory but does not own it
        shutil.rmtree(directory, ignore_errors=True)


def _signed_files(statement: Statement, place: Path) -> dict[str, str]:
    """Return the sha256 of each signed file by relative path. Raises InputError for any other statement."""
    try:
        predicate = statement["predicate"]
        resources = predicate["resources"]
        lists_files = predicate["serialization"]["method"] == "files" and statement["predicateType"] == FORMAT
        if lists_files and {resource["algorithm"] for resource in resources} == {"sha256"}:
            return {resource["name"]: resource["digest"] for resource in resources}
    except (KeyError, TypeError):
        pass
    raise InputError(f"{place} is not a signature of a bundle's sha256 hashes; sign the bundle with `mpdsgr sign`")


def _copy(path: Path, out: Path, signed: dict[str, str]) -> None:
    """Copy the signed files and verify their hashes. Raises InputError if files were changed, added or removed."""
    advice = "do not use it; get the signed bundle again"
    missing = set(signed)
    for name, file in _files(path, signed):
        if name not in signed:
            raise InputError(f"{path} holds {name}, which {SIGNATURE} does not cover: {advice}")
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with file.open("rb") as source, target.open("wb") as copy:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                copy.write(chunk)
        if digest.hexdigest() != signed[name]:
            raise InputError(f"{file} is not the file that was signed: {advice}")
        missing.discard(name)
    if missing:
        raise InputError(f"{path} lacks {min(missing)}, which was signed with it: {advice}")


def _files(path: Path, signed: Collection[str] = ()) -> Iterator[tuple[str, Path]]:
    """Yield names and paths of a bundle's files, except those that signatures leave out, unless `signed` names them.

    Raises InputError for links and devices, which can lead anywhere.
    """
    root = path.resolve()
    for file in sorted(root.rglob("*")):
        relative = file.relative_to(root)
        name = relative.as_posix()
        if relative.parts[0] in OUTSIDE + GIT and name not in signed:
            continue
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            raise InputError(
                f"{path} holds {name}, which is a link or a special file, and a signature covers only plain files; "
                "remove it"
            )
        if file.is_file():
            yield name, file


def sign_bundle(path: Path, signer: Signer) -> Path:
    """Sign the bundle in the directory `path`, and return the file of the signature.

    Raises InputError for a key that cannot be used, and for a directory with links or special files.
    """
    list(_files(path))  # raises for links and special files
    hashing = need("model_signing.hashing", "sign")
    with TemporaryDirectory() as folder:
        file = Path(folder) / SIGNATURE
        with explained(signer.explain):
            ignoring = hashing.Config().set_ignored_paths(paths=OUTSIDE)
            signer.config().set_hashing_config(ignoring).sign(path.resolve(), file)
        write_atomic(path / SIGNATURE, file.read_bytes())
    return path / SIGNATURE


def drop_signatures(path: Path) -> bool:
    """Remove the signature and the verdicts of a bundle whose files have changed. Returns whether there were any."""
    signed = (path / SIGNATURE).exists() or (path / VERDICTS).exists()
    (path / SIGNATURE).unlink(missing_ok=True)
    shutil.rmtree(path / VERDICTS, ignore_errors=True)
    return signed
