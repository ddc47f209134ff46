"""The files of a report: all say the same, and are there whatever else is missing."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from reports import failed, row, sample

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.parity import Parity
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.health.check_registry import Check
from mpdsgr_deploy.validation.report import Report
from mpdsgr_deploy.validation.report_page import plain
from mpdsgr_deploy.validation.rows import EarlyStop
from mpdsgr_deploy.validation.writing import badge, junit, report_directory, summary, write_report

FILES = {"report.json", "report.html", "junit.xml", "summary.md", "badge.json"}


def test_a_real_validation_writes_every_file(bundle: Bundle, tmp_path: Path) -> None:
    report = validate(Target(bundle), gate=Gate(max_drop=0.25), limit=40)
    assert write_report(report, tmp_path) == tmp_path / "report.html"
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert Report.model_validate_json((tmp_path / "report.json").read_bytes()) == report
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == (str(len(report.health) + len(report.rows) + 1), "0")
    text = (tmp_path / "report.html").read_text()
    assert report.artefact_sha256 in text
    summed = (tmp_path / "summary.md").read_text()
    assert summed.startswith("## PASS")
    assert summed.count("\n| ") == len(report.rows) + 1
    assert json.loads((tmp_path / "badge.json").read_text())["color"] == "brightgreen"


def test_without_the_extra_only_the_page_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a directory that holds the page of an earlier run, which would contradict the other files."""
    for module in ("jinja2", "matplotlib"):
        for old in ("report.json", "report.html"):
            (tmp_path / old).write_text("of an earlier run")
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)  # importing it fails, as where it was not installed
            with report_directory(tmp_path):
                assert write_report(sample(), tmp_path) == tmp_path / "summary.md"
        assert {path.name for path in tmp_path.iterdir()} == FILES - {"report.html"}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all("pip install 'mpdsgr-deploy[report]'" in line for line in lines)


def test_a_report_of_broken_logits_can_be_read_again() -> None:
    report = sample(parity=Parity(rows=1, max_abs=float("inf"), within_tolerance=0, labels_differ=1))
    text = report.model_dump_json()
    json.loads(text, parse_constant=pytest.fail)  # JSON has no word for infinity
    assert Report.model_validate_json(text) == report


def test_a_report_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not a report of mpdsgr"), report_directory(tmp_path):
        pytest.fail("the block was entered")


def test_two_reports_at_a_time_do_not_mix_their_files(tmp_path: Path) -> None:
    with report_directory(tmp_path):
        with pytest.raises(InputError, match="is being written by another report; wait"), report_directory(tmp_path):
            pytest.fail("the block was entered")
        write_report(sample(), tmp_path)
    with report_directory(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == FILES | {".lock"}
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_gates_of_any_shape_are_put_in_words() -> None:
    assert plain({"worst": 0.5, "clean": None}) == "worst 0.5, clean none"
    assert plain({}) == plain([]) == "none"
    assert plain(("a", 1)) == "a, 1"
    assert plain("text") == "text"


def test_junit_says_which_rule_failed_and_what_to_do() -> None:
    suite = ElementTree.fromstring(junit(failed("invalid")))
    cases = {case.get("name"): case.find("failure") for case in suite}
    broken = {name: failure.text for name, failure in cases.items() if failure is not None}
    assert list(broken) == ["check 1: rule 1 holds", "check 7: rule 7 holds", "gate: worst", "gate: everything else"]
    assert broken["check 7: rule 7 holds"] == "what it saw; mend it and validate again"
    assert broken["gate: worst"].startswith("worst: accuracy 56.50% is below the floor 60.00%; ")
    assert "--max-drop" in broken["gate: worst"]
    assert "1000 are required" in broken["gate: everything else"]
    assert (suite.get("tests"), suite.get("failures"), suite.get("time")) == (str(len(cases)), "4", "12.3")


def test_the_summary_says_what_to_do() -> None:
    text = summary(failed(stopped=EarlyStop(after="fgsm", why="the gate cannot be met any more")))
    assert text.startswith("## FAIL: digits (int8, onnxruntime-cpu)\n")
    assert (
        "- worst: accuracy 56.50% is below the floor 60.00%\n- 200 images, at least 1000 are required\n  - **do:** find"
        in text
    )
    assert "- stopped after fgsm: the gate cannot be met any more\n" in text
    assert "| **worst** | 56.5 [49.6, 63.2] | 57.5 [50.6, 64.1] | 2 | 0 | 0.5 |\n" in text
    assert "| gaussian | 97.5 [94.3, 98.9] | not compared | - | - | - |\n" in text
    assert (
        "- not compared with the reference, which was not attacked in this way: gaussian, strong triangle:0.25," in text
    )


def stopped_early() -> Report:
    """The gate refused it after BIM."""
    rows = [row("clean", 198, reference=199), row("bim", 150, reference=180), row("worst", 150, at_most=True)]
    return failed(stopped=EarlyStop(after="bim", why="clean: lost"), rows=rows)


def test_an_upper_bound_is_called_one_everywhere(tmp_path: Path) -> None:
    report = stopped_early()
    write_report(report, tmp_path)
    bound = "at most 75.0, stopped after bim"
    assert f"| **worst** | {bound} | not compared |" in (tmp_path / "summary.md").read_text()
    assert bound in (tmp_path / "report.html").read_text()
    (case,) = ElementTree.parse(tmp_path / "junit.xml").getroot().findall("testcase[@name='gate: worst']")
    assert case.find("failure") is not None
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["rows"][-1]["at_most"]
    assert saved["stopped"] == {"after": "bim", "why": "clean: lost"}
    message = json.loads((tmp_path / "badge.json").read_text())["message"]
    assert message == "robust at most 75.0 % @ eps 0.1, clean 99.0 %, stopped after bim"
    undecided = ElementTree.fromstring(junit(report.model_copy(update={"reasons": []})))
    (skipped,) = undecided.findall("testcase[@name='gate: worst']/skipped")
    assert skipped.get("message") == bound


def test_what_is_not_compared_is_not_green() -> None:
    report = sample()
    assert json.loads(badge(report))["color"] == "yellow"
    cases = {case.get("name"): case.find("skipped") for case in ElementTree.fromstring(junit(report))}
    assert "not compared" in cases["gate: gaussian"].get("message")
    assert cases["gate: fgsm"] is None
    alone = Check(number=13, name="reach", state="not compared", saw="no reference", why="", advice="")
    assert "check 13, reach: NOT COMPARED" in summary(sample(health=[alone]))


def test_the_badge_follows_the_endpoint_schema() -> None:
    rows = [row("clean", 198, reference=199), row("fgsm", 150, reference=151), row("worst", 113, reference=115)]
    good = json.loads(badge(sample(rows=rows)))
    assert good == {
        "schemaVersion": 1,
        "label": "mpdsgr",
        "message": "robust 56.5 % @ eps 0.1, clean 99.0 %",
        "color": "brightgreen",
    }
    assert json.loads(badge(failed()))["color"] == "red"
    invalid = json.loads(badge(failed("invalid")))
    assert (invalid["message"], invalid["color"]) == ("evaluation not valid", "orange")
