"""The server's page in a real browser, in front of a real server."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from pages import ANSWERED, READY, browser, hostile, photo, port, serving, shown
from ports import free_ports

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.serving.served_model import evidence

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")


def test_every_model_is_listed_with_what_it_is_and_how_it_does(shown: Browser) -> None:
    shown.wait("document.querySelectorAll('.model').length === 3")
    assert shown.text("#health") == "READY"
    assert shown.run("document.title") == "mpdsgr: ready"
    cards = shown.run("[...document.querySelectorAll('.model')].map((card) => card.innerText)")
    for card, name, precision in zip(cards, ("digits", "exact", "hostile"), ("fp32", "int8", "fp32"), strict=True):
        for part in (
            name,
            "version ",
            "READY",
            "of 100 images of digits: clean",
            "under all attacks",
            "(eps 0.1)",
            "bundle ",
            f"{precision} on onnxruntime-cpu",
            "1 × 8 × 8 to 10 classes",
            "p50",
        ):
            assert part in card
    assert shown.text("#result") == "The prediction for an image appears here."


def test_the_curl_line_is_one_that_a_shell_takes(shown: Browser, port: int) -> None:
    line = shown.run("rows.get('digits').curl.textContent")
    assert f"http://127.0.0.1:{port}/v2/models/digits/infer" in line
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["outputs"][0]["shape"] == [1, 10]


def test_a_report_beside_a_bundle_is_told_if_it_is_of_the_same_network(precise: Bundle, tmp_path: Path) -> None:
    bundle = open_bundle(shutil.copytree(precise.path, tmp_path / "bundle"))
    report = {"verdict": "pass", "tier": "commit", "backend": "onnxruntime-cpu", "images": "first 100"}
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(
        json.dumps(report | {"artefact_sha256": bundle.model_sha256("int8")})
    )
    x = bundle.golden()[0]
    assert evidence(bundle, "fp32", x)["validation"] is None
    assert evidence(bundle, "int8", x)["validation"] == report
    (tmp_path / "report" / "report.json").write_text("[]")
    assert evidence(bundle, "int8", x)["validation"] is None


def test_it_fits_a_telephone_and_the_dark(shown: Browser, photo: Path) -> None:
    shown.choose_file("#file", photo)
    shown.wait(ANSWERED)
    papers = set()
    for width in (1200, 390):
        for dark in (False, True):
            shown.look(width=width, height=844, dark=dark)
            assert shown.run("innerWidth") == width
            assert shown.run("document.documentElement.scrollWidth") <= width
            papers.add(shown.run("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2


def test_the_keyboard_reaches_everything_in_order(shown: Browser, photo: Path) -> None:
    shown.choose_file("#file", photo)
    shown.wait(ANSWERED)
    reached = []
    for _ in range(7):
        shown.press("Tab")
        reached.append(shown.run("document.activeElement.id"))
    assert reached == ["", "", "", "model", "file", "invert", "again"]  # the first are those that show a curl line
    shown.run("byId('label').textContent = ''")
    shown.press("Enter", "\r")
    shown.wait("byId('label').textContent !== ''")


def test_what_goes_wrong_is_said(browser: Browser, port: int, photo: Path, tmp_path: Path) -> None:
    browser.open(f"http://127.0.0.1:{port}/")
    browser.wait(READY)
    (tmp_path / "no.png").write_text("no image")
    browser.choose_file("#file", tmp_path / "no.png")
    browser.wait("byId('message').textContent === 'no.png is not an image that this browser can read.'")
    assert browser.errors == []
    browser.run("models[0].input.name = 'pictures'")
    browser.choose_file("#file", photo)
    browser.wait("byId('message').textContent.startsWith('No prediction from digits. HTTP 400: ')")
    assert "pictures" in browser.text("#message")
    assert browser.run("byId('answer').hidden")


def test_a_server_that_goes_and_comes_back_with_keys(
    browser: Browser, bundle: Bundle, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("open-sesame-0123456789abcdef\n")
    with serving(f"digits={bundle.path}", port=free_ports(1)[0]) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait(READY)
        browser.choose_file("#file", photo)
        browser.wait(ANSWERED)
    browser.wait("byId('health').textContent === 'no answer'")
    assert "NO ANSWER" in browser.text(".model")
    assert "READY" not in browser.text(".model")
    assert browser.text("#trouble").startswith("The server does not answer; is it still running?")
    assert browser.run("byId('models').className") == "stale"
    browser.run("byId('again').click()")
    browser.wait("byId('message').textContent.startsWith('No prediction from digits. The server does not answer')")
    with serving(f"digits={bundle.path}", "--api-key-file", tmp_path / "keys", port=port):
        browser.wait("!byId('login').hidden")
        assert browser.run("byId('main').hidden && byId('refused').hidden")
        for key in ("no-such-key-0123456789abcdef", "open-sesame-0123456789abcdef"):
            browser.run(f"byId('key').value = '{key}'; document.querySelector('#login button').click()")
            browser.wait("!byId('refused').hidden" if key.startswith("no") else READY)
        assert browser.run("byId('login').hidden && byId('trouble').hidden")
        browser.run("byId('again').click()")
        browser.wait(ANSWERED)
    browser.run("sessionStorage.clear()")
