"""The sections that the pages of tables and of studies share."""

from statistics import fmean

from mpdsgr_deploy.experiments.markdown import markdown
from mpdsgr_deploy.experiments.records import Measured, Record, Start
from mpdsgr_deploy.experiments.row_comparison import omega, validation_accuracy
from mpdsgr_deploy.experiments.table import TableSpec


def seeds(records: list[Record]) -> str:
    return ", ".join(map(str, sorted(record.seed for record in records)))


def unmeasured(table: TableSpec, measured: Measured) -> str:
    """Return a sentence with the rows, or the seeds of rows, that have no record; empty if there are none."""
    absent = [row.title for row in table.rows if row.title not in measured]
    missing = [", ".join(absent)] if absent else []
    planned = {title: table.seeds_of(table.row(title)) for title in measured}
    for seed in sorted(set().union(*planned.values())):
        titles = [t for t, own in planned.items() if seed in own and all(r.seed != seed for r in measured[t])]
        missing += [f"seed {seed} of {', '.join(titles)}"] if titles else []
    return f"Not measured: {'; '.join(missing)}." if missing else ""


def union_suite(measured: Measured) -> str:
    """Return a sentence with the version of the attacks, which all records share that are not outdated."""
    return f"Union: measured with suite {next(iter(measured.values()))[0].suite}."


def unhealthy(measured: Measured) -> str:
    """List the health checks that failed, with their findings, and state how many evaluations were checked."""
    records = [record for row in measured.values() for record in row]
    checked = [record for record in records if record.attacked.health]
    lines = [f"Health checks were made in {len(checked)} of {len(records)} evaluations. {union_suite(measured)}"]
    for record in checked:
        failed = [check for check in record.attacked.health if not check.passed]
        lines += [f"- {record.row}, seed {record.seed}: check {c.number} ({c.name}) failed: {c.saw}" for c in failed]
    return "\n".join([lines[0], "", *lines[1:]] if lines[1:] else lines)


def accuracy_on_test_set(records: list[Record]) -> str:
    """Return the accuracy in % on all test images, averaged over seeds; "-" if a record lacks it."""
    test_sets = [record.test_set for record in records if record.test_set is not None]
    return f"{100 * fmean(t.accuracy for t in test_sets):.2f}" if len(test_sets) == len(records) else "-"


def behaviour(measured: Measured) -> str:
    """Show membrane statistics, and the effect of perturbations in units of the margin, averaged over seeds."""
    rows = []
    for title, records in measured.items():
        effects = [record.sensitivity for record in records if record.sensitivity["n"]]
        layers = [record.layers for record in records]

        def mean(values: list[float]) -> str:
            return f"{fmean(values):.2f}" if values else "-"

        firing = [fmean(of_run[end]["firing_rate"] for of_run in layers) for end in (0, -1)]
        drops = [mean([e[kind] / e["margin"] for e in effects]) for kind in ("promised", "noise", "pgd")]
        flipped = [list(e["flipped_pgd"].values()) for e in effects]
        flips = " / ".join(f"{fmean(shares[end] for shares in flipped):.3f}" for end in (0, -1)) if flipped else "-"
        cells = [
            f"{validation_accuracy(records):.1f}",
            accuracy_on_test_set(records),
            f"{omega(records):.3f}",
            f"{firing[0]:.3f} / {firing[1]:.3f}",
        ]
        rows.append([title, *cells, mean([e["margin"] for e in effects]), *drops, flips])
    activity = ["row", "validation", "test", "Omega", "firing rate, first / last layer"]
    attack = ["margin", "promised / margin", "noise / margin", "pgd / margin", "flipped by pgd, first / last layer"]
    note = (
        "`validation` and `test` are the accuracy in % on all validation images after the last epoch and on all test "
        "images; `-`: not measured. "
        "`promised` is the drop of the margin (true logit minus the best other) that the surrogate gradient announces "
        "for a step of eps, `noise` and `pgd` the drop that really follows, on images the network gets right; see "
        "`mpdsgr_deploy/experiments/sensitivity.py`."
    )
    return markdown([*activity, *attack], rows) + f"\n\n{note}"


def sources(measured: Measured) -> str:
    """List the checkpoint that was evaluated, then images, hardware, versions and revisions without repetition."""
    records = [record for row in measured.values() for record in row]
    lines = set()
    for record in records:
        attacked = record.attacked
        for what, origin in (("training", record.provenance), ("evaluation", attacked.provenance)):
            machine = origin["hardware"]
            devices = ", ".join([f"{machine['cpu']}, {machine['cores']} cores", *machine.get("gpus", [])])
            subject = f" of {origin.get('network', 'the trained network')} on {attacked.images}"
            versions = f"torch {origin['packages']['torch']}, revision {origin['revision']}"
            lines.add(f"- {what}{subject if what == 'evaluation' else ''}: {devices}; {versions}")
    checkpoints = " and ".join(sorted({f"`{record.checkpoint}`" for record in records}))
    return "\n".join([f"- evaluated checkpoint: {checkpoints}", *exceptions(records), *sorted(lines)])


def exceptions(records: list[Record]) -> list[str]:
    """Return a line for each run that was cut before its last epoch, and for each network that runs started from."""
    lines: list[str] = []
    started: dict[Start, Measured] = {}
    for record in records:
        steps = record.curve.get("T", [record.recipe.encoding.T])[-1]
        if record.epoch < (epochs := record.recipe.training.epochs):
            cut = f"cut after epoch {record.epoch} of {epochs}, at T = {steps}"
            lines.append(f"- {record.row}, seed {record.seed}: {cut}")
        if record.init is not None:
            started.setdefault(record.init, {}).setdefault(record.row, []).append(record)
    for start, rows in started.items():
        lines.append(
            f"- started from {start}: {'; '.join(f'{row}, seed {seeds(of_row)}' for row, of_row in rows.items())}"
        )
    return lines
