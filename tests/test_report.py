"""The report: every file says the same, nothing in it can break the page, and it reads on a telephone."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.parity import Parity
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.figures import MOST, shown_eps, sweep
from mpdsgr_deploy.validation.health import Check
from mpdsgr_deploy.validation.page import page, plain
from mpdsgr_deploy.validation.pictures import SIDE, chosen, examples, magnified, picture
from mpdsgr_deploy.validation.reasons import EarlyStop, Reason
from mpdsgr_deploy.validation.report import Curve, Point, Report, VariantFlips, findings
from mpdsgr_deploy.validation.rows import Row, VerdictFlips
from mpdsgr_deploy.validation.summary import badge, junit, summary
from mpdsgr_deploy.validation.writing import report_directory, write_report

EVIL = "<script>alert(1)</script>"
FILES = {"report.json", "report.html", "junit.xml", "summary.md", "badge.json"}
CHROMIUM = shutil.which("chromium")
N = 200


def row(name: str, correct: int, *, reference: int | None = None, eps: float | None = 0.1, **fields: Any) -> Row:
    """A condition under which the first so many of N images are right."""
    promised, right = None if reference is None else np.arange(N) < reference, np.arange(N) < correct
    settings = f"eps {eps}, 10 steps"
    return Row.of(name, settings, right, eps=eps, reference=promised, evaluations=10 * N, **fields)


def strong(surrogate: str, correct: int) -> Row:
    """A strong attack through a surrogate."""
    return row(f"strong {surrogate}", correct, surrogate=surrogate)


def check(number: int, *, passed: bool = True) -> Check:
    return Check(
        number=number,
        name=f"rule {number} holds",
        state="passed" if passed else "failed",
        saw="what it saw",
        why="numbers would mislead",
        advice="mend it and validate again",
    )


def broken_images(labels: list[str]) -> list:
    rng = np.random.default_rng(0)
    clean = rng.uniform(0.2, 0.8, (8, 1, 8, 8)).astype(np.float32)
    attacked = clean + rng.choice([-0.1, 0, 0.1], clean.shape).astype(np.float32)
    classes = np.arange(8) % 2
    return examples(
        clean, attacked, classes, before=classes, after=1 - classes, labels=labels, attack="pgd-strong", eps=0.1
    )


def sample(**changes: object) -> Report:
    """A report in which every part of the page has something to show."""
    flips = VerdictFlips.of(np.arange(N) < 100, np.arange(N) < 97)
    attackers = [strong(name, 110 + i) for i, name in enumerate(("triangle:0.25", "rectangular", "adaptive"))]
    values = {
        "verdict": "pass",
        "reasons": [],
        "bundle": "digits",
        "network": "vgg-small for digits, trained with REG, T = 3",
        "artefact_file": "model.int8.onnx",
        "artefact_sha256": "a" * 64,
        "backend": "onnxruntime-cpu",
        "precision": "int8",
        "tier": "release",
        "images": f"the first {N} test images of digits",
        "images_sha256": "c" * 64,
        "seed": 0,
        "rows": [
            row("clean", 198, reference=199, eps=0.0),
            row("gaussian", 195, eps=None),
            row("fgsm", 150, reference=151),
            row("pgd-strong", 120, reference=120, surrogate="triangle:1"),
            *attackers,
            row("worst", 113, reference=115),
        ],
        "curves": [
            Curve(attack=name, points=[Point(eps=eps, correct=int(190 * (1 - eps) ** k), n=N) for eps in (0, 0.1, 0.5)])
            for k, name in enumerate(("uniform", "fgsm", "pgd-strong"))
        ],
        "examples": broken_images(["three", "eight"]),
        "variants": [VariantFlips(precision="fp16", n=N, clean=flips, attacked=flips)],
        "parity": Parity(rows=N, max_abs=1e-6, within_tolerance=N, labels_differ=0),
        "health": [check(number) for number in (1, 2, 7, 8, 9)],
        "gate": Gate(floors={"clean": 0.9}),
        "seconds": 12.34,
        "provenance": {"python": "3.12", "packages": {"onnx": "1.23"}, "hardware": {"cpu": "some", "gpus": ["one"]}},
    }
    return Report.model_validate(values | changes)


def failed(verdict: str = "fail", **changes: object) -> Report:
    """The gate refuses it; invalid: two health checks do too."""
    health = [check(1, passed=verdict == "fail"), check(2), check(7, passed=verdict == "fail")]
    reasons = [Reason(check=c.number, text=f"{c.name}: {c.saw}; {c.advice}") for c in health if c.failed]
    complaints = [
        Reason(condition="worst", text="accuracy 56.50% is below the floor 60.00%"),
        Reason(text="200 images, at least 1000 are required"),
    ]
    return sample(verdict=verdict, health=health, reasons=[*reasons, *complaints], **changes)


class Elements(HTMLParser):
    """Every element with its attributes; all elements that were opened are closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


# What is written.


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
    with pytest.raises(InputError, match="not a report of ours"), report_directory(tmp_path):
        pytest.fail("the block was entered")


def test_two_reports_at_a_time_do_not_mix_their_files(tmp_path: Path) -> None:
    with report_directory(tmp_path):
        with pytest.raises(InputError, match="is being written by another report; wait"), report_directory(tmp_path):
            pytest.fail("the block was entered")
        write_report(sample(), tmp_path)
    with report_directory(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == FILES | {".lock"}
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_the_same_report_gives_the_same_page() -> None:
    assert page(sample()) == page(sample())


# The page.


@pytest.mark.parametrize("report", [sample(), failed(), failed("invalid")], ids=["pass", "fail", "invalid"])
def test_the_page_is_complete_and_needs_nothing_else(report: Report) -> None:
    text = page(report)
    elements = Elements(text)
    assert not elements.named("script")
    assert not elements.named("link")
    assert len(elements.named("svg")) == len(elements.named("figure")) == 2
    assert len(elements.named("img")) == 3 * len(report.examples) > 0
    for _, attributes in elements.found:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value.startswith(("data:image/png;base64,", "#")), (name, value)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", text)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert targets <= set(ids)
    for part in ("headline", "figures", "conditions", "examples", "variants", "health", "gate", "provenance"):
        assert part in ids
    assert ("findings" in ids) == bool(report.reasons)
    for said in (report.artefact_sha256, report.images_sha256, "gpus one", "12.3 s", "floors"):
        assert said in text
    for finding in findings(report):
        assert all(html.escape(what) in text for what in finding.what)
        assert html.escape(finding.advice[1:]) in text
    for one in report.health:
        assert one.why in text


def test_the_page_does_without_what_was_not_measured() -> None:
    bare = sample(
        rows=[row("clean", 10, eps=0.0)],
        curves=[],
        examples=[],
        variants=[],
        parity=None,
        stopped=EarlyStop(after="bim", why="the budget is spent"),
    )
    text = page(bare)
    Elements(text)
    assert "Ended early, stopped after bim: the budget is spent." in text
    assert "<svg" not in text
    nothing = sample(rows=[], curves=[Curve(attack="fgsm", points=[])], health=[])
    Elements(page(nothing))
    assert json.loads(badge(nothing))["message"] == "evaluation not valid"


def test_untrusted_names_stay_text() -> None:
    spoilt = failed(
        bundle=EVIL,
        network=EVIL,
        artefact_file=EVIL,
        images=f"{EVIL}\x00\x1b[31m",
        stopped=EarlyStop(after=EVIL, why=EVIL),
        rows=[strong(EVIL, 10), row("worst", 5)],
        curves=[Curve(attack=f"$x^{{ {EVIL}", points=[Point(eps=0.1, correct=1, n=2)])],
        examples=broken_images([EVIL, f'" onerror="{EVIL}']),
        variants=[],
        provenance={EVIL: {EVIL: [EVIL]}},
    )
    text = page(spoilt)
    elements = Elements(text)
    assert not elements.named("script")
    assert not any("onerror" in attributes for _, attributes in elements.found)
    assert text.count("&lt;script&gt;") > 10
    ElementTree.fromstring(junit(spoilt))
    ElementTree.fromstring(junit(sample(bundle="a\x00b", reasons=["\x1b"])))
    assert "<script" not in summary(spoilt)


def test_markdown_of_untrusted_names_is_one_line_of_text() -> None:
    name = "a|b\n\n# ![x](http://evil) `c` <b>"
    (line,) = (line for line in summary(sample(rows=[row(name, 1)])).splitlines() if line.startswith("| a"))
    assert line.startswith(r"| a\|b \# !\[x\](http://evil) \`c\` &lt;b&gt; | 0.5 [")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize(
    "report",
    [
        sample(),
        failed(
            "invalid",
            bundle="an-artefact-with-a-name-as-long-as-pipelines-make-them" * 4,
            rows=[strong(f"{'long' * 30}{i}", i) for i in range(200)],
            examples=broken_images(["W" * 120, "i" * 120]),
        ),
    ],
    ids=["usual", "extreme"],
)
def test_a_telephone_shows_the_page_without_scrolling_sideways(report: Report, tmp_path: Path) -> None:
    """The page in a frame of 390 px, beside a script that notes how wide and how high it became."""
    frame = f'<iframe id="f" srcdoc="{html.escape(page(report))}" style="width:390px;height:800px;border:0"></iframe>'
    measure = (
        "const d = f.contentDocument.documentElement; document.title = [d.scrollWidth, d.clientWidth, d.scrollHeight]"
    )
    (tmp_path / "frame.html").write_text(f"<!doctype html>{frame}<script>onload = () => {{ {measure} }}</script>")
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
        (tmp_path / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    width, visible, height = map(int, re.findall(r"<title>(\d+),(\d+),(\d+)</title>", done.stdout)[0])
    assert 300 < visible <= 390
    assert width <= visible
    assert height > 1000


def test_figures_show_the_strongest_attackers_only() -> None:
    many = sample(rows=[*(strong(str(i), i) for i in range(100)), row("worst", 0)])
    assert [found.artefact.correct for found in sweep(many)] == [*reversed(range(MOST))]
    assert "worst: the union" in page(many)
    assert "Which attacker is the strongest? 24 of 100" in page(many)
    curve = sample().curves[0]
    assert "the 7 strongest attacks" in page(sample(curves=[curve] * 8))


def test_gates_of_any_shape_are_put_in_words() -> None:
    assert plain({"worst": 0.5, "clean": None}) == "worst 0.5, clean none"
    assert plain({}) == plain([]) == "none"
    assert plain(("a", 1)) == "a, 1"
    assert plain("text") == "text"


# JUnit, summary and badge.


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
    assert "- ended early, stopped after fgsm: the gate cannot be met any more\n" in text
    assert "| **worst** | 56.5 [49.6, 63.2] | 57.5 [50.6, 64.1] | 2 | 0 | 0.5 |\n" in text
    assert "| gaussian | 97.5 [94.3, 98.9] | not compared | - | - | - |\n" in text
    assert "- not compared with the reference, which met no such attack: gaussian, strong triangle:0.25," in text


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
    alone = Check(number=13, name="reach", state="not compared", saw="no reference", advice="")
    assert "check 13, reach: NOT COMPARED" in summary(sample(health=[alone]))


def test_the_page_shows_the_headline_first_and_folds_what_is_sound() -> None:
    text = page(failed("invalid"))
    assert text.index("<td>worst<") < text.index("<td>clean<")
    folded = re.findall(r"<details class=\"card\"><summary>.*?</summary>", text)
    assert len(folded) == 1  # the only check of three that passed
    assert "rule 2 holds" in folded[0]
    assert "print-color-adjust: exact" in text
    assert "break-inside: avoid" in text


def test_the_axis_of_eps_ends_where_nothing_more_happens() -> None:
    assert shown_eps(sample()) == pytest.approx(0.42)
    few = [Curve(attack="fgsm", points=[Point(eps=0.2, correct=1, n=2)])]
    assert shown_eps(sample(curves=few)) == 0.2


def test_no_p_value_is_stated_where_nothing_differs() -> None:
    assert VerdictFlips.of(np.ones(5, bool), np.ones(5, bool)).p_text == "-"
    assert VerdictFlips.of(np.ones(5, bool), np.arange(5) > 0).p_text == "1"


def test_reports_of_earlier_versions_are_read() -> None:
    old = json.loads(sample().model_dump_json())
    old |= {"schema_version": 2, "reasons": ["pgd: lost"], "stopped": "pgd: lost"}
    old["health"] = [{"number": 1, "name": "one", "passed": False, "saw": "", "advice": ""}]
    report = Report.model_validate(old)
    assert (report.reasons[0].line, report.stopped.why, report.health[0].state) == ("pgd: lost", "pgd: lost", "failed")


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


# Pictures.


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def test_differences_are_magnified_around_grey() -> None:
    clean = np.full((1, 1, 5), 0.5, np.float32)
    attacked = clean + np.float32([-0.1, -0.05, 0, 0.05, 0.1])
    assert magnified(clean, attacked, 0.1) == pytest.approx(np.array([[[0, 0.25, 0.5, 0.75, 1]]]), abs=1e-6)
    assert magnified(clean, attacked, 0.2)[0, 0, 4] == pytest.approx(0.75)
    assert magnified(clean, attacked, None)[0, 0, 3] == pytest.approx(0.75)  # without eps the largest change spans it
    assert magnified(clean, clean, None) == pytest.approx(np.full((1, 1, 5), 0.5))


def test_pictures_are_enlarged_without_blur_and_keep_colours() -> None:
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    found = pixels(picture(grey))
    assert found.shape == (SIDE, SIDE)
    assert np.array_equal(found[::12, ::12], np.round(255 * grey[0]).astype(np.uint8))
    assert np.array_equal(found, np.kron(found[::12, ::12], np.ones((12, 12), np.uint8)))
    colour = np.zeros((3, 32, 16), np.float32)
    colour[1] = 1
    found = pixels(picture(colour))
    assert found.shape == (96, 48, 3)
    assert (found == [0, 255, 0]).all()
    assert pixels(picture(np.zeros((1, 224, 224), np.float32))).shape == (224, 224)
    events = np.stack([np.zeros((8, 8)), np.ones((8, 8))]).astype(np.float32)
    assert (pixels(picture(events)) == 128).all()


def test_examples_are_broken_images_of_many_classes() -> None:
    broken = np.array([1, 1, 0, 1, 1, 1], bool)
    classes = np.array([0, 0, 1, 2, 0, 1])
    assert chosen(classes, broken, 3) == [0, 3, 5]
    assert chosen(classes, broken, 4) == [0, 1, 3, 5]
    assert chosen(classes, broken, 9) == [0, 1, 3, 4, 5]
    images = np.zeros((3, 1, 8, 8), np.float32)
    true = np.array([0, 1, 1])
    (found,) = examples(
        images,
        images + np.float32(0.1),
        true,
        before=np.array([0, 1, 0]),  # the last one was wrong before
        after=np.array([0, 0, 0]),
        labels=["zero", "one"],
        attack="fgsm",
        eps=0.1,
    )
    assert (found.image, found.label, found.clean, found.attacked) == (1, "one", "one", "zero")
    assert (pixels(found.pictures[2]) == 255).all()
