"""Skips tests where packages are left out on purpose: the extras `train` and `ray`.

A package of any other extra that is missing fails its tests, since pyproject.toml should have named it.
"""

import re
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path

import pytest

HAS_TORCH = find_spec("torch") is not None
LEFT_OUT = {
    "torch",
    "torchvision",
    "lightning_fabric",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "sklearn",
    "tensorboard",
    "foolbox",
    "ray",
}


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Leave out the files that import what is left out."""
    report = yield
    skip_where_left_out(report, collector.path)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip the tests that need it later."""
    report = yield
    skip_where_left_out(report, item.path)
    return report


def skip_where_left_out(report: pytest.CollectReport | pytest.TestReport, path: Path) -> None:
    missing = set(re.findall(r"No module named '(\w+)", str(report.longrepr))) & LEFT_OUT
    if report.failed and not HAS_TORCH and missing:
        report.outcome = "skipped"
        report.longrepr = (str(path), 0, f"Skipped: needs {', '.join(sorted(missing))}")
