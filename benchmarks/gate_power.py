"""How often the gate refuses a network that is worse, and one that is not: simulated from verdicts that were measured.

    python benchmarks/gate_power.py      writes benchmarks/results/gate_power.json and the table of benchmarks/README.md

Verdicts are those of 24 small networks (CIFAR-10, twelve ways of training, one or two seeds) in float32 and in int8,
under every condition that both met (results/gate_pairs.jsonl). What enters is how verdicts depend on each other, not
how strong the attacks were, so the pairs outlive a stronger tier. Images are drawn with replacement, so the dependence
between conditions is the measured one. Which precision counts as the reference is drawn anew for each image: neither
is then better. A true drop turns that share of the images wrong under every condition. `more flips`: besides, each
verdict of either turns round with a probability of 5 %.
"""

import base64
import json
from typing import Any

import harness
import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import WORST
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation import gate as rules
from mpdsgr_deploy.validation.rows import Row

NAME = "gate_power"
PAIRS = harness.RESULTS / "gate_pairs.jsonl"
LIMITS = {100: 0.1, 300: 0.034, 1000: 0.01}  # images: the smallest limit that so many can decide
DROPS = (0.0, 0.03, 0.05, 0.1)
MORE = 0.05
HEALTHY, WORSE = 10_000, 1000  # evaluations drawn without and with a drop
Pair = tuple[list[str], NDArray[np.bool_], NDArray[np.bool_]]  # conditions, verdicts [C, N] of each precision


def pairs() -> list[Pair]:
    """The verdicts of every network in two precisions; the worst case is made of them, so it is left out."""
    lines = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    return [
        (one["conditions"], *(unpacked(one[precision], one["n"]) for precision in ("fp32", "int8"))) for one in lines
    ]


def unpacked(packed: list[str], n: int) -> NDArray[np.bool_]:
    """Verdicts [C, n], of a condition each in base64, a bit for an image."""
    bits = (np.unpackbits(np.frombuffer(base64.b64decode(one), np.uint8))[:n] for one in packed)
    return np.array([*bits], dtype=bool)


def draw(rng: np.random.Generator, pair: Pair, n: int, drop: float, more: float) -> list[Row]:
    """The rows of one evaluation of n images."""
    names, one, other = pair
    chosen, swapped = rng.integers(0, one.shape[1], n), rng.random(n) < 0.5
    reference = np.where(swapped, other[:, chosen], one[:, chosen]) ^ (rng.random((len(names), n)) < more)
    artefact = np.where(swapped, one[:, chosen], other[:, chosen]) ^ (rng.random((len(names), n)) < more)
    artefact &= rng.random(n) >= drop
    conditions = [*zip(names, artefact, reference, strict=True), (WORST, artefact.all(0), reference.all(0))]
    return [Row.of(name, "", right, reference=promised) for name, right, promised in conditions]


def measure() -> dict[str, Any]:
    """Refusals by each condition alone, and with all of them together."""
    networks, rng, cases = pairs(), np.random.default_rng(0), []
    for n, allowed in track(list(LIMITS.items()), "simulated gates"):
        for drop in DROPS:
            for more in (0.0, MORE):
                count = HEALTHY if drop == 0 else WORSE
                alone = together = 0
                for _ in range(count):
                    rows = draw(rng, networks[rng.integers(len(networks))], n, drop, more)
                    gate = Gate(max_drop=allowed)
                    single = any(
                        row.flips and rules.regressed(gate, row.name, n, row.flips.newly_wrong, row.flips.newly_right)
                        for row in rows
                    )
                    alone += single
                    together += bool(single or rules.together(gate, rows))
                case = {"n": n, "limit": allowed, "drop": drop, "more": more, "trials": count}
                cases.append({**case, "alone": alone, "together": together})
    trials = {"healthy": HEALTHY, "worse": WORSE}
    return {"cases": cases, "trials": trials, "networks": len(networks), "seed": 0}


def render(result: dict[str, Any]) -> str:
    rows = [
        [
            case["n"],
            f"{case['limit']:.1%}",
            f"{case['drop']:.0%}" if case["drop"] else "none: false alarm",
            "yes" if case["more"] else "no",
            *(f"{100 * case[rule] / case['trials']:.1f}" for rule in ("alone", "together")),
        ]
        for case in result["cases"]
    ]
    healthy, worse = (
        {case["trials"] for case in result["cases"] if bool(case["drop"]) == drop}.pop() for drop in (0, 1)
    )
    header = ("images", "limit", "true drop", "more flips", "each condition alone, %", "and all together, %")
    draws = f"{healthy:,} draws without a drop and {worse:,} with one, seed {result['seed']}"
    return harness.table(header, rows, f"{result['networks']} networks, {draws}. {harness.source(result)}")


main = harness.command(NAME, measure, render)

if __name__ == "__main__":
    main()
