"""Tensors of the Open Inference Protocol: check those of requests, and encode those of answers."""

import struct
from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.data.images import to_unit
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime.image_batches import check_images
from mpdsgr_deploy.runtime.inference_protocol import DTYPES
from mpdsgr_deploy.serving.refusals import Refused, Why, invalid

FORMATS = {np.dtype("<f4"): "f", np.dtype(np.uint8): "B"}  # the format of `struct`, by dtype
JSON_CHARACTERS = 32  # characters that a number and its separators may take in JSON; more would be padding
JSON_ENVELOPE = 1 << 16  # bytes for everything in a request except its numbers


class InputTensor(NamedTuple):
    """An input as a request describes it. content: little-endian bytes, or the list of a JSON request, maybe nested."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: bytes | memoryview | Sequence[Any]


class ImageInput(NamedTuple):
    """A model's input: images [B, *shape], float32 in [0, 1] or uint8, with B at most `most`."""

    name: str
    shape: tuple[int, int, int]
    most: int

    @property
    def body_bytes(self) -> int:
        """The size in bytes of the largest valid request over HTTP, whose numbers are in JSON."""
        return JSON_ENVELOPE + self.most * prod(self.shape) * JSON_CHARACTERS

    @property
    def message_bytes(self) -> int:
        """The size in bytes of the largest valid request over gRPC, with raw or typed data."""
        return JSON_ENVELOPE + self.most * prod(self.shape) * 4

    def check_json(self, content: bytes) -> None:
        """Raise Refused for JSON with more values or lists than a valid request; parsed, each takes 50 bytes."""
        if len(content) <= JSON_ENVELOPE:
            return
        channels, height, _ = self.shape
        lists = self.most * (1 + channels * (1 + height))
        brackets = content.count(b"[") + content.count(b"{")
        if brackets > JSON_ENVELOPE + lists or content.count(b",") > JSON_ENVELOPE + self.most * prod(self.shape):
            raise invalid(f"the request has more values than {self.most} images, the largest batch; send fewer images")

    def images(self, tensor: InputTensor) -> NDArray[np.float32]:
        """Return the images float32 [B, C, H, W] of a tensor. Raises Refused unless it is the model's input and whole.

        Pixel values are checked when the batch is computed (see `pixel_problem`): here numpy would release the
        interpreter to another thread, which would cost every request two thread switches.
        """
        if tensor.name != self.name:
            raise invalid(f"there is no input {tensor.name[:100]!r}; the input is {self.name!r}")
        if tensor.datatype not in DTYPES:
            raise invalid(f"input {self.name!r} must be FP32 or UINT8, not {tensor.datatype[:100]!r}")
        shape = ", ".join(map(str, self.shape))
        if len(tensor.shape) != 4 or tensor.shape[1:] != self.shape or tensor.shape[0] < 1:
            raise invalid(f"input {self.name!r} must have shape [B, {shape}], not {str(list(tensor.shape))[:100]}")
        if tensor.shape[0] > self.most:
            raise invalid(
                f"a request may hold at most {self.most} images, and this one holds {tensor.shape[0]}; send several "
                "requests"
            )
        return to_unit(self._numbers(tensor).reshape(tensor.shape))

    def pixel_problem(self, images: NDArray[np.float32]) -> Refused | None:
        """Return the refusal of images float32 [B, C, H, W] that a predictor would refuse, or None."""
        try:
            check_images(images, self.shape)
        except InputError as error:
            return invalid(str(error))
        return None

    def _numbers(self, tensor: InputTensor) -> NDArray[Any]:
        dtype, count = DTYPES[tensor.datatype], prod(tensor.shape)
        if not isinstance(tensor.content, bytes | memoryview):
            return _from_list(tensor.content, tensor.shape, dtype)
        if len(tensor.content) != count * dtype.itemsize:
            raise invalid(
                f"input {self.name!r} of {tensor.datatype} {list(tensor.shape)} takes {count * dtype.itemsize} bytes, "
                f"got {len(tensor.content)}"
            )
        numbers = np.frombuffer(tensor.content, dtype)
        if numbers.flags.aligned:
            return numbers
        # bytes after JSON are often not aligned, which makes computing slow. numpy's own copy would release the
        # interpreter to another thread
        return np.frombuffer(bytes(tensor.content), dtype)


def _from_list(content: Sequence[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the numbers of a list, flat. Raises Refused unless it is flat or nested as `shape`, and holds numbers."""
    numbers: Sequence[Any] = content
    for depth, size in enumerate(shape):
        if not (numbers and isinstance(numbers[0], list)):
            break
        here = 1 if depth == 0 else prod(shape[:depth])
        if len(numbers) != here * size or set(map(type, numbers)) != {list} or depth == len(shape) - 1:
            raise invalid(f"data are not nested as the shape {list(shape)} states")
        inner = set(map(len, numbers))
        if inner != {shape[depth + 1]}:
            raise invalid(f"data are not nested as the shape {list(shape)} states")
        numbers = list(chain.from_iterable(numbers))
    if len(numbers) != prod(shape):
        raise invalid(f"shape {list(shape)} takes {prod(shape)} numbers, got {len(numbers)}")
    if (packed := _packed(numbers, dtype)) is not None:
        return packed
    allowed = {int} if dtype == np.uint8 else {int, float}
    if not set(map(type, numbers)) <= allowed:  # neither true nor "1" is a number
        raise invalid(f"data must contain only {'whole numbers' if dtype == np.uint8 else 'numbers'}")
    try:
        with np.errstate(over="ignore"):  # numbers too large for float32 become infinite and are refused
            return np.array(numbers, dtype)
    except (OverflowError, ValueError):
        raise invalid(f"data contain values outside the range of {'UINT8' if dtype == np.uint8 else 'FP32'}") from None


def _packed(numbers: Sequence[Any], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Return the numbers as an array, three times as fast as numpy; None if any is no number or does not fit."""
    try:
        array = np.frombuffer(struct.pack(f"<{len(numbers)}{FORMATS[dtype]}", *numbers), dtype)
    except (struct.error, OverflowError):
        return None
    maybe_bool = np.flatnonzero((array == 0) | (array == 1)).tolist()
    return None if any(type(numbers[i]) is bool for i in maybe_bool) else array


def too_large(limit: int) -> Refused:
    """Return the refusal of a body that is larger than any valid request."""
    return Refused(Why.TOO_LARGE, f"the body may have at most {limit} bytes; send fewer images")


def best(logits: NDArray[np.float32], labels: Sequence[str], k: int) -> list[list[str]]:
    """Return the k best classes of each row of logits [B, K], best first, as "value:index:label".

    This is the form of the protocol's classification extension.
    """
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return [[f"{row[i]:.6f}:{i}:{labels[i]}" for i in places] for row, places in zip(logits, order, strict=True)]


def margin(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the best logit minus the second best, float32 [B]; 0 for a single class."""
    if logits.shape[1] < 2:
        return np.zeros(len(logits), np.float32)
    top = np.partition(logits, -2, axis=1)[:, -2:]
    difference: NDArray[np.float32] = top[:, 1] - top[:, 0]
    return difference


def bytes_tensor(rows: Sequence[Sequence[str]]) -> bytes:
    """Encode a tensor of the datatype BYTES: each element follows its length, four bytes little-endian."""
    encoded = [text.encode() for row in rows for text in row]
    return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
