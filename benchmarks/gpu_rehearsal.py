"""gpu.py rehearsed on a CPU from end to end: every step runs, at a size that shows nothing but that it works.

python benchmarks/gpu_rehearsal.py      writes benchmarks/results/gpu_rehearsal.json and the table of README.md
"""

import tempfile
from pathlib import Path
from typing import Any

import click
import gpu
import harness


@click.option("--step", "names", multiple=True, type=click.Choice([*gpu.STEPS]), help="Only this; again for more.")
def run(names: tuple[str, ...]) -> dict[str, Any]:
    """Rehearse the steps of gpu.py."""
    with tempfile.TemporaryDirectory() as out:
        return gpu.run_steps(Path(out), "data", 60, names or tuple(gpu.STEPS), "cpu")


def render(result: dict[str, Any]) -> str:
    """What each step took and how many results it kept."""
    rows = [
        [name, gpu.STEPS[name].question, step["state"], len(step["notes"]), f"{step['seconds']:.0f}"]
        for name, step in result["steps"].items()
    ]
    return harness.table(["step", "question", "ended", "results", "s"], rows, harness.source(result))


main = harness.command("gpu_rehearsal", run, render)

if __name__ == "__main__":
    main()
