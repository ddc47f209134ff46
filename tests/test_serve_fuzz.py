"""benchmarks/fuzz.py: its page shows its file, it finds nothing in a short run, and it would find what is wrong."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fuzz
import harness
from fuzz_cases import case

NOTHING = {"5xx": 0, "hung": 0, "wrong": 0, "accepted": 0}


def test_the_page_quotes_the_file() -> None:
    result = harness.load("fuzz")
    file, text = harness.page("fuzz", fuzz.render(result))
    assert file.read_text() == text
    assert result["cases"] >= 100_000
    assert result["wrong"] == NOTHING
    assert result["provenance"]["revision"]


def test_a_short_run() -> None:
    result = fuzz.run(600, seed=1, seconds=60)
    assert (result["cases"], result["wrong"], result["errors_logged"], result["exit_code"]) == (600, NOTHING, 0, 0)
    assert result["compared"] >= 30
    assert {"http 200", "http 400", "http 404", "grpc OK", "grpc INVALID_ARGUMENT"} <= result["codes"].keys()


def test_a_wrong_logit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = fuzz.Found.compare
    monkeypatch.setattr(fuzz.Found, "compare", lambda self, which, logits: compare(self, which, logits + 0.01))
    result = fuzz.run(100, seed=1, seconds=60)
    assert result["wrong"]["wrong"] == result["compared"] > 0


def test_a_case_is_the_same_each_time_and_its_numbers_can_be_read() -> None:
    read = 0
    for number in range(500):
        one, other = (case(random.Random(f"0/{number}")) for _ in range(2))
        assert one[:3] == other[:3]
        try:
            x = one.carried()
        except Exception:
            continue
        read += 1
        assert np.array_equal(x, other.carried(), equal_nan=True)
    assert read > 100
