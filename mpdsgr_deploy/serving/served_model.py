"""One version of a model: a bundle's network, opened and checked on its golden batch, its metadata, and the evidence of
its robustness, which comes from the bundle and from a report beside it.
"""

import json
import threading
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.manifest import Prepared
from mpdsgr_deploy.onnx_files import read_network
from mpdsgr_deploy.runtime import machine_settings, open_predictor
from mpdsgr_deploy.runtime.firing import PROVIDERS, FiringRates, spike_names
from mpdsgr_deploy.runtime.image_batches import check_images
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.tuning import measured_at_start
from mpdsgr_deploy.serving.batcher import ModelLane, Outputs
from mpdsgr_deploy.serving.refusals import invalid
from mpdsgr_deploy.serving.settings import Limits
from mpdsgr_deploy.serving.source import ModelSource
from mpdsgr_deploy.serving.statistics import Statistics
from mpdsgr_deploy.serving.tensors import ImageInput
from mpdsgr_deploy.signing.verdict import Vouched

MARGIN, FIRING_RATE = "margin", "firing_rate"
VERSION_DIGITS = 12  # digits of the bundle's digest in a version, which is the same for replicas and after restarts


class OpenedBundle(Bundle):
    """A bundle with the golden batch of one precision in memory, so that later changes of its files have no effect."""

    def __init__(self, bundle: Bundle, precision: str) -> None:
        super().__init__(bundle.path, bundle.manifest, bundle.signed)
        self._precision, self._golden = precision, bundle.golden(precision)
        self._measured: list[Prepared] = []

    def measure(self, backend: str, cores: int, known: RuntimeSettings | None) -> RuntimeSettings | None:
        """Return the settings of a backend: the bundle's if they need no more than `cores`, else `known`, else measure.

        Returns None for a backend without settings. The settings are then part of `prepared`.
        """
        if backend not in machine_settings.PACKAGES:
            return None
        settings = machine_settings.prepared_settings(self, backend, self._precision)
        if settings == RuntimeSettings() or (settings.threads or cores) > cores:
            settings = known or measured_at_start(backend, self, self._precision, cores)
            self._measured = [machine_settings.prepared(self, backend, self._precision, settings)]
        return settings

    def prepared(self, backend: str, precision: str) -> list[Prepared]:
        """Return the bundle's entries for a backend and precision, after those that were measured by `measure`."""
        return [*self._measured, *super().prepared(backend, precision)]

    def golden(self, precision: str = "fp32") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self._golden if precision == self._precision else super().golden(precision)


class ServedModel:
    """A served version of a model on `backend`, which may use `cores` cores. lane: the queue of its requests.

    settings: those of the version before, because a measurement during live traffic would be unreliable; None: measure
    them, if the bundle has none. Raises InputError and EvaluationError as `open_predictor` does, and for a bundle that
    changes meanwhile or does not have the signatures that its source demands.
    """

    def __init__(
        self, source: ModelSource, backend: str, limits: Limits, cores: int, settings: RuntimeSettings | None = None
    ) -> None:
        self.source, self.backend, self.settings = source, backend, settings
        self._stack = ExitStack()
        try:
            self._open(limits.batch, limits.queue, cores)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, most: int, room: int, cores: int) -> None:
        demand = self.source.demand
        self._bundle = OpenedBundle(demand.open(self.source.path), self.source.precision)
        manifest, signed = self._bundle.manifest, self._bundle.signed
        self.signer = signed.signer if signed else ""
        self.vouched = demand.verdict(self._bundle, self.source.precision)
        self.digest, self.labels, self.output = manifest.digest, manifest.labels, manifest.output_name
        self.version = manifest.digest[:VERSION_DIGITS]
        self.settings = self._bundle.measure(self.backend, cores, self.settings)
        self._predictor = self._stack.enter_context(open_predictor(self._bundle, self.backend, self.source.precision))
        self.input = ImageInput(manifest.input_name, manifest.input_shape, most)
        self._rates: FiringRates | None = None
        self._rates_lock = threading.Lock()
        self.layers: tuple[str, ...] = ()
        if self.backend in PROVIDERS:
            self._network = read_network(self._bundle.variant(self.source.precision))
            with suppress(InputError):  # an adopted network need not name its spikes
                self.layers = tuple(spike_names(self._network, self.source.path))
        if signed is None and open_bundle(self.source.path).manifest.digest != self.digest:
            raise InputError(f"{self.source.path} was changed while it was being opened; load it again")
        golden, _ = self._bundle.golden(self.source.precision)
        self.evidence = evidence(self._bundle, self.source.precision, golden, self.vouched)
        self.statistics = Statistics()
        self.lane = ModelLane(self._compute, self.statistics, most, room, self.input.pixel_problem)

    def _compute(self, images: NDArray[np.float32], rates: bool) -> Outputs:
        check_images(images, self.input.shape)  # independent of the backend
        if not rates:
            return Outputs(self._predictor(images))
        with self._rates_lock:  # a second network takes memory, so the first request for rates opens it
            if self._rates is None:
                firing = FiringRates(self._bundle, self.backend, self.source.precision, network=self._network)
                self._rates = self._stack.enter_context(firing)
        return Outputs(*self._rates(images))

    def close(self) -> None:
        self._stack.close()
        self.lane.close()

    @property
    def outputs(self) -> dict[str, list[int]]:
        """The shapes of the outputs by name, with -1 for the batch; a request that names none gets the first."""
        shapes = {self.output: [-1, len(self.labels)], MARGIN: [-1]}
        return {**shapes, FIRING_RATE: [-1, len(self.layers)]} if self.layers else shapes

    def require_output(self, name: str, classes: int) -> None:
        """Raise Refused unless the output exists and, if `classes` is not 0, can be returned as classes."""
        if name not in self.outputs:
            raise invalid(f"there is no output {name[:100]!r}; the outputs are {', '.join(self.outputs)}")
        if classes and name != self.output:
            raise invalid(f"classification is only available for the output {self.output!r}, not for {name!r}")

    def metadata(self) -> dict[str, Any]:
        """Return the model's metadata in the JSON form of the protocol."""
        tensor = {"name": self.input.name, "datatype": "FP32", "shape": [-1, *self.input.shape]}
        outputs = [{"name": n, "datatype": "FP32", "shape": shape} for n, shape in self.outputs.items()]
        return {
            "name": self.source.name,
            "versions": [self.version],
            "platform": f"mpdsgr_{self.backend}",
            "inputs": [tensor],
            "outputs": outputs,
        }

    def config(self) -> dict[str, Any]:
        """Return the model configuration extension, in the JSON form of Triton's ModelConfig."""
        parameters = {
            "precision": self.source.precision,
            "backend": self.backend,
            "bundle_sha256": self.digest,
            "firing_rate_layers": ",".join(self.layers),
            "labels": ",".join(self.labels),
            "signed_by": self.signer,
            "signed_verdict": self.vouched.verdict.line if self.vouched else "",
        }
        outputs: list[dict[str, Any]] = [
            {"name": name, "data_type": "TYPE_FP32", "dims": shape[1:] or [1]} for name, shape in self.outputs.items()
        ]
        outputs[1]["reshape"] = {"shape": []}  # the margin is [B], which dims cannot express
        return {
            "name": self.source.name,
            "platform": f"mpdsgr_{self.backend}",
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": self.input.most,
            "input": [{"name": self.input.name, "data_type": "TYPE_FP32", "dims": list(self.input.shape)}],
            "output": outputs,
            "dynamic_batching": {},
            "parameters": {key: {"string_value": value} for key, value in parameters.items()},
        }


def evidence(
    bundle: Bundle, precision: str, golden: NDArray[np.float32], vouched: Vouched | None = None
) -> dict[str, Any]:
    """Return the JSON data of /status about a network's robustness.

    golden: float32 [G, C, H, W], whose mean tells a viewer whether images are light on dark. In the result, `methods`
    are the defences of its training and `reference` has counts of right answers. `validation` is the verdict of the
    newest report beside the bundle that is about this network; None without one, and if signatures are demanded.
    `signature` says who signed the bundle and, with the counts of its conditions, a verdict on it; None if no signature
    was demanded and thus none was verified.
    """
    manifest, promise = bundle.manifest, bundle.manifest.reference
    reference = None
    if promise is not None:
        reference = {
            "data": promise.data,
            "n": promise.n,
            "clean": promise.correct.get("clean"),
            "worst": promise.correct.get("worst"),
            "eps": manifest.recipe.attack.eps,
        }
    return {
        "digest": manifest.digest,
        "methods": sorted(name for name, settings in dict(manifest.recipe.defence).items() if settings is not None),
        "time_steps": manifest.time_steps if manifest.origin == "trained" else None,
        "reference": reference,
        "golden_mean": round(float(golden.mean()), 4),
        "validation": None if bundle.signed else _validation(bundle, precision),
        "signature": bundle.signed and _signature(bundle.signed.signer, vouched),
    }


def _signature(signer: str, vouched: Vouched | None) -> dict[str, Any]:
    verdict = None if vouched is None else {"line": vouched.verdict.line, "correct": vouched.verdict.counts()}
    return {"signer": signer, "verdict": verdict}


def _validation(bundle: Bundle, precision: str) -> dict[str, Any] | None:
    """Return the verdict of the newest report, in the usual places beside the bundle, that is about this network."""
    path, sha = bundle.path.absolute(), bundle.model_sha256(precision)
    places = [path.with_name(f"{path.name}-report"), path.parent / "report", *(path.parent / "reports").glob("*")]
    reports = [file for place in places if (file := place / "report.json").is_file()]
    for file in sorted(reports, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            report = json.loads(file.read_bytes())
            if report["artefact_sha256"] == sha:
                return {key: str(report[key]) for key in ("verdict", "tier", "backend", "images")}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a report of this package
    return None
