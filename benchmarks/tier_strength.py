"""What every attack of a tier leaves and costs, on bundles and training runs, beside the research attack.

    python benchmarks/tier_strength.py export/bundles/digits runs/digits-reg --limit 100
    python benchmarks/tier_strength.py runs/digits-reg --tier "release, before" --tier release --seed 1 --seed 2

Beside each tier stands what it was before MPD-APGD, so that strength and cost can be compared. One line of JSON per
condition goes to benchmarks/results/tiers.jsonl; a condition that has a line already is not measured again. Seconds are
of processor time, one thread, so that other work on the machine does not count.
"""

import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import research
from numpy.typing import NDArray
from schedules import SCHEDULES

from mpdsgr_deploy.attack_graph.attacker import GraphAttacker, Loss
from mpdsgr_deploy.attacks.condition import APGD_CE, APGD_DLR, MPD_APGD, SA_PGD, SQUARE, STRONG
from mpdsgr_deploy.attacks.resumable_run import gather, run
from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.tiers import BASIC, SWEEP, TIERS, TierEntry, entry
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.surrogates import ADAPTIVE, trained_surrogate

RESULTS = Path(__file__).parent / "results" / "tiers.jsonl"
BATCH = 128
SETS: dict[str, tuple[TierEntry, ...]] = {
    "commit, before": tuple(line for line in TIERS["commit"].entries if line.method != "mpd-apgd"),
    "commit": TIERS["commit"].entries,
    "release, before": (
        *BASIC,
        entry("strong-pgd", STRONG, rank=3),
        *SWEEP,
        entry("sa-pgd", SA_PGD, steps=100),
        entry("apgd", APGD_CE, loss="ce", steps=100),
        entry("apgd", APGD_DLR, loss="dlr", steps=100),
        entry("square", SQUARE, queries=1000),
    ),
    "release": TIERS["release"].entries,
}
TRIALS = {name: (entry("mpd-apgd", MPD_APGD, schedule=schedule),) for name, schedule in SCHEDULES.items()}


@click.command()
@click.argument("networks", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tier", "tiers", multiple=True, type=click.Choice([*SETS, *TRIALS]), default=list(SETS))
@click.option("--root", help="Where the data set lies.  [default: the recipe's]")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Test images.")
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(0), default=(0,), help="Of random starts.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    networks: tuple[Path, ...],
    tiers: tuple[str, ...],
    root: str | None,
    limit: int,
    seeds: tuple[int, ...],
    out: Path,
) -> None:
    """Attack each of NETWORKS with every condition of each tier and append a line per condition."""
    for path in networks:
        with research.opened(path, root, limit) as network:
            for seed, tier in product(seeds, tiers):
                for line in conditions(network, tier, seed, out):
                    click.echo(
                        f"{network.name}, {tier}, seed {seed}, {line['condition']}: {sum(line['correct'])} of "
                        f"{line['n']} right, {line['evaluations']} evaluations, {line['seconds']} s"
                    )


def conditions(network: research.Network, tier: str, seed: int, out: Path) -> Iterator[dict[str, Any]]:
    """The lines of a tier's conditions within eps, old and new; new ones are appended to `out`."""
    attacked = OnnxNetwork(network.file)
    recipe, x, y = network.recipe, network.images.unit(), network.images.classes
    clean = attacked(x).argmax(1)
    source = Source(attacked, trained_surrogate(recipe))
    suite = Suite.of(source, (SETS | TRIALS)[tier], recipe.attack, seed=seed)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for condition in (condition for condition in suite.conditions if condition.eps is not None):
        key = {
            "network": network.name,
            "sha256": research.sha256(network.file),
            "n": len(y),
            "tier": tier,
            "seed": seed,
            "condition": condition.name,
            "settings": condition.settings,
        }
        line = next((one for one in lines if {name: one[name] for name in key} == key), None)
        if line is None:
            started = time.process_time()
            made, predicted = gather(list(run(suite, condition, x, y, clean, batch_size=BATCH)))
            line = {
                **key,
                "kind": condition.kind,
                "clean": (clean == y).tolist(),
                "correct": (predicted == y).tolist(),
                "evaluations": made.evaluations,
                "seconds": round(time.process_time() - started, 1),
                "provenance": provenance(),
            }
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        yield line


class OnnxNetwork:
    """An ONNX file as `Suite` attacks it, on one thread of onnxruntime."""

    stochastic = False

    def __init__(self, file: Path) -> None:
        self._file, self._predict = file, OnnxRuntime(file, settings=research.ONE_THREAD)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._predict(x)

    def attacker(self, surrogate: str, *, loss: Loss, draws: int) -> GraphAttacker:
        """Through a surrogate by name."""
        return GraphAttacker(self._file, surrogate, loss=loss, settings=research.ONE_THREAD)

    def adaptive(self, *, draws: int) -> GraphAttacker:
        """Through surrogates that adapt."""
        return self.attacker(ADAPTIVE, loss="ce", draws=draws)


if __name__ == "__main__":
    main()
