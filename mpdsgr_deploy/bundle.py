"""The deployment bundle: the directory that export writes and that everything after export reads.

    manifest.json         facts about the network, and the sha256 of every other file
    model.fp32.onnx       the network, one file per precision
    weights.safetensors   the torch weights from which the networks were made, if this package trained them
    reference.npz         the torch network's verdicts on the test images, clean and attacked
    images.npz            these images, if the bundle carries them
    golden.npz            a few inputs and the logits of each precision, checked whenever a predictor is opened
    engines/              engines for one kind of machine, which `mpdsgr build` adds
    model.sig, verdicts/  signatures, which the manifest does not name: see `signing.signed_bundle`

Opening a bundle verifies every hash and refuses paths that lead out of it. Hashes protect against damage and mix-ups.
To be protected against someone who writes new hashes, open the bundle with a `Trust`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.address import local_copy, parse_address
from mpdsgr_deploy.atomic_files import followed, sha256, write_atomic
from mpdsgr_deploy.claimed_directories import claim_directory, recover_directory, replace_directory, scratch_directory
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.locks import LOCK, exclusive
from mpdsgr_deploy.manifest import Accuracy, Manifest, NoiseInput, Prepared, Variant
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.reference import REFERENCE, Reference, load_reference
from mpdsgr_deploy.schema import read_document
from mpdsgr_deploy.signing.signed_bundle import SIGNATURE, VERDICTS, SignedCopy, drop_signatures
from mpdsgr_deploy.signing.trust import Trust

__all__ = [
    "Accuracy",
    "Bundle",
    "Manifest",
    "NoiseInput",
    "Prepared",
    "Variant",
    "open_bundle",
    "seal",
    "staged",
]

MANIFEST, WEIGHTS, GOLDEN = "manifest.json", "weights.safetensors", "golden.npz"
ENGINES = "engines"


def model_file(precision: str) -> str:
    """Return the name of a precision's ONNX file in a bundle."""
    return f"model.{precision}.onnx"


class Bundle:
    """A verified bundle on disk, as `open_bundle` returns it.

    path: its directory. signed: the private copy from which its files are read, if a signature was required.
    """

    def __init__(self, path: Path, manifest: Manifest, signed: SignedCopy | None = None) -> None:
        self.path, self.manifest, self.signed = path, manifest, signed

    @property
    def root(self) -> Path:
        """The directory from which files are read: `path`, or the private copy of the signed files."""
        return self.path if self.signed is None else self.signed.root

    def file(self, name: str) -> Path:
        """Return the path of a verified file. Raises InputError if the manifest does not list it."""
        if name not in self.manifest.files:
            raise InputError(
                f"{self.path / MANIFEST} lists no hash for {name!r}, so it cannot be trusted; export again"
            )
        return self.root / name

    def weights(self, otherwise: str) -> Path:
        """Return the path of the torch weights. Raises InputError, with the advice `otherwise`, if there are none."""
        if self.manifest.origin != "trained":
            raise InputError(
                f"{self.path} holds no torch weights, because its network was not trained by this package; {otherwise}"
            )
        return self.file(WEIGHTS)

    def variant(self, precision: str) -> Path:
        """Return the path of a precision's ONNX file. Raises InputError for a precision that the bundle lacks."""
        if precision not in self.manifest.variants:
            raise InputError(f"{self.path} has no precision {precision!r}; it has {', '.join(self.manifest.variants)}")
        return self.file(self.manifest.variants[precision].file)

    def model_sha256(self, precision: str) -> str:
        """Return the sha256 of a precision's ONNX file. Raises InputError as `variant` does."""
        return self.manifest.files[self.variant(precision).relative_to(self.root).as_posix()]

    def prepared(self, backend: str, precision: str) -> list[Prepared]:
        """Return what `mpdsgr build` made of a precision for a backend, on any kind of machine."""
        return [p for p in self.manifest.prepared if (p.backend, p.precision) == (backend, precision)]

    def add(self, prepared: Prepared, engine: bytes | None = None) -> "Bundle":
        """Write `prepared` and its engine, if any, into the bundle, and return the changed bundle.

        The entry replaces an earlier one for the same backend, precision, machine and batch. The engine is written
        first, then the manifest is replaced, and engines that it does not name are deleted last, so a crash leaves a
        valid bundle. Entries that other processes added meanwhile are kept. Signatures are removed, because they are of
        the earlier files. Raises InputError if the bundle was damaged or cannot be written.
        """
        same = ("backend", "precision", "machine", "batch")
        with exclusive(self.path / LOCK, "mpdsgr build", wait=True):
            current = _read_manifest(self.path, "export again")
            others = [p for p in current.prepared if any(getattr(p, k) != getattr(prepared, k) for k in same)]
            files = dict(current.files)
            if engine is not None:
                digest = hashlib.sha256(engine).hexdigest()
                name = f"{ENGINES}/{prepared.key}-{digest[:8]}.plan"
                prepared = prepared.model_copy(update={"file": name})
                (self.path / ENGINES).mkdir(exist_ok=True)
                write_atomic(self.path / name, engine)
                files[name] = digest
            replaced = {p.file for p in current.prepared} - {p.file for p in (*others, prepared)}
            files = {name: digest for name, digest in files.items() if name not in replaced}
            draft = current.model_copy(update={"prepared": (*others, prepared), "files": files})
            bundle = Bundle(self.path, _write_manifest(self.path, draft))
            for file in (self.path / ENGINES).glob("*.plan*"):
                if f"{ENGINES}/{file.name}" not in files:
                    file.unlink()
            if drop_signatures(self.path):
                log.warning("%s was signed and has changed; validate it and sign it again: mpdsgr sign", self.path)
        return bundle

    def refuse_output(self, out: Path, option: str = "--out") -> None:
        """Raise InputError, which names the option, if the output path `out` lies inside this bundle."""
        if followed(out).is_relative_to(self.path.resolve()):
            raise InputError(f"{option} {out} is inside the bundle {self.path}; choose another place")

    def reference(self) -> Reference | None:
        """Return the reference, None if the bundle has none. Raises InputError as `load_reference` does."""
        promise = self.manifest.reference
        return None if promise is None else load_reference(self.file(REFERENCE), promise)

    def golden(self, precision: str = "fp32") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return golden inputs [G, C, H, W] and the logits [G, K] that a precision must give for them.

        The logits of fp32 are those of the torch network. Raises InputError if the file does not hold them.
        """
        try:
            with np.load(self.file(GOLDEN), allow_pickle=False) as arrays:
                inputs, logits = arrays["inputs"], arrays[precision]
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise InputError(
                f"{self.path / GOLDEN} does not hold inputs and logits of {precision} ({error}); export again"
            ) from None
        if logits.shape != (len(inputs), len(self.manifest.labels)):
            raise InputError(
                f"{self.path / GOLDEN} does not fit the {len(self.manifest.labels)} labels of the bundle; export again"
            )
        return inputs, logits


def open_bundle(path: Path | str, trust: Trust | None = None) -> Bundle:
    """Read and verify the bundle in a directory, or, for a string, at an address (`mpdsgr_deploy.address`).

    trust: who must have signed it. The signature is verified before anything else is read, and all files are then read
    from a private copy of the signed files. Raises InputError if there is no bundle, if it has a newer schema, is
    damaged or incomplete, names files outside itself, or lacks that signature, and for an address with a precision.
    """
    if isinstance(path, str):
        address = parse_address(path)
        if address.precision is not None:
            raise InputError(f"{path!r}: this opens a bundle with all its precisions; leave @{address.precision} out")
        path = local_copy(address)
    path = path.expanduser()
    advice = "make a bundle with `mpdsgr export`"
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} is not a bundle (it has no {MANIFEST}); {advice}")
    signed = None if trust is None else SignedCopy(path, trust)
    root = path if signed is None else signed.root
    manifest = _read_manifest(root, advice)
    bundle = Bundle(path, manifest, signed)
    for name, digest in manifest.files.items():
        file = _inside(root, name)
        if not file.is_file():
            raise InputError(f"{path} is incomplete: {name} is missing; copy the bundle again")
        if sha256(file) != digest:
            raise InputError(f"{file} does not match its hash in {MANIFEST}: it was changed or damaged; copy it again")
    weights = [WEIGHTS] if manifest.origin == "trained" else []
    for needed in (*weights, GOLDEN, *(variant.file for variant in manifest.variants.values())):
        bundle.file(needed)
    return bundle


def _inside(root: Path, name: str) -> Path:
    """Return root/name. Raises InputError if that is, or links to, a path outside root."""
    relative = PurePosixPath(name)
    file = root / relative
    try:
        inside = file.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # for a loop of symbolic links, or a NUL in the name
        inside = False
    if not inside or relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise InputError(f"{root / MANIFEST} names {name!r}, which is outside the bundle; do not use this bundle")
    return file


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield an empty directory beside `out` to build a bundle in, which `seal` moves to `out`.

    It is removed after the block if it was not sealed. Raises InputError if `out` holds anything that is not part of a
    bundle, and as `scratch_directory` does.
    """
    recover_directory(out)
    claim_directory(out, MANIFEST, "bundle")
    if (out / MANIFEST).exists():
        manifest = read_document(out / MANIFEST, Manifest, otherwise="choose another --out")
        known = {*manifest.files, MANIFEST, LOCK, SIGNATURE}
        files = [p.relative_to(out) for p in out.rglob("*") if not p.is_dir()]
        foreign = [file for file in files if file.as_posix() not in known and file.parts[0] != VERDICTS]
        if foreign:
            raise InputError(f"{out} holds {foreign[0].name}, which is not part of the bundle; choose another --out")
    with scratch_directory(out, "bundle") as scratch:
        yield scratch


def seal(scratch: Path, out: Path, **fields: Any) -> Bundle:
    """Write the manifest of the files in `scratch`, move the directory to `out`, and return the bundle.

    fields: those of `Manifest`, except for `files` and `digest`.
    """
    files = {p.relative_to(scratch).as_posix(): sha256(p) for p in sorted(scratch.rglob("*")) if p.is_file()}
    manifest = _write_manifest(scratch, Manifest(files=files, **fields))
    replace_directory(scratch, out)
    return Bundle(out, manifest)


def _read_manifest(directory: Path, otherwise: str) -> Manifest:
    """Read a directory's manifest. Raises InputError as `read_document` does, and if its digest is wrong."""
    path = directory / MANIFEST
    manifest = read_document(path, Manifest, otherwise=otherwise)
    if manifest.digest != manifest.computed_digest():
        raise InputError(f"{path} does not match its own digest: it was changed or damaged; copy it again")
    return manifest


def _write_manifest(directory: Path, draft: Manifest) -> Manifest:
    manifest = draft.model_copy(update={"digest": draft.computed_digest()})
    write_atomic(directory / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest
