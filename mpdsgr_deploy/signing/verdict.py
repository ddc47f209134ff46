"""A report's verdict as a signed in-toto statement about the digest of a bundle, which the bundle can carry.

The predicate is in-toto's test-result, so that any policy engine can read `result` and `failedTests`. Further fields
are stored under the name EXTENSION, as in-toto's parsing rules allow.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.schema import parse
from mpdsgr_deploy.signing.envelope import Signer, read_signature, sign_statement, verified_statement
from mpdsgr_deploy.signing.signed_bundle import VERDICTS
from mpdsgr_deploy.signing.trust import Trust

TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
EXTENSION = "mpdsgr-deploy"
RESULTS = {"pass": "PASSED", "fail": "FAILED"}


class ConditionCount(BaseModel):
    """How many of n images the artefact gets right under one condition, and how many the reference does.

    at_most: not all attacks were run, so `correct` is an upper bound; newly_wrong, newly_right: compared with the
    reference; None without one.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    eps: float | None
    n: int
    correct: int
    at_most: bool
    reference: int | None
    newly_wrong: int | None
    newly_right: int | None


class SignedVerdict(BaseModel):
    """The validation of one network of a bundle.

    seed: in decimal; gate: the rules of the gate; files: the sha256 of the report's files. Unknown fields are ignored,
    because later versions may have more.
    """

    model_config = ConfigDict(frozen=True)

    bundle_sha256: str
    verdict: Literal["pass", "fail"]
    tier: str
    suite: int
    precision: str
    backend: str
    seed: str
    images: str
    images_sha256: str
    artefact_sha256: str
    conditions: tuple[ConditionCount, ...]
    gate: dict[str, Any]
    files: dict[str, str]
    version: str

    @property
    def line(self) -> str:
        """The verdict in one line, with tier, precision, backend and images."""
        return f"{self.verdict} at tier {self.tier}, {self.precision} on {self.backend}, {self.images}"

    def counts(self) -> dict[str, str]:
        """Return texts "CORRECT/N" by condition."""
        return {count.name: f"{count.correct}/{count.n}" for count in self.conditions}


class Vouched(NamedTuple):
    """A verdict and a description of its signer."""

    verdict: SignedVerdict
    signer: str


def sign_verdict(verdict: SignedVerdict, name: str, failed: Mapping[str, bool], signer: Signer) -> bytes:
    """Sign a verdict on the bundle `name`. failed: whether each condition failed. Raises as `sign_statement` does."""
    predicate = {
        "result": RESULTS[verdict.verdict],
        "configuration": [{"name": verdict.images, "digest": {"sha256": verdict.images_sha256}}],
        "passedTests": [condition for condition, fails in failed.items() if not fails],
        "failedTests": [condition for condition, fails in failed.items() if fails],
        EXTENSION: verdict.model_dump(mode="json"),
    }
    return sign_statement(signer, TEST_RESULT, {name: verdict.bundle_sha256}, predicate)


def read_verdict(content: bytes, place: Path, trust: Trust) -> Vouched:
    """Return the verdict in a signed statement. Raises InputError unless `trust` signed it and it is a verdict."""
    statement, signer = verified_statement(content, place, trust)
    try:
        (subject,), predicate = statement["subject"], statement["predicate"]
        if statement["predicateType"] != TEST_RESULT:
            raise KeyError
        values, result, digest = predicate[EXTENSION], predicate["result"], subject["digest"]["sha256"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{place} is signed, but holds no verdict of mpdsgr validate; sign its report again") from None
    verdict = parse(SignedVerdict, values, str(place))
    if (result, digest) != (RESULTS[verdict.verdict], verdict.bundle_sha256):
        raise InputError(f"{place} contradicts itself; sign the report again")
    return Vouched(verdict, signer)


def place_of_verdict(bundle: Path, precision: str) -> Path:
    """Return the file in which a bundle carries the verdict on a precision."""
    return bundle / VERDICTS / f"{precision}.sig"


def carry_verdict(bundle: Path, precision: str, content: bytes) -> Path:
    """Write a signed verdict to its bundle, over an earlier one on the same precision, and return its file."""
    place = place_of_verdict(bundle, precision)
    place.parent.mkdir(exist_ok=True)
    write_atomic(place, content)
    return place


def carried_verdict(bundle: Path, precision: str, digest: str, trust: Trust) -> Vouched | None:
    """Return the verdict that a bundle carries on a precision; None if there is none.

    Raises InputError as `read_verdict` does, and for a verdict on other files or another precision.
    """
    place = place_of_verdict(bundle, precision)
    content = read_signature(place)
    if content is None:
        return None
    vouched = read_verdict(content, place, trust)
    if (vouched.verdict.bundle_sha256, vouched.verdict.precision) != (digest, precision):
        raise InputError(f"{place} is a verdict on other files than these; validate the bundle and sign the report")
    return vouched
