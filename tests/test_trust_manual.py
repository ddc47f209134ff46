"""The manual of signatures and verdicts shows commands that work."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import mpdsgr_here
from served import BUNDLE
from signatures import report_of, stock

from mpdsgr_deploy.demand import demand_of


def test_the_manual_shows_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines in their order; a report stands in for the one that takes minutes, and a server in this process."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "bundles" / "digits"
    shutil.copytree(BUNDLE, place)
    np.save("images.npy", np.zeros((1, 1, 8, 8), np.float32))
    (tmp_path / "reports").mkdir()
    text = (Path(__file__).parent.parent / "export" / "TRUST.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    programs = []
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        programs.append(words[0] if program == "mpdsgr" else program)
        if words[0] == "validate":
            report_of(place, tmp_path / "reports" / "digits", tier="release")
        elif words[0] == "serve":
            key, tier = words[words.index("--require-signature") + 1], words[words.index("--require-verdict") + 1]
            demand = demand_of(key, tier)
            assert demand.verdict(demand.open(Path(words[1])), "fp32")
        elif program == "mpdsgr":
            done = mpdsgr_here(*words)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
        elif program == "model_signing":
            assert "succeeded" in stock(*words)
        else:
            subprocess.run([program, *words], check=True, capture_output=True)
    assert programs[:2] == ["openssl", "openssl"]
    assert programs[2:] == ["validate", "sign", "verify", "verify", "model_signing", "predict", "serve", "deploy"]
