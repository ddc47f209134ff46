"""Measure one row of a table with one seed: train its network, evaluate it, and write the record."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.attacks.resumable_run import classes_of
from mpdsgr_deploy.bundle import MANIFEST, open_bundle
from mpdsgr_deploy.checkpoint import Checkpoint, load_checkpoint
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.defences import DEFENCES
from mpdsgr_deploy.diagnostics.distribution import measure as layer_potentials
from mpdsgr_deploy.diagnostics.membrane import RANGE, Membrane
from mpdsgr_deploy.experiments import variants
from mpdsgr_deploy.experiments.record_files import RECORDS, put_record
from mpdsgr_deploy.experiments.records import KEY, AttackedExport, AttackedNetwork, Record, Start, WholeTestSet
from mpdsgr_deploy.experiments.sensitivity import sensitivity
from mpdsgr_deploy.experiments.table import ExportSpec, TableSpec
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.progress import log, track
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Gate, Recipe
from mpdsgr_deploy.runtime.session import CUDA
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.schema import parse
from mpdsgr_deploy.trained_networks import load_network
from mpdsgr_deploy.training import train
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.evaluate import evaluate
from mpdsgr_deploy.validation.report import Report

CHECKPOINT = "last"
LOOKED_AT = 500  # largest number of test images for sensitivity and membrane potentials
EVALUATION = {"attack", "validation"}  # sections of a recipe, besides gate, that training does not depend on

assert variants.DEPTHS  # imported to register the defences and models that studies name


@dataclass(frozen=True)
class Places:
    """The directories of training runs, of data sets, and of results."""

    runs: Path
    root: str
    out: Path


@dataclass(frozen=True)
class Run:
    """One row of a table with one seed.

    name: of the table. init: the run whose weights training starts from; None: random ones. sender: the run whose
    network is attacked for images that are tried on this one too.
    """

    name: str
    table: TableSpec
    row: str
    recipe: Recipe
    places: Places
    init: "Run | None" = None
    sender: "Run | None" = None

    def __str__(self) -> str:
        return f"{self.row}, seed {self.recipe.training.seed}"

    @property
    def folder(self) -> Path:
        """The directory of the table's records."""
        return self.places.out / self.name

    @property
    def local_recipe(self) -> Recipe:
        """The recipe with this machine's directory of data sets."""
        return self.recipe.model_copy(update={"data": self.recipe.data.at(self.places.root)})

    @property
    def directory(self) -> Path:
        """The training directory, whose name depends on everything in the recipe that training depends on.

        Values that are defaults are left out, so that a key that a later version adds causes no retraining. If a
        default changes, training refuses the directory.
        """
        content = self.recipe.model_dump(mode="json", exclude={*EVALUATION, "gate"}, exclude_defaults=True)
        content["defence"] = {name: chosen_settings(name, values) for name, values in self.recipe.defence.items()}
        if self.init is not None:
            content["init"] = self.init.directory.name
        return self.places.runs / self.name / f"{self.row}-seed{self.recipe.training.seed}-{digest(content)}"


def chosen_settings(defence: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a defence that differ from its defaults. Raises InputError for invalid settings."""
    settings = parse(DEFENCES.choose(defence).Settings, values, f"[defence.{defence}]")
    return settings.model_dump(mode="json", exclude_defaults=True)


def digest(content: Any) -> str:
    """Return eight hexadecimal digits that identify a JSON-ready value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def trained(run: Run) -> Path:
    """Return the directory of the last checkpoint of a run, after training or continuing it if necessary.

    The network of the last epoch is evaluated, because chance decides which epoch scores best on few validation images,
    and rows of different epochs would differ in more than their method. Raises InputError as training does.
    """
    init = None if run.init is None else trained(run.init)
    train(run.local_recipe, run.directory, resume=True, init=init)
    return run.directory / CHECKPOINT


def measure(run: Run) -> Record:
    """Train the network of a run unless it is trained already, evaluate it, and write and return the record.

    Raises InputError as training, export and evaluation do.
    """
    recipe, table, checkpoint_dir = run.recipe, run.table, trained(run)
    evaluation, artefacts = None, {}
    if table.artefact is None:  # attacked as the recipe says now, not as it did when the network was trained
        sender = None if run.sender is None else run.sender.directory / CHECKPOINT
        also = table.pgd_within(recipe.attack)
        evaluated = evaluate(checkpoint_dir, run.local_recipe, transfer=sender, tier=table.tier, also=also)
        evaluation = AttackedNetwork.of(evaluated)
    else:
        reports = validated_exports(run, table.artefact, checkpoint_dir)
        artefacts = {precision: AttackedExport.of_report(report) for precision, report in reports.items()}
    checkpoint, model = load_network(checkpoint_dir)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    n = (evaluation or next(iter(artefacts.values()))).n
    test = load_test(run.local_recipe.data)
    images = test[: min(n, LOOKED_AT)]
    history = checkpoint.history
    drawn = table.artefact is not None and table.artefact.membranes is not None
    record = Record(
        table=run.name,
        row=run.row,
        seed=recipe.training.seed,
        suite=table.suite,
        checkpoint=CHECKPOINT,
        epoch=checkpoint.epoch,
        recipe=recipe,
        seconds=wall_time(checkpoint),
        curve=checkpoint.curve,
        layers=history[-1]["layers"],
        membranes=membranes(model, images, recipe) if drawn else [],
        tier=table.tier,
        torch=evaluation,
        artefacts=artefacts,
        test_set=whole_test_set(model, test, recipe),
        sensitivity=sensitivity(model, images, recipe),
        provenance=checkpoint.provenance,
        init=start_of(run),
    )
    put_record(run.folder / RECORDS, record, KEY)
    return record


def start_of(run: Run) -> Start | None:
    """Return the network that a trained run started from; None for random weights."""
    if run.init is None:
        return None
    checkpoint, before = load_checkpoint(run.init.directory / CHECKPOINT), start_of(run.init)
    return Start(
        row=run.init.row,
        seed=run.init.recipe.training.seed,
        epoch=checkpoint.epoch,
        weights_sha256=checkpoint.weights_sha256,
        seconds=round(wall_time(checkpoint) + (before.seconds if before else 0), 1),
    )


def wall_time(checkpoint: Checkpoint) -> float:
    """Return the time in s that the epochs up to a checkpoint took."""
    return round(sum(entry["seconds"] for entry in checkpoint.history), 1)


def validated_exports(run: Run, artefact: ExportSpec, checkpoint: Path) -> dict[str, Report]:
    """Export a run's network and validate it; return the reports, without example images, by precision.

    Uses a GPU if onnxruntime finds one. Finished reports are kept in the run's directory, and interrupted validations
    continue. checkpoint: the directory of the checkpoint to export.
    """
    backend = "onnxruntime-cuda" if CUDA in onnxruntime.get_available_providers() else "onnxruntime-cpu"
    settings = artefact.model_dump(mode="json", exclude={"membranes"})
    depends_on = [run.recipe.model_dump(mode="json", include={*EVALUATION, "gate"}), settings, backend]
    folder = run.directory / f"deployed-{digest(depends_on)}"
    bundle = folder / "bundle"
    if not (bundle / MANIFEST).exists():
        others = [name for name in artefact.precisions if name != "fp32"]
        root, limit = run.places.root, run.recipe.validation.limit
        export(checkpoint, bundle, recipe=run.recipe, precisions=others, root=root, limit=limit, tier=artefact.tier)
    reports = {}
    gate = Gate(tier=artefact.tier, max_drop=artefact.max_drop)
    for precision in artefact.precisions:
        file = folder / f"{precision}.json"
        if not file.exists():
            log.info("%s: %s on %s", run.directory.name, precision, backend)
            target = Target(open_bundle(bundle), backend, precision)
            report = validate(target, gate=gate, report_dir=folder / precision)
            without_pictures = report.model_copy(update={"examples": []})
            write_atomic(file, without_pictures.model_dump_json().encode())
        reports[precision] = Report.model_validate_json(file.read_bytes())
    return reports


def whole_test_set(model: SpikingNet, test: Images, recipe: Recipe) -> WholeTestSet:
    """Classify all test images, without attack, as `evaluate` does. Raises OutOfMemory if memory runs out."""
    network, batch_size = TorchModel(model, test.shape, recipe.validation.seed), recipe.validation.batch_size
    correct = 0
    for start in track(range(0, len(test), batch_size), "all test images"):
        batch = test[start : start + batch_size]  # the whole set as float32 can be larger than memory
        correct += int((classes_of(network(batch.unit())) == batch.classes).sum())
    return WholeTestSet(n=len(test), correct=correct, provenance=provenance())


def membranes(model: SpikingNet, images: Images, recipe: Recipe) -> list[Membrane]:
    """Return histograms of every layer's membrane potentials over all steps and channels, within `RANGE`."""
    noise = torch.Generator().manual_seed(recipe.validation.seed)
    device = next(model.parameters()).device
    x = torch.from_numpy(images.unit()).to(device)
    histograms = []
    for layer in layer_potentials(model, x, batch_size=recipe.validation.batch_size, noise=noise):
        counts = layer.counts.sum((0, 1)).double()
        share = (counts / (layer.size * layer.counts.shape[0] * layer.counts.shape[1])).numpy()
        edges = layer.edges.double().numpy() - layer.v_threshold
        inside = np.flatnonzero((share > 0) & (edges[:-1] >= RANGE[0]) & (edges[1:] <= RANGE[1]))
        used = slice(inside[0], inside[-1] + 1) if len(inside) else slice(0)
        histograms.append(
            Membrane(
                layer=layer.layer,
                half_width=layer.half_width,
                start=float(edges[used.start or 0]),
                width=float(edges[1] - edges[0]),
                share=[round(float(value), 6) for value in share[used]],
            )
        )
    return histograms
