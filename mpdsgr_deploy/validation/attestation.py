"""Sign the verdict of a report as a statement about its bundle, and verify it: REPORT/verdict.sig."""

from pathlib import Path

from mpdsgr_deploy import __version__
from mpdsgr_deploy.atomic_files import sha256, write_atomic
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.locks import LOCK
from mpdsgr_deploy.signing.envelope import Signer, read_signature
from mpdsgr_deploy.signing.trust import Trust
from mpdsgr_deploy.signing.verdict import ConditionCount, SignedVerdict, Vouched, read_verdict, sign_verdict
from mpdsgr_deploy.validation.report import REPORT, Report, load_report
from mpdsgr_deploy.validation.rows import Row

VERDICT = "verdict.sig"
ARTEFACT = "artefact"  # stands for the condition in reasons that concern no single one


def sign_report(directory: Path, signer: Signer) -> tuple[Path, bytes]:
    """Sign the report in `directory`; return the signature's path and content.

    Raises InputError for a report that is damaged, of an earlier version or invalid, and for an unusable key.
    """
    files, report = _digests(directory), load_report(directory)
    verdict = stated(report, files)
    failing = {reason.condition or ARTEFACT for reason in report.reasons}
    failed = {name: name in failing for name in (*(row.name for row in report.rows), *sorted(failing))}
    content = sign_verdict(verdict, report.bundle, failed, signer)
    write_atomic(directory / VERDICT, content)
    return directory / VERDICT, content


def verify_report(directory: Path, trust: Trust) -> Vouched:
    """Return the signed verdict of the report in `directory`.

    Raises InputError if it is not signed by `trust`, or if a file of the report was changed, added or removed.
    """
    content = read_signature(directory / VERDICT)
    if content is None:
        raise InputError(f"{directory} is not signed (it has no {VERDICT}); sign it with `mpdsgr sign`")
    vouched = read_verdict(content, directory / VERDICT, trust)
    signed, present = vouched.verdict.files, _digests(directory)
    changed = sorted(name for name in signed.keys() | present.keys() if signed.get(name) != present.get(name))
    if changed:
        raise InputError(
            f"{directory / changed[0]} has changed since it was signed; do not use this report, and get it again"
        )
    return vouched


def stated(report: Report, files: dict[str, str]) -> SignedVerdict:
    """Return the verdict to sign for a report. files: sha256 of the report's files by name.

    Raises InputError for a report whose verdict is invalid, or that does not name its bundle's digest.
    """
    if report.verdict == "invalid":
        raise InputError(
            "this report's verdict is invalid, so it cannot be signed; correct what the report names and validate again"
        )
    if report.bundle_sha256 is None:
        raise InputError("this report is from an earlier version and does not name its bundle's digest; validate again")
    return SignedVerdict(
        bundle_sha256=report.bundle_sha256,
        verdict=report.verdict,
        tier=report.tier,
        suite=report.suite,
        precision=report.precision,
        backend=report.backend,
        seed=str(report.seed),
        images=report.images,
        images_sha256=report.images_sha256,
        artefact_sha256=report.artefact_sha256,
        conditions=tuple(map(_count, report.rows)),
        gate=report.gate.model_dump(mode="json", exclude_none=True),
        files=files,
        version=__version__,
    )


def _count(row: Row) -> ConditionCount:
    flips = row.flips
    return ConditionCount(
        name=row.name,
        eps=row.eps,
        n=row.n,
        correct=row.artefact.correct,
        at_most=row.at_most,
        reference=row.reference.correct if row.reference else None,
        newly_wrong=flips.newly_wrong if flips else None,
        newly_right=flips.newly_right if flips else None,
    )


def _digests(directory: Path) -> dict[str, str]:
    """Return the sha256 of a report's files by name, without the signature and the lock.

    Raises InputError for links and special files, and for a directory without a report.
    """
    if not (directory / REPORT).is_file():
        raise InputError(f"{directory} holds no {REPORT}; give the directory that `mpdsgr validate` wrote")
    paths = [path for path in sorted(directory.rglob("*")) if path.name not in (VERDICT, LOCK)]
    for path in paths:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InputError(
                f"{path} is a link or a special file, and a signature covers only plain files; remove it or replace "
                "it by a plain file"
            )
    return {path.relative_to(directory).as_posix(): sha256(path) for path in paths if path.is_file()}
