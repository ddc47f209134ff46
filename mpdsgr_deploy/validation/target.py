"""The target of a validation: one precision of a bundle, on a backend of this machine or on a server."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.atomic_files import sha256, writing
from mpdsgr_deploy.attack_graph.attacker import NetworkFile
from mpdsgr_deploy.attacks.condition import TRANSFER, Source
from mpdsgr_deploy.bundle import MANIFEST, Bundle, open_bundle
from mpdsgr_deploy.checkpoint import FILE, find_checkpoint, load_checkpoint
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime import NoiseSource, open_predictor
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND
from mpdsgr_deploy.runtime.remote import RemoteModel
from mpdsgr_deploy.runtime.session import CPU, CUDA
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.validation.image_checks import require_alike
from mpdsgr_deploy.validation.network_file import foreign_parts

REMOTE = "remote"
ON_CUDA = ("onnxruntime-cuda", "onnxruntime-tensorrt")  # backends for which gradients are computed on the GPU too


@dataclass(frozen=True)
class Target:
    """One precision of a bundle, and where it runs.

    backend: a name of `runtime.open`. url: a server that serves the bundle, which then computes the logits, with at
    most `rate` requests per second.
    """

    bundle: Bundle
    backend: str = DEFAULT_BACKEND
    precision: str = "fp32"
    url: str | None = None
    rate: float = 20.0

    @property
    def trained(self) -> str:
        return trained_surrogate(self.bundle.manifest.recipe)

    @contextmanager
    def open(self) -> Iterator[NetworkFile]:
        """Yield the artefact as attacks use it: logits from the backend or server, gradients from its attack graph.

        The attack graph is derived here, so that a network that cannot be attacked is refused before anything is
        measured. Raises InputError and EvaluationError as `open_predictor` does, InputError as `attack_session` does,
        and EvaluationError if the server does not serve this bundle.
        """
        provider = CUDA if self.url is None and self.backend in ON_CUDA else CPU
        with self._predictor() as predictor:
            network = NetworkFile.from_bundle(self.bundle, self.precision, predictor, provider)
            network.attacker(self.trained, loss="ce", draws=1)
            yield network

    @contextmanager
    def _predictor(self) -> Iterator[Predictor]:
        if self.url is None:
            with open_predictor(self.bundle, self.backend, self.precision) as predictor:
                yield predictor
            return
        manifest = self.bundle.manifest
        noise = NoiseSource(manifest.noise, manifest.recipe.validation.seed)
        with RemoteModel(self.url, manifest.input_shape, len(manifest.labels), noise=noise, rate=self.rate) as remote:
            inputs, logits = self.bundle.golden(self.precision)
            parity = compare(logits, remote(inputs))
            if parity.labels_differ:
                raise EvaluationError(
                    f"{self.url} does not serve this bundle: its answers to the golden batch differ ({parity})"
                )
            yield remote

    @contextmanager
    def sources(self, other: Path | None) -> Iterator[dict[str, Source]]:
        """Yield the networks whose adversarial images are tried on the artefact, by condition.

        These are the float32 network of its bundle, if the artefact has another precision, and `other`, a bundle or
        (with torch) a checkpoint. Raises InputError if `other` was made for other images or lacks a required signature.
        """
        networks: dict[str, Source] = {}
        with ExitStack() as stack:
            if self.precision != "fp32":
                predictor = stack.enter_context(open_predictor(self.bundle))
                float32 = NetworkFile.from_bundle(self.bundle, "fp32", predictor)
                networks[f"{TRANSFER} fp32"] = Source(float32, self.trained)
            if other is not None:
                networks[TRANSFER] = stack.enter_context(_other(other, self.bundle))
            yield networks

    def foreign_parts(self) -> list[str]:
        """Return the faults that `network_file.foreign_parts` finds in the files of this precision and of float32."""
        variants, faults = self.bundle.manifest.variants, []
        for precision in dict.fromkeys(("fp32", self.precision)):
            network = onnx.load(self.bundle.variant(precision), load_external_data=False)
            known = set(variants[precision].layers.values()) | {precision}
            promised = known if self.bundle.manifest.origin == "trained" else None
            faults += [f"{precision}: {fault}" for fault in foreign_parts(network, promised)]
        return faults

    def fresh(self) -> Predictor | None:
        """Return a predictor that computes each batch in a new `mpdsgr predict` process; None for a server."""
        if self.url is not None:
            return None

        def answer(x: NDArray[np.float32]) -> NDArray[np.float32]:
            with tempfile.TemporaryDirectory() as folder:
                images, out = Path(folder) / "images.npy", Path(folder) / "logits.npz"
                with writing(images, "finished results are kept"):
                    np.save(images, x)
                command = [sys.executable, "-m", "mpdsgr_deploy", "predict", str(self.bundle.root), str(images)]
                options = ["--backend", self.backend, "--precision", self.precision, "--out", str(out)]
                subprocess.run([*command, *options], check=True, capture_output=True, stdin=subprocess.DEVNULL)
                with np.load(out) as arrays:
                    return arrays["logits"]

        return answer


def fingerprint(other: Path) -> str:
    """Return the sha256 of the file that holds the hashes of all others in a bundle or a checkpoint."""
    manifest = other / MANIFEST
    return sha256(manifest if manifest.is_file() else find_checkpoint(other) / FILE)


@contextmanager
def _other(path: Path, own: Bundle) -> Iterator[Source]:
    """Yield the network at `path`, a bundle or a checkpoint.

    Raises InputError if it was made for other images than `own`, or lacks the signature that was required of `own`.
    """
    mine, trust = own.manifest, own.signed.trust if own.signed else None
    if not (path / MANIFEST).is_file():
        if trust is not None:
            raise InputError(f"{path} is not a bundle, so it cannot be signed; export it and sign the bundle")
        need("torch", "train")
        yield other_network(path, mine.input_shape, mine.labels)
        return
    bundle = open_bundle(path, trust)
    manifest = bundle.manifest
    require_alike(path, (manifest.input_shape, manifest.labels), (mine.input_shape, mine.labels))
    with open_predictor(bundle) as predictor:
        yield Source(NetworkFile.from_bundle(bundle, "fp32", predictor), trained_surrogate(manifest.recipe))


def other_network(checkpoint_dir: Path, shape: tuple[int, int, int], labels: tuple[str, ...]) -> Source:
    """Return a checkpoint's network, as a source of transferred attacks.

    shape, labels: (C, H, W) and classes of the images that are attacked. Raises InputError for a network that was made
    for others, and for a damaged checkpoint.
    """
    from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork
    from mpdsgr_deploy.trained_networks import load_model

    source = find_checkpoint(checkpoint_dir)
    checkpoint = load_checkpoint(source)
    require_alike(checkpoint_dir, (checkpoint.shape, checkpoint.labels), (shape, labels))
    network = load_model(source / checkpoint.weights, checkpoint.recipe, checkpoint.shape, len(checkpoint.labels))
    model = TorchModel(network, checkpoint.shape, checkpoint.recipe.validation.seed)
    return Source(TorchNetwork(model), trained_surrogate(checkpoint.recipe))
