"""Bundles of earlier versions, in which each network's attack graph was a file."""

import tarfile
from pathlib import Path

import pytest
from conftest import mpdsgr_here, resealed

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.rebuild import check_rebuilt, other_writers
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.report import Report

KEPT = Path(__file__).parent / "bundle_with_attack_graphs.tar.xz"  # that of `mpdsgr doctor`, as export wrote it then
GATE = Gate(max_drop=0.35)
pytestmark = pytest.mark.usefixtures("real_tiers")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(KEPT) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def measured(bundle: Bundle) -> tuple[str, dict[str, int]]:
    """The verdict on its int8 network, and the right answers under every condition."""
    report: Report = validate(Target(bundle, precision="int8"), gate=GATE, limit=30)
    return report.verdict, {row.name: row.artefact.correct for row in report.rows}


def test_their_attack_graphs_are_hashed_and_not_read(old: Path) -> None:
    bundle = open_bundle(old)
    assert [bundle.manifest.variants[p].attack for p in ("fp32", "int8")] == ["attack.fp32.onnx", "attack.int8.onnx"]
    assert other_writers(bundle) or check_rebuilt(bundle) == []
    assert mpdsgr_here("verify", old).returncode == 0
    verdict, correct = measured(bundle)
    assert verdict == "pass"
    assert correct["worst"] < correct["clean"]
    (old / "attack.int8.onnx").write_bytes(b"no gradient at all")
    with pytest.raises(InputError, match=r"attack\.int8\.onnx does not match its hash"):
        open_bundle(old)
    assert measured(open_bundle(resealed(old))) == (verdict, correct)
