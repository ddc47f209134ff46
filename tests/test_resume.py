"""A validation that was killed goes on where it stopped, and nothing of it is taken for another one's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK_GATE, assert_input_error, mpdsgr, mpdsgr_here, perturbed

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.runtime import GraphAttacker
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.report import PROGRESS, Report

GATE = Gate(images=20, max_drop=0.25)
TIMES = {"seconds", "provenance"}


def with_settings(bundle: Bundle, **validation: Any) -> Bundle:
    """The bundle with other settings of validation in its recipe, as if exported so."""
    recipe = bundle.manifest.recipe
    recipe = recipe.model_copy(update={"validation": recipe.validation.model_copy(update=validation)})
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"recipe": recipe}))


def attempt(bundle: Path, report: Path, *options: object) -> list[str]:
    """A command line, for processes that are to be killed or limited."""
    gate = report.with_suffix(".toml")
    gate.write_text(QUICK_GATE)
    return ["validate", str(bundle), "--gate", str(gate), "--report", str(report), *map(str, options)]


def content(report: Path) -> dict[str, Any]:
    return Report.model_validate_json((report / "report.json").read_text()).model_dump(exclude=TIMES)


def kept(report: Path) -> dict[str, int]:
    """Finished batches on disk, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in (report / PROGRESS).rglob("*.npz")}


def killed(arguments: Sequence[str], report: Path, batch: str) -> dict[str, int]:
    """Run the command, kill it in the attack after `batch`, and return what it leaves."""
    command = [sys.executable, "-m", "mpdsgr_deploy", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while batch not in kept(report):
        assert process.poll() is None, "it ended before that batch"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return kept(report)
