"""What the README shows works as written."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from served import Served

from mpdsgr_deploy.bundle import Bundle

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CLIENTS = [block for block in PYTHON if "tritonclient" in block]
CURL = re.findall(r"^curl .*?(?:\nEOF)?$(?=\n(?:curl|```))", README, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^ {4}(mpdsgr .*?)(?: {2,}#.*)?$", README, re.MULTILINE)


def test_the_path_of_commands(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("L", (20, 30), 128).save(tmp_path / "photos" / "grey.png")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    names = ["recipes", "train", "inspect", "export", "inspect", "validate", "predict", "build", "doctor"]
    assert [line.split()[1] for line in COMMANDS] == names
    for line in COMMANDS:
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "reports" / "digits" / "report.html").exists()
    assert "grey.png" in (tmp_path / "labels.csv").read_text()


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"@[A-Z]+@", README)
    assert not re.findall(r"<!-- table: .* -->\n<!-- end of table -->", README)
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []


def test_figures_in_the_text_stand_in_a_page_that_was_rendered_from_results() -> None:
    root = Path(__file__).parent.parent
    folders = ("train/results", "benchmarks", "export/results")
    pages = "".join(page.read_text() for folder in folders for page in sorted((root / folder).rglob("*.md")))
    code = r"```.*?```|<!-- table:.*?<!-- end of table -->|`[^`]*`|^ {4}.*?$|arXiv [\d.]+|Python 3[\d.]+|3\.12"
    text = re.sub(code, "", README, flags=re.DOTALL | re.MULTILINE)
    figures = re.findall(r"(?<![\w.])\d+\.\d+", text)
    assert len(figures) >= 10
    assert [figure for figure in figures if figure not in pages] == []


@pytest.fixture(scope="module")
def served(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """What the README serves, on ports of this test's own."""
    digits = tmp_path_factory.mktemp("bundles") / "digits"
    digits.symlink_to(bundle.path)
    with Served(digits) as server:
        yield server


def addressed(text: str, served: Served) -> str:
    return text.replace("localhost:8000", f"127.0.0.1:{served.port}").replace("localhost:8001", served.grpc)


@pytest.mark.parametrize("block", CLIENTS, ids=range(len(CLIENTS)))
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_clients_of_the_server(block: str, protocol: str, served: Served) -> None:
    """Each as it stands, and over the other protocol."""
    shown = "http" if "tritonclient.http" in block else "grpc"
    ports = {"http": "localhost:8000", "grpc": "localhost:8001"}
    code = block.replace(f"tritonclient.{shown}", f"tritonclient.{protocol}").replace(ports[shown], ports[protocol])
    done = subprocess.run([sys.executable, "-c", addressed(code, served)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\[\d \d\]", done.stdout)  # two labels


def test_curl_lines(served: Served) -> None:
    metadata, answer = (
        json.loads(subprocess.run(["bash", "-c", addressed(line, served)], capture_output=True, check=True).stdout)
        for line in CURL
    )
    assert metadata["name"] == answer["model_name"] == "digits"
    labels, margin = answer["outputs"]
    assert labels["shape"] == [1, 2]
    values = [float(text.split(":")[0]) for text in labels["data"]]
    assert margin["data"][0] == pytest.approx(values[0] - values[1], abs=1e-5)


@pytest.mark.parametrize("block", [block for block in PYTHON if block not in CLIENTS])
def test_python_blocks(block: str, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "digits").symlink_to(bundle.path)
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, capture_output=True)
