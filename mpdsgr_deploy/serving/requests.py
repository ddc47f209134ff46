"""Parse inference requests over HTTP, which are JSON that binary tensors may follow, and encode responses."""

from collections.abc import Container, Sequence
from typing import Any

import orjson

from mpdsgr_deploy.serving.inference import MICROSECONDS, InferenceRequest, OutputAnswer, RequestedOutput
from mpdsgr_deploy.serving.refusals import invalid
from mpdsgr_deploy.serving.served_model import ServedModel
from mpdsgr_deploy.serving.tensors import ImageInput, InputTensor

BINARY = "binary_data"


def parse_request(body: bytes, header_length: str | None, image_input: ImageInput) -> InferenceRequest:
    """Parse the body of a request. header_length: the bytes of JSON, as the client states them, if tensors follow.

    Raises Refused for an invalid request. The inputs are not yet compared with the model's.
    """
    place = len(body) if header_length is None else _length(header_length, len(body))
    head = body[:place]
    image_input.check_json(head)
    content = parse_json(head)
    parameters = members(content.get("parameters", {}), "parameters")
    inputs: list[InputTensor] = []
    for entry in _list(content.get("inputs"), "inputs"):
        tensor, place = _tensor(members(entry, "an input"), body, place)
        inputs.append(tensor)
    if header_length is not None and place != len(body):
        raise invalid(f"there are {len(body) - place} bytes after the last tensor")
    binary = _flag(parameters, "binary_data_output", otherwise=False)
    outputs = [
        _requested_output(members(entry, "an output"), binary) for entry in _list(content.get("outputs", []), "outputs")
    ]
    return InferenceRequest(
        identifier(content.get("id", "")), inputs, outputs, timeout(parameters.get("timeout", 0)), binary
    )


def identifier(value: Any) -> str:
    """Return a request's `id`. Raises Refused unless it is a text of at most 256 characters."""
    if not isinstance(value, str) or len(value) > 256:
        raise invalid("id must be a string of at most 256 characters")
    return value


def timeout(value: Any) -> float | None:
    """Return the seconds of a request's parameter `timeout`, which is in microseconds; None for 0.

    Raises Refused unless it is an integer from 0 to 2^63 - 1.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        raise invalid("timeout must be a whole number of microseconds")
    return value * MICROSECONDS or None


def classes(value: Any) -> int:
    """Return an output's parameter `classification`. Raises Refused unless it is an integer from 0 to 2^31 - 1."""
    if type(value) is not int or not 0 <= value < 2**31:
        raise invalid("classification must be a whole number, the number of classes to return")
    return value


def refuse_shared_memory(parameters: Container[str], instead: str) -> None:
    """Raise Refused if a tensor's parameters place it in shared memory. instead: what the client should do."""
    if "shared_memory_region" in parameters:
        raise invalid(f"this server does not support shared memory; {instead}")


def parse_json(content: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises Refused for anything else; numbers beyond 64 bits become floats."""
    try:
        return members(orjson.loads(content), "the request")
    except orjson.JSONDecodeError as error:  # also for text that is not UTF-8, infinite numbers and too deep nesting
        raise invalid(f"the request is not JSON: {str(error)[:100]}") from None


def members(value: Any, what: str) -> dict[str, Any]:
    """Return the members of a JSON object except for null ones, because some clients send every possible member.

    Raises Refused if `what` is not an object.
    """
    if not isinstance(value, dict):
        raise invalid(f"{what} must be a JSON object")
    if None not in value.values():
        return value
    return {key: member for key, member in value.items() if member is not None}


def _length(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= most):
        raise invalid(f"Inference-Header-Content-Length {text[:20]!r} does not fit a body of {most} bytes")
    return int(text)


def _tensor(entry: dict[str, Any], body: bytes, place: int) -> tuple[InputTensor, int]:
    """Parse an input whose bytes, if it has any, begin at `place` in the body; return it and the place after them."""
    name, datatype, shape = (entry.get(key) for key in ("name", "datatype", "shape"))
    if not isinstance(name, str) or not isinstance(datatype, str):
        raise invalid("an input needs a name and a datatype")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise invalid("the shape of an input must be a list of whole numbers")
    parameters = members(entry.get("parameters", {}), "parameters")
    refuse_shared_memory(parameters, "send the tensor itself")
    size = parameters.get("binary_data_size")
    if size is None:
        return InputTensor(name, datatype, tuple(shape), _list(entry.get("data"), "data")), place
    if "data" in entry:
        raise invalid(f"input {name[:100]!r} has data both in JSON and in binary form; send one of them")
    if type(size) is not int or not 0 <= size <= len(body) - place:
        raise invalid(f"binary_data_size {str(size)[:20]} of {name[:100]!r} does not fit the body")
    return InputTensor(name, datatype, tuple(shape), memoryview(body)[place : place + size]), place + size


def _requested_output(entry: dict[str, Any], binary: bool) -> RequestedOutput:
    name, parameters = entry.get("name"), members(entry.get("parameters", {}), "parameters")
    if not isinstance(name, str):
        raise invalid("an output needs a name")
    refuse_shared_memory(parameters, "take the tensor from the answer")
    return RequestedOutput(
        name, _flag(parameters, BINARY, otherwise=binary), classes(parameters.get("classification", 0))
    )


def _flag(parameters: dict[str, Any], key: str, *, otherwise: bool) -> bool:
    value = parameters.get(key, otherwise)
    if not isinstance(value, bool):
        raise invalid(f"{key} must be true or false")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise invalid(f"{what} must be a list")
    return value


def response(model: ServedModel, request: InferenceRequest, answers: Sequence[OutputAnswer]) -> tuple[bytes, bytes]:
    """Return the JSON of a response, and the tensors that follow it in binary form."""
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for answer in answers:
        content = answer.content
        output: dict[str, Any] = {"name": answer.requested.name, "datatype": answer.datatype, "shape": answer.shape}
        if answer.requested.binary:
            tensor = answer.raw()
            output["parameters"] = {"binary_data_size": len(tensor)}
            binary.append(tensor)
        elif isinstance(content, list):
            output["data"] = [text for row in content for text in row]
        else:
            output["data"] = content.ravel().tolist()
        outputs.append(output)
    answered: dict[str, Any] = {"model_name": model.source.name, "model_version": model.version, "outputs": outputs}
    if request.id:
        answered["id"] = request.id
    return orjson.dumps(answered), b"".join(binary)
