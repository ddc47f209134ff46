"""A copy of a bundle to plant a fault in, made consistent again before it is judged."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from faults.networks import Networks
from mpdsgr_deploy.atomic_files import sha256
from mpdsgr_deploy.bundle import GOLDEN, MANIFEST, WEIGHTS, Manifest, open_bundle
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import InputError, MpdsgrError
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.exporting.precision import convert, plan
from mpdsgr_deploy.exporting.rebuild import check_rebuilt
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.recipe import Gate, Recipe
from mpdsgr_deploy.reference import IMAGES, REFERENCE
from mpdsgr_deploy.runtime import OnnxRuntime, predict
from mpdsgr_deploy.trained_networks import load_model
from mpdsgr_deploy.validation import Target, image_checks, validate
from mpdsgr_deploy.validation.report import EXIT_CODES, Report

Array = NDArray[Any]
# artefact: a fault of the network, which only the reference can reveal. evaluation: a fault of the measurement.
# promise: a fault of what the bundle states about itself.
Place = Literal["artefact", "runtime", "evaluation", "promise"]


class Planted:
    """A copy of a bundle in `path`. Faults change it through these methods and through `patch`; then `seal` it.

    gate: other rules than the recipe's. rebuild: compare with a new export of the weights. transfer: a bundle whose
    attacked images are tried too.
    """

    precision = "fp32"
    backend = "onnxruntime-cpu"
    limit: int | None = None
    gate: Gate | None = None
    rebuild = False
    transfer: Path | None = None
    sealed = False

    def __init__(self, networks: Networks, kind: str, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.networks, self.patch = networks, patch
        self.path = Path(shutil.copytree(networks.bundle(kind).path, path))
        self.manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        self.answered_anew: set[str] = set()

    @property
    def recipe(self) -> Recipe:
        return Recipe.model_validate(self.manifest["recipe"])

    @property
    def _file(self) -> Path:
        return self.path / self.manifest["variants"][self.precision]["file"]

    def load(self) -> onnx.ModelProto:
        return onnx.load(self._file)

    def store(self, network: onnx.ModelProto) -> None:
        """Put another network in place; golden logits will be its own."""
        onnx.save(network, self._file)
        self.answered_anew.add(self.precision)

    def change(self, name: str, how: Callable[[Array], Array]) -> None:
        """Another value for the only constant whose name begins so."""
        network = self.load()
        (constant,) = (i for i in network.graph.initializer if i.name.startswith(name))
        value = numpy_helper.to_array(constant)
        constant.CopyFrom(numpy_helper.from_array(how(value).astype(value.dtype), constant.name))
        self.store(network)

    def constants(self) -> dict[str, Array]:
        return {i.name: numpy_helper.to_array(i) for i in self.load().graph.initializer}

    def append(self, *nodes: NodeProto, **constants: Array) -> None:
        """Nodes behind the network: they read `raw`, what were its logits, and the last gives `logits`."""
        network = self.load()
        for node in network.graph.node:
            node.output[:] = ["raw" if name == "logits" else name for name in node.output]
        network.graph.node.extend(nodes)
        self._give(network, constants)

    def prepend(self, *nodes: NodeProto, **constants: Array) -> None:
        """Nodes before the network: they read `images`, and the last gives `seen`, which the network reads."""
        network = self.load()
        for node in network.graph.node:
            node.input[:] = ["seen" if name == "images" else name for name in node.input]
        kept = list(network.graph.node)
        del network.graph.node[:]
        network.graph.node.extend([*nodes, *kept])
        self._give(network, constants)

    def _give(self, network: onnx.ModelProto, constants: dict[str, Array]) -> None:
        network.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
        self.store(network)

    def export_as(self, **sections: dict[str, Any]) -> None:
        """The same weights exported by a recipe with other values in some sections."""
        values = {name: {**value, **sections.get(name, {})} for name, value in self.manifest["recipe"].items()}
        shape, labels = tuple(self.manifest["input_shape"]), self.manifest["labels"]
        model = load_model(self.path / WEIGHTS, Recipe.model_validate(values), shape, len(labels)).eval()
        graph = to_graph(simplify(model), shape)
        save(convert(graph, plan(graph, self.precision)), self._file)
        self.answered_anew.add(self.precision)

    def hide_data_set(self) -> None:
        """Leave the validation without the data set's own images to hold those of the bundle against."""

        def missing(*_: object) -> Images:
            raise InputError("the data set is not here")

        self.patch.setattr(image_checks, "load_test", missing)

    def take(self, name: str, kind: str = "other") -> None:
        """A file of another network's bundle in place of this one's."""
        shutil.copyfile(self.networks.bundle(kind).path / name, self.path / name)
        if name.startswith("model."):
            self.answered_anew.add(name.split(".")[1])

    def arrays(self, name: str) -> dict[str, Array]:
        """The content of an .npz file of the bundle."""
        with np.load(self.path / name) as found:
            return {key: found[key] for key in found.files}

    def write(self, name: str, arrays: dict[str, Array]) -> None:
        """Another content; figures in the manifest that count it follow."""
        np.savez_compressed(self.path / name, **arrays)
        if name == REFERENCE:
            verdicts = {key.partition("/")[2]: v for key, v in arrays.items() if key.startswith("verdict/")}
            self.manifest["reference"]["correct"] = {key: int(v.sum()) for key, v in verdicts.items()}
            self.manifest["reference"]["n"] = len(arrays["blake2b_64"])

    def seal(self) -> None:
        """Golden logits, int8's kept answers and hashes as an exporter that made this file writes them."""
        self._answer_anew()
        files = self.manifest["files"]
        self.manifest["files"] = {name: sha256(self.path / name) for name in files if (self.path / name).is_file()}
        self.manifest["digest"] = Manifest.model_validate(self.manifest).computed_digest()
        (self.path / MANIFEST).write_text(json.dumps(self.manifest))
        self.sealed = True

    def _answer_anew(self) -> None:
        golden = self.arrays(GOLDEN)
        for precision in self.answered_anew:
            with OnnxRuntime(self.path / self.manifest["variants"][precision]["file"]) as network:
                golden[precision] = network(golden["inputs"])
                reference = self.arrays(REFERENCE)
                if precision != "fp32" and f"logits/{precision}" in reference:
                    images = self.arrays(IMAGES)["pixels"].astype(np.float32) / 255
                    reference[f"logits/{precision}"] = predict(network, images, 128, "")
                    self.write(REFERENCE, reference)
        np.savez(self.path / GOLDEN, **golden)  # type: ignore[arg-type]


@dataclass(frozen=True)
class InProcess(Target):
    """A target that is not asked again from a new process, which takes seconds."""

    def fresh(self) -> None:
        return None


Plant = Callable[[Planted], None]


class Fault(NamedTuple):
    """A planted fault, where it lies, the network it is planted in, and what must notice it.

    caught: words of the error, or of one of the report's reasons; of one that passes, of its remarks. thorough: slow,
    and like another one, so that only the benchmark plants it. helps: what does, against one that passes by design.
    """

    name: str
    story: str
    place: Place
    kind: str
    precision: str
    code: int
    caught: str
    plant: Plant
    thorough: bool
    helps: str = ""


class Outcome(NamedTuple):
    """How a validation ended: the exit code of the command, and everything it said about why."""

    code: int
    said: list[str]
    report: Report | None = None


FAULTS: dict[str, Fault] = {}
UNSEEN: dict[str, Fault] = {}  # those that a validation passes, since nothing in the bundle or on the machine tells


def fault(
    place: Place, code: int, caught: str, *, precision: str = "fp32", kind: str = "healthy", thorough: bool = False
) -> Callable[[Plant], Plant]:
    """Register a function that plants one; its docstring says what went wrong and who would cause it."""

    def register(plant: Plant) -> Plant:
        name, story = named(plant)
        FAULTS[name] = Fault(name, story, place, kind, precision, code, caught, plant, thorough)
        return plant

    return register


def unseen(
    place: Place, remark: str, helps: str, *, kind: str = "healthy", thorough: bool = False
) -> Callable[[Plant], Plant]:
    """Register a function that plants what a validation passes. remark: words of what the report says all the same."""

    def register(plant: Plant) -> Plant:
        name, story = named(plant)
        UNSEEN[name] = Fault(name, story, place, kind, "fp32", 0, remark, plant, thorough, helps)
        return plant

    return register


def named(plant: Plant) -> tuple[str, str]:
    """A fault's name and story, from those of the function that plants it."""
    return plant.__name__.replace("_", " "), " ".join((plant.__doc__ or "").split())


def plant(fault: Fault, networks: Networks, path: Path, patch: pytest.MonkeyPatch) -> Planted:
    """A copy in `path` with the fault in it, sealed unless it broke that itself."""
    copy = Planted(networks, fault.kind, path, patch)
    copy.precision = fault.precision
    fault.plant(copy)
    if not copy.sealed:
        copy.seal()
    return copy


def judge(copy: Planted, kind: type[Target] = Target) -> Outcome:
    """Validate it, as the command does; of what passes, `said` has the report's remarks."""
    rebuild = check_rebuilt if copy.rebuild else None
    try:
        target = kind(open_bundle(copy.path), copy.backend, copy.precision)
        report = validate(target, gate=copy.gate, limit=copy.limit, transfer=copy.transfer, rebuild=rebuild)
    except MpdsgrError as error:
        return Outcome(error.exit_code, [str(error)])
    said = [reason.line for reason in report.reasons] or report.remarks
    return Outcome(EXIT_CODES[report.verdict], said, report)
