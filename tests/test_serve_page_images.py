"""Images that are given to the server's page in a real browser: what is sent, and what is shown."""

import json
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from pages import ANSWERED, HOSTILE, READY, browser, hostile, photo, port, shown
from PIL import Image

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data.image_files import read_image
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.runtime.firing import FiringRates
from mpdsgr_deploy.serving.web_page import page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")


def choose_model(browser: Browser, name: str) -> None:
    browser.run(f"byId('model').value = '{name}'; byId('model').dispatchEvent(new Event('change'))")


def items(browser: Browser, element: str) -> list[list[str]]:
    """Name and figure of each bar of a list."""
    spans = "[...item.querySelectorAll('span')].map((span) => span.textContent)"
    return browser.run(f"[...byId('{element}').children].map((item) => {spans})")


def test_a_negative_is_noticed_and_can_be_inverted(shown: Browser, precise: Bundle, tmp_path: Path) -> None:
    golden = precise.golden()[0][0, 0]
    Image.fromarray((255 - golden * 255).round().astype(np.uint8)).save(tmp_path / "negative.png")
    with open_predictor(precise) as predictor:
        label = precise.manifest.labels[int(predictor(precise.golden()[0][:1]).argmax())]
    choose_model(shown, "digits")
    shown.choose_file("#file", tmp_path / "negative.png")
    shown.wait(ANSWERED)
    assert "light on dark, and this one is not" in shown.text("#tone")
    shown.run("byId('invert').click()")
    shown.wait(f"{ANSWERED} && byId('tone').textContent === 'invert'")
    assert shown.text("#label") == label


@pytest.mark.parametrize(("model", "precision"), [("digits", "fp32"), ("exact", "int8")])
def test_an_image_is_predicted_as_in_process(
    shown: Browser, precise: Bundle, photo: Path, model: str, precision: str
) -> None:
    pixels = read_image(photo, (1, 8, 8))
    with FiringRates(precise, precision=precision) as network, open_predictor(precise, precision=precision) as plain:
        x = pixels[None].astype(np.float32) / 255
        (logits,), (rates,) = network(x)
        assert np.argmax(plain(x)) == np.argmax(logits)
    choose_model(shown, model)
    shown.choose_file("#file", photo)
    shown.wait(ANSWERED)
    rgba = shown.run("[...byId('picture').getContext('2d').getImageData(0, 0, 8, 8).data]")
    assert np.array_equal(np.reshape(rgba, (8, 8, 4))[..., 0], pixels[0])  # to the last bit what Pillow makes of it
    order = np.argsort(-logits)
    labels = precise.manifest.labels
    assert shown.text("#label") == labels[order[0]]
    found = float(shown.text("#margin").removeprefix("Margin ").partition(":")[0])
    assert found == pytest.approx(logits[order[0]] - logits[order[1]], rel=0.006)  # three digits are shown
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert [name for name, _ in items(shown, "probabilities")] == [labels[k] for k in order[:5]]
    figures = [float(text.removesuffix(" %")) for _, text in items(shown, "probabilities")]
    np.testing.assert_allclose(figures, 100 * shares[order[:5]], atol=0.051)
    assert [name for name, _ in items(shown, "rates")] == ["conv1", "conv2", "conv3"]
    np.testing.assert_allclose([float(text) for _, text in items(shown, "rates")], rates, atol=0.00006)
    assert f"{model} version {precise.manifest.digest[:12]} answered in" in shown.text("#took")
    # and the server's own figures follow
    shown.wait(f"rows.get('{model}').served.textContent !== '0' && rows.get('{model}').p50.textContent.endsWith('ms')")
    assert shown.run(f"rows.get('{model}').latencies.children[1].getAttribute('d')").startswith("M")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_an_image_dropped_or_pasted(shown: Browser, bundle: Bundle, photo: Path, way: str) -> None:
    event = {
        "drop": "new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true })",
        "paste": "new ClipboardEvent('paste', { clipboardData: data, bubbles: true })",
    }[way]
    shown.run(
        f"const data = new DataTransfer(), bytes = atob('{b64encode(photo.read_bytes()).decode()}');"
        "data.items.add(new File([Uint8Array.from(bytes, (c) => c.charCodeAt(0))], 'photo.png', {type: 'image/png'}));"
        f"document.body.dispatchEvent({event})"
    )
    shown.wait(ANSWERED)
    with open_predictor(bundle) as plain:
        (logits,) = plain(read_image(photo, (1, 8, 8))[None].astype(np.float32) / 255)
    assert shown.text("#label") == bundle.manifest.labels[int(logits.argmax())]


def test_labels_are_text_whatever_they_hold(shown: Browser, photo: Path) -> None:
    choose_model(shown, "hostile")
    shown.choose_file("#file", photo)
    shown.wait(ANSWERED)
    assert shown.text("#label") == HOSTILE
    assert shown.run("document.images.length") == 0


class Stub(BaseHTTPRequestHandler):
    """The page under its strict policy, and one model that takes oblong images in colour. `sent`: its last request."""

    sent: tuple[dict[str, object], bytes]
    MODEL: ClassVar[dict[str, object]] = {
        **{"name": "a/b c", "version": "3", "state": "READY", "precision": "fp32", "backend": "openvino"},
        **{"input": {"name": "x", "shape": [3, 20, 28]}, "labels": ["left", "right"], "firing_rate_layers": []},
    }

    def do_GET(self) -> None:
        server = {"version": "9.9", "uptime_seconds": 200, "ready": True}
        self.answer(page()[0] if self.path == "/" else {"server": server, "models": [self.MODEL]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        length = int(self.headers["Inference-Header-Content-Length"])
        assert self.path == "/v2/models/a%2Fb%20c/infer"
        type(self).sent = json.loads(body[:length]), body[length:]
        outputs = [{"name": "margin", "data": [2.0]}, {"name": "logits", "data": [1.0, 3.0]}]
        self.answer({"model_version": "3", "outputs": outputs})

    def answer(self, content: bytes | dict[str, object]) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if isinstance(content, bytes) else "application/json")
        self.send_header("Content-Security-Policy", page()[1].decode())
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *message: object) -> None: ...


def test_it_runs_by_the_hashes_of_its_policy_and_sends_colours_plane_by_plane(browser: Browser, photo: Path) -> None:
    assert b"unsafe" not in page()[1]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, args=(0.02,)).start()
    try:
        browser.errors.clear()
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        browser.wait(READY)
        assert browser.text("#server") == "version 9.9, up 3 min"
        assert browser.run("getComputedStyle(document.querySelector('header')).display") == "flex"
        browser.choose_file("#file", photo)
        browser.wait(ANSWERED)
        assert items(browser, "probabilities") == [["right", "88.1 %"], ["left", "11.9 %"]]
        assert browser.text("#scale") == "openvino cannot return spikes; use an onnxruntime backend"
        head, pixels = Stub.sent
        assert head["inputs"][0]["shape"] == [1, 3, 20, 28]
        assert [output["name"] for output in head["outputs"]] == ["logits", "margin"]
        expected = read_image(photo, (3, 20, 28))
        assert np.array_equal(np.frombuffer(pixels, np.uint8).reshape(expected.shape), expected)
        assert browser.errors == []
        browser.open("about:blank")
    finally:
        server.shutdown()
        server.server_close()
