"""The methods of the Open Inference Protocol over gRPC, with tritonclient's stubs, with which others would clash."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.grpc_calls import Call, Method
from mpdsgr_deploy.serving.inference import InferenceRequest, RequestedOutput, infer
from mpdsgr_deploy.serving.logs import span
from mpdsgr_deploy.serving.refusals import Refused, Why, invalid
from mpdsgr_deploy.serving.requests import classes, identifier, refuse_shared_memory, timeout
from mpdsgr_deploy.serving.served_model import ServedModel
from mpdsgr_deploy.serving.tensors import InputTensor

SERVICE = "inference.GRPCInferenceService"
CONTENTS = {"FP32": "fp32_contents", "UINT8": "uint_contents"}  # the field for typed data, by datatype
Answer = dict[str, Any]  # the fields of a response in the JSON form, which HTTP uses too
MOST_FIELDS = 100  # the largest number in a message and the messages in it
VARINT, LENGTH = 0, 2  # wire types
FIXED = {1: 8, 5: 4}  # bytes of the wire types of fixed size
# field numbers of ModelInferRequest and of its inputs in grpc_service.proto
INPUTS, OUTPUTS = 5, 6
SHAPE, TYPED = 3, 5
DIMENSIONS = 80  # bytes that the four sizes of a shape may take


def _is_ready(server: Server, request: Any) -> bool:
    try:
        _model(server, request)
    except Refused:
        return False
    return True


async def _load(server: Server, request: Any) -> Answer:
    server.require_control()
    if request.parameters:
        raise invalid(
            "parameters are not supported, because models are loaded from the server's own bundles; leave them out"
        )
    await server.repository.load(request.model_name)
    return {}


async def _unload(server: Server, request: Any) -> Answer:
    server.require_control()
    await server.repository.unload(request.model_name)
    return {}


async def _model_infer(server: Server, content: bytes, call: Call) -> Any:
    check_infer_request(content)
    request = _parsed(pb.ModelInferRequest, content)
    model = call.model = server.repository.model(request.model_name, request.model_version)
    if len(content) > model.input.message_bytes:
        raise Refused(
            Why.TOO_LARGE,
            f"a message to {request.model_name} may have at most {model.input.message_bytes} bytes; send fewer images",
        )
    outputs = [_requested_output(output) for output in request.outputs]
    limit = timeout(_parameter(request.parameters, "timeout"))
    inference = InferenceRequest(identifier(request.id), _tensors(request), outputs, limit, binary=True)
    with span(call.metadata, model, call.id):
        answers = await infer(model, server.batcher, inference, server.limits.request_seconds)
    call.images = answers[0].shape[0]
    response = pb.ModelInferResponse(model_name=model.source.name, model_version=model.version, id=request.id)
    for answer in answers:
        response.outputs.add(name=answer.requested.name, datatype=answer.datatype, shape=answer.shape)
        response.raw_output_contents.append(answer.raw())
    return response


def _tensors(request: Any) -> list[InputTensor]:
    """Return the inputs of a request, whose data are in raw form or typed. Raises Refused if they are in both."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(f"there are {len(request.inputs)} inputs and {len(raw)} raw contents; send one for each")
    tensors: list[InputTensor] = []
    for i, entry in enumerate(request.inputs):
        refuse_shared_memory(entry.parameters, "send the tensor itself")
        typed = [field.name for field, _ in entry.contents.ListFields()]
        if raw and typed:
            raise invalid(f"input {entry.name[:100]!r} has data in both the raw and the typed field; send one of them")
        field = CONTENTS.get(entry.datatype, "fp32_contents")
        if not raw and typed not in ([], [field]):
            raise invalid(f"data of type {entry.datatype[:40]!r} belong in {field}, not in {typed[0]}")
        # typed contents are not copied to a list before their length is checked
        content = raw[i] if raw else getattr(entry.contents, field)
        tensors.append(InputTensor(entry.name, entry.datatype, tuple(entry.shape), content))
    return tensors


def _requested_output(output: Any) -> RequestedOutput:
    refuse_shared_memory(output.parameters, "take the tensor from the answer")
    return RequestedOutput(output.name, True, classes(_parameter(output.parameters, "classification")))


def _parameter(parameters: Any, name: str) -> Any:
    """Return the value of a parameter, of any type; 0 if it is not set."""
    if name not in parameters:
        return 0
    kind = parameters[name].WhichOneof("parameter_choice")
    return kind and getattr(parameters[name], kind)


def _parsed(kind: Any, content: bytes) -> Any:
    try:
        return kind.FromString(content)
    except DecodeError:
        raise invalid(f"the message is not a {kind.DESCRIPTOR.name}") from None


def _model(server: Server, request: Any) -> ServedModel:
    return server.repository.model(request.name, request.version)


def _method(name: str, handler: Callable[[Server, Any], Answer | Awaitable[Answer]], **options: bool) -> Method:
    """Return the method of this name. handler: maps a parsed message to the fields of the response."""
    request, response = getattr(pb, f"{name}Request"), getattr(pb, f"{name}Response")

    async def answer(server: Server, content: bytes, call: Call) -> Any:
        reply = handler(server, _parsed(request, content))
        return ParseDict(await reply if isinstance(reply, Awaitable) else reply, response())

    return Method(answer, response.SerializeToString, **options)


class Scan:
    """Reads the fields of one message and of the messages in it, at most `MOST_FIELDS` in all, before it is parsed.

    An empty entry takes two bytes in the message but two hundred in memory. A valid inference request has a few dozen
    fields, whatever its tensors hold.
    """

    def __init__(self, content: bytes) -> None:
        self._content, self._left = content, MOST_FIELDS

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield the number of each field, and start and end of its value, between two places in the message.

        Raises Refused for too many fields and for an invalid message.
        """
        place = start
        while place < end:
            self._left -= 1
            if self._left < 0:
                raise invalid(f"the message has more than {MOST_FIELDS} fields; send tensors in raw or packed form")
            tag, place = self._varint(place, end)
            kind = tag & 7
            if kind == LENGTH:
                length, place = self._varint(place, end)
                stop = place + length
            elif kind == VARINT:
                _, stop = self._varint(place, end)
            elif kind in FIXED:
                stop = place + FIXED[kind]
            else:
                raise _broken()  # groups, which proto3 does not have
            if stop > end:
                raise _broken()
            yield tag >> 3, place, stop
            place = stop

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        """Return the number of at most ten bytes at `place`, and the place after it."""
        content, value = self._content, 0
        for shift in range(0, 70, 7):
            if place >= end:
                raise _broken()
            byte = content[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, place
        raise _broken()


def check_infer_request(content: bytes) -> None:
    """Raise Refused if a ModelInferRequest, with its inputs and outputs, has more fields than a valid one."""
    scan = Scan(content)
    for number, start, end in scan.fields(0, len(content)):
        if number == INPUTS:
            _check_input(scan, start, end)
        elif number == OUTPUTS:
            for _ in scan.fields(start, end):
                pass


def _check_input(scan: Scan, start: int, end: int) -> None:
    for number, inner, stop in scan.fields(start, end):
        if number == SHAPE and stop - inner > DIMENSIONS:
            raise invalid("an input's shape has more than four sizes")
        if number == TYPED:
            for _ in scan.fields(inner, stop):
                pass


def _broken() -> Refused:
    return invalid("the message is not a ModelInferRequest")


METHODS: dict[str, Method] = {
    "ServerLive": _method("ServerLive", lambda server, _: {"live": True}, open=True, reads=False),
    "ServerReady": _method("ServerReady", lambda server, _: {"ready": server.ready}, open=True, reads=False),
    "ServerMetadata": _method("ServerMetadata", lambda server, _: server.metadata()),
    "ModelReady": _method("ModelReady", lambda server, request: {"ready": _is_ready(server, request)}),
    "ModelMetadata": _method("ModelMetadata", lambda server, request: _model(server, request).metadata()),
    "ModelConfig": _method("ModelConfig", lambda server, request: {"config": _model(server, request).config()}),
    "ModelStatistics": _method("ModelStatistics", lambda server, asked: server.statistics(asked.name, asked.version)),
    "ModelInfer": Method(_model_infer, pb.ModelInferResponse.SerializeToString, large=True),
    "RepositoryIndex": _method("RepositoryIndex", lambda server, asked: {"models": server.index(ready=asked.ready)}),
    "RepositoryModelLoad": _method("RepositoryModelLoad", _load),
    "RepositoryModelUnload": _method("RepositoryModelUnload", _unload),
}
