"""What the README shows works as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mpdsgr_deploy.bundle import Bundle

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks(block: str, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "digits").symlink_to(bundle.path)
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, capture_output=True)
