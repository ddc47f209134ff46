"""A model card quotes manifest and report, and the Hub's own reader understands its metadata."""

from pathlib import Path

import pytest
from conftest import assert_input_error, mpdsgr_here
from huggingface_hub import ModelCard
from served import BUNDLE

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.card import card
from mpdsgr_deploy.validation.writing import report_directory, write_report


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return open_bundle(BUNDLE)


@pytest.fixture(scope="module")
def report_dir(shipped: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    with report_directory(out):
        write_report(validate(Target(shipped), gate=Gate(max_drop=0.5), limit=25), out)
    return out


def test_the_hub_reads_the_metadata_and_the_accuracies_are_those_of_the_report(
    shipped: Bundle, report_dir: Path, tmp_path: Path
) -> None:
    done = mpdsgr_here("inspect", BUNDLE, "--card", "--report", report_dir)
    assert done.returncode == 0, done.stderr
    (tmp_path / "README.md").write_text(done.stdout)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.library_name == "mpdsgr-deploy"
    assert loaded.data.pipeline_tag == "image-classification"
    assert loaded.data.datasets == ["digits"]
    results = {result.metric_name: result.metric_value for result in loaded.data.eval_results}
    rows = {row.name: row for row in validate(Target(shipped), gate=Gate(max_drop=0.5), limit=25).rows}
    assert [value for name, value in results.items() if name.startswith("accuracy (")] == [
        rows["clean"].artefact.accuracy
    ]
    assert [value for name, value in results.items() if "all attacks" in name] == [rows["worst"].artefact.accuracy]
    table = {line.split(" | ")[0].strip("| "): line for line in done.stdout.splitlines() if line.startswith("| ")}
    assert {*rows} <= {*table}
    assert all(f"{100 * row.artefact.accuracy:.1f} [" in table[name] for name, row in rows.items())
    assert {*shipped.manifest.variants} <= {*table}
    assert shipped.manifest.digest in done.stdout


def test_without_a_report_the_card_says_whose_accuracies_these_are(shipped: Bundle) -> None:
    text = card(shipped)
    assert "Of the network before its export" in text
    assert "The deployed file itself was not attacked for this card." in text
    assert "model-index" not in text
    unmeasured = shipped.manifest.model_copy(update={"reference": None})
    assert "Not measured" in card(Bundle(shipped.path, unmeasured))


def test_what_a_card_cannot_be_made_of_is_refused(bundle: Bundle, report_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    for options, part in (
        ([bundle.path, "--card", "--report", report_dir], "is the report of another network"),
        ([BUNDLE, "--card", "--report", tmp_path / "none"], "give a report of `mpdsgr validate`"),
        ([BUNDLE, "--card", "--report", tmp_path], "give a report of `mpdsgr validate`"),
    ):
        assert_input_error(mpdsgr_here("inspect", *options), part)
