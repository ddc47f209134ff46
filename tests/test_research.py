"""The research attack runs on bundles and runs, goes on where it stopped, and aims as it says."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from exporting_once import to_graph
from linear_model import EPS, linear

from mpdsgr_deploy.attacks import apgd
from mpdsgr_deploy.attacks.condition import FGSM, PGD
from mpdsgr_deploy.attacks.tiers import entry
from mpdsgr_deploy.bundle import Bundle

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import research
import research_page
import schedules
import tier_strength


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[research.Attempt]:
    """A portfolio of one attempt per method."""
    attempts = [
        research.Attempt("apgd", "superspike:10", steps=2),
        research.Attempt("apgd", "superspike:10", steps=2, wrong=0),
        research.Attempt("sa-pgd", "adaptive", steps=2),
        research.Attempt("pgd", "triangle:1", "dlr", steps=2),
        research.Attempt("square", steps=3),
        research.Attempt("mpd-apgd", "superspike", steps=1),
        research.Attempt("sa-pgd", "superspike:10", steps=2, layer=0, factor=3),
    ]
    monkeypatch.setitem(research.PORTFOLIOS, "research", lambda: attempts)
    return attempts


def attack(path: Path, out: Path) -> list[dict]:
    done = CliRunner().invoke(research.main, [str(path), "--limit", "6", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_each_attempt_meets_what_the_one_before_left(
    run_dir: Path, tmp_path: Path, small: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(research, "to_graph", to_graph)
    lines = attack(run_dir, tmp_path / "lines.jsonl")
    assert [line["attempt"] for line in lines] == [attempt._asdict() for attempt in small]
    for line, following in pairwise(lines):
        assert following["before"] == line["left"]
        assert set(line["left"]) <= set(line["before"])


def test_a_killed_run_repeats_nothing(bundle: Bundle, tmp_path: Path, small: list) -> None:
    out = tmp_path / "lines.jsonl"
    lines = attack(bundle.path, out)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    again = attack(bundle.path, out)
    assert again[:2] == lines[:2]
    assert [line["left"] for line in again] == [line["left"] for line in lines]
    assert attack(bundle.path, out) == again


def test_layers_that_are_as_sharp_as_the_others_change_nothing(bundle: Bundle) -> None:
    """The torch network behind `layer` against the attack graph."""
    with research.opened(bundle.path, None, 8) as network:
        bench = research.Laboratory(network)
        ordinary = research.Attempt("sa-pgd", "superspike:10", steps=6)
        places = bench.right(bench.x, np.arange(8))
        assert np.array_equal(bench.attack(ordinary, places)[0], bench.attack(ordinary._replace(layer=1), places)[0])


def test_aimed_at_the_only_wrong_class_is_untargeted() -> None:
    target, x, y = linear()
    aimed = research.Aimed(target)
    adversarial = apgd(aimed, x, research.Aimed.encoded(y, 1 - y), eps=EPS, steps=20)
    assert np.array_equal(target(adversarial).argmax(1) != y, target.gap(x) < 0)


def test_every_seed_is_measured_once(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tier_strength.SETS, "release", (entry("fgsm", FGSM), entry("pgd", PGD, steps=2)))
    out, asked = tmp_path / "lines.jsonl", [str(bundle.path), "--tier", "release", "--limit", "6"]
    for seeds in (["0"], ["0", "1"]):
        seed = [word for number in seeds for word in ("--seed", number)]
        done = CliRunner().invoke(tier_strength.main, [*asked, *seed, "--out", str(out)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    lines = research_page.read(out)
    assert [(line["condition"], line["seed"]) for line in lines] == [("fgsm", 0), ("pgd", 0), ("fgsm", 1), ("pgd", 1)]


def seed_line(network: str, tier: str, seed: int, correct: list[bool], seconds: float) -> dict:
    """A line of `tier_strength`, of one condition."""
    about = {"network": network, "sha256": network, "n": len(correct), "tier": tier, "seed": seed, "kind": "gradient"}
    return {**about, "clean": [True] * len(correct), "correct": correct, "evaluations": 8, "seconds": seconds}


def test_seeds_are_counted_one_by_one_and_together() -> None:
    lines = [
        seed_line("a", "release", 0, [True, True, False, False], 3),
        seed_line("a", "release", 1, [True, False, False, True], 1),
        seed_line("a", "release, before", 0, [True] * 4, 1),
        seed_line("a", "release, before", 1, [True] * 4, 1),
        seed_line("b", "release", 0, [True] * 4, 1),
    ]
    attempt = {"sha256": "a", "portfolio": "research", "left": [0]}
    _, _, _, _, row, _, gap = research_page.seed_table([attempt], lines).splitlines()
    assert row == "| a | 2 | 2, 2 | 2.0 | 1 | 1 | 2 | 2.0 | 2.00 |"
    assert gap.endswith("on average over seeds: a +1.0.")


def test_schedules_are_averaged_over_seeds() -> None:
    lines = [seed_line("a", "A", 0, [True] * 3 + [False], 1), seed_line("a", "A", 1, [True] * 4, 1)]
    lines += [seed_line("b", "A", 0, [True] * 4, 1), seed_line("b", "suite 3", 0, [True] * 4, 1)]
    *_, first, second, end = schedules.schedule_table(lines, {"a": (3, 9), "b": None}).split("\n")
    assert (first, second, end) == ("| A | +0.5, 2 (2) | - |", "| suite 3 | - | - |", "")


def test_the_page_quotes_the_files() -> None:
    shown = research_page.PAGE.read_text().partition(research_page.BEGIN)[2].partition(research_page.END)[0]
    files = research.RESULTS, tier_strength.RESULTS, schedules.RESULTS
    assert shown == research_page.render(*map(research_page.read, files))
    assert research_page.PLOT.exists()
