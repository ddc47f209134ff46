"""The page of a report: complete, safe against untrusted names, and readable on a telephone."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from reports import after_strong_pgd, broken_images, failed, row, sample, strong

from mpdsgr_deploy.validation.example_images import SIDE, chosen, examples, magnified, picture
from mpdsgr_deploy.validation.report import Curve, Point, Report, findings
from mpdsgr_deploy.validation.report_page import MOST, page, shown_eps, sweep
from mpdsgr_deploy.validation.rows import EarlyStop, VerdictFlips
from mpdsgr_deploy.validation.writing import badge, junit, summary

EVIL = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium")


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


def test_the_same_report_gives_the_same_page() -> None:
    assert page(sample()) == page(sample())


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
    ElementTree.fromstring(junit(sample(bundle="a\x00b", reasons=[{"text": "\x1b"}])))
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


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def test_differences_are_magnified_around_grey() -> None:
    clean = np.full((1, 1, 5), 0.5, np.float32)
    attacked = clean + np.float32([-0.1, -0.05, 0, 0.05, 0.1])
    assert magnified(clean, attacked, 0.1) == pytest.approx(np.array([[[0, 0.25, 0.5, 0.75, 1]]]), abs=1e-6)
    assert magnified(clean, attacked, 0.2)[0, 0, 4] == pytest.approx(0.75)


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
    before, after = np.array([0, 1, 0]), np.array([0, 0, 0])  # the last one was wrong before
    measurement = after_strong_pgd(images + np.float32(0.1), true, before=before, after=after)
    (found,) = examples(images, ["zero", "one"], measurement)
    assert (found.image, found.label, found.clean, found.attacked) == (1, "one", "one", "zero")
    assert (pixels(found.pictures[2]) == 255).all()
