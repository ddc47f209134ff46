"""What tests of the server's page share: a browser, and servers with the page."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from conftest import resealed
from PIL import Image
from served import Served

from mpdsgr_deploy.bundle import Bundle

HOSTILE = "<img src=x onerror=alert(1)>"
ANSWERED = "!document.getElementById('answer').hidden"
READY = "!document.getElementById('main').hidden"


@contextmanager
def serving(*arguments: object, port: int = 0) -> Iterator[int]:
    """The port of `mpdsgr serve` with these arguments, while it serves."""
    with Served(*arguments, "--port", port) as served:
        yield served.port


@pytest.fixture(scope="module")
def hostile(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with labels that would be markup."""
    out = tmp_path_factory.mktemp("hostile") / "bundle"
    shutil.copytree(bundle.path, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["labels"] = [HOSTILE] * len(manifest["labels"])
    (out / "manifest.json").write_text(json.dumps(manifest))
    return resealed(out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def port(precise: Bundle, hostile: Path) -> Iterator[int]:
    with serving(f"digits={precise.path}", f"exact={precise.path}@int8", f"hostile={hostile}") as port:
        yield port


@pytest.fixture
def shown(browser: Browser, port: int) -> Iterator[Browser]:
    """The page, freshly loaded, whose console has nothing to complain of at the end."""
    browser.open(f"http://127.0.0.1:{port}/")
    browser.wait(READY)
    browser.errors.clear()
    yield browser
    assert browser.errors == []


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture in colour, wider than it is high and no multiple of the network's images."""
    y, x = np.mgrid[:61, :97]
    noise = np.random.default_rng(0).normal(0, 20, (61, 97, 3))
    waves = np.stack([127 + 120 * np.sin(x / 9), 127 + 120 * np.cos(y / 7 + x / 30), 2.0 * x + y], -1)
    file = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8)).save(file)
    return file
