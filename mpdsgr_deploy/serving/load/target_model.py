"""The model under load: its inputs and output, requests for them, and the check of an answer's shape."""

import json
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.runtime.inference_protocol import BINARY, DTYPES, encode_request, read_output
from mpdsgr_deploy.runtime.remote import excerpt
from mpdsgr_deploy.serving.load.connection import Connection, Endpoint, HttpAnswer, NoAnswer

# the number of different requests, so that a cache of answers does not help, and the bytes that all may take
DIFFERENT, MEMORY = 16, 1 << 26


@dataclass(frozen=True)
class TensorSpec:
    """An input or output in the server's metadata. shape: without the batch, with -1 for a variable size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TargetModel:
    """A model as a server describes it.

    server: the server's name and version; binary: whether it takes binary tensors.
    """

    url: str
    endpoint: Endpoint
    server: str
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    binary: bool

    def requests(self, batch: int, images: NDArray[Any] | None, seed: int) -> list[bytes]:
        """Return encoded HTTP requests of `batch` images each: random ones from `seed`, or `images` [N, ...] in turn.

        Raises InputError for images of another shape, and for an input for which no values can be generated.
        """
        size = sum(prod(tensor.shape) for tensor in self.inputs) * batch * (4 if self.binary else 20)
        rng = np.random.default_rng(seed)
        count = max(1, min(DIFFERENT, MEMORY // max(1, abs(size))))
        return [self._request(batch, images, number * batch, rng) for number in range(count)]

    def _request(self, batch: int, images: NDArray[Any] | None, start: int, rng: np.random.Generator) -> bytes:
        tensors = {
            tensor.name: _values(tensor, batch, rng) if images is None else _chosen(tensor, images, start, batch)
            for tensor in self.inputs
        }
        headers, body = encode_request(tensors, self.output.name, binary=self.binary)
        return self.endpoint.message("POST", f"{self.endpoint.at.path}/infer", body, headers)

    def problem(self, answer: HttpAnswer, batch: int) -> str | None:
        """Return None for an output of the right shape, else the HTTP status or "wrong answer"."""
        if answer.status != 200:
            return str(answer.status)
        try:
            output = read_output(answer.body, answer.json_size, self.output.name)
        except ValueError:
            return "wrong answer"
        shape, expected = output.shape, (batch, *self.output.shape)
        fits = len(shape) == len(expected) and all(e in (-1, s) for e, s in zip(expected, shape, strict=True))
        return None if fits and output.is_whole else "wrong answer"


async def describe(url: str, endpoint: Endpoint) -> TargetModel:
    """Ask a server for the description of a model. Raises InputError if it cannot be reached or gives none."""
    connection = Connection(endpoint)
    try:
        described = await connection.ask(endpoint.message("GET", endpoint.at.path))
        about = await connection.ask(endpoint.message("GET", endpoint.at.root))
    except NoAnswer as error:
        raise InputError(f"cannot reach {url}: {one_line(error)}; is the server running?") from None
    finally:
        connection.close()
    if described.status != 200:
        hint = "; give --api-key-file" if described.status == 401 else ""
        raise InputError(f"{url} answers {described.status}: {excerpt(described.body)}{hint}")
    try:
        content = json.loads(described.body)
        inputs, outputs = (
            tuple(
                TensorSpec(str(t["name"]), str(t["datatype"]), tuple(map(int, t["shape"][1:]))) for t in content[kind]
            )
            for kind in ("inputs", "outputs")
        )
        output = outputs[0]
        assert inputs
    except (AssertionError, KeyError, IndexError, TypeError, ValueError):
        raise InputError(f"{url} does not describe a model: {excerpt(described.body)}") from None
    server, binary = "unknown", False
    try:
        metadata = json.loads(about.body)
        server, binary = f"{metadata['name']} {metadata['version']}", BINARY in metadata["extensions"]
    except (KeyError, TypeError, ValueError):
        pass  # a proxy may pass on only requests for the model
    return TargetModel(url, endpoint, server, inputs, output, binary)


def _values(tensor: TensorSpec, batch: int, rng: np.random.Generator) -> NDArray[Any]:
    """Generate random values [batch, *shape]: all bytes, or floats in [0, 1)."""
    if tensor.datatype not in DTYPES or any(size < 1 for size in tensor.shape):
        shape = [*map(int, tensor.shape)]
        raise InputError(
            f"cannot generate {tensor.datatype} {shape} for input {tensor.name!r}, only {' or '.join(DTYPES)} of "
            "a fixed shape; give --images"
        )
    if tensor.datatype == "UINT8":
        return rng.integers(0, 256, (batch, *tensor.shape), np.uint8)
    return rng.random((batch, *tensor.shape), np.float32)


def _chosen(tensor: TensorSpec, images: NDArray[Any], start: int, batch: int) -> NDArray[Any]:
    """Return `batch` images from `start` on, cyclically, in the datatype of the input."""
    fits = len(tensor.shape) == images.ndim - 1 and all(
        expected in (-1, size) for expected, size in zip(tensor.shape, images.shape[1:], strict=True)
    )
    if not fits or tensor.datatype not in DTYPES:
        raise InputError(
            f"the images are {images.dtype} {list(images.shape)}, but input {tensor.name!r} is "
            f"{tensor.datatype} {[-1, *tensor.shape]}"
        )
    chosen = images[np.arange(start, start + batch) % len(images)]
    if tensor.datatype == "UINT8":
        return chosen if chosen.dtype == np.uint8 else np.rint(chosen * 255).astype(np.uint8)
    return (chosen / np.float32(255) if chosen.dtype == np.uint8 else chosen).astype("<f4")
