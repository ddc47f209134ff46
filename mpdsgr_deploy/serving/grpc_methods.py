"""The methods of the Open Inference Protocol over gRPC, with tritonclient's stubs, with which others would clash."""

from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.grpc_calls import Call, Method
from mpdsgr_deploy.serving.grpc_wire import check_infer_request
from mpdsgr_deploy.serving.inference import InferenceRequest, RequestedOutput, infer
from mpdsgr_deploy.serving.logs import span
from mpdsgr_deploy.serving.refusals import Refused, Why, invalid
from mpdsgr_deploy.serving.requests import classes, identifier, refuse_shared_memory, timeout
from mpdsgr_deploy.serving.served_model import ServedModel
from mpdsgr_deploy.serving.tensors import InputTensor

SERVICE = "inference.GRPCInferenceService"
CONTENTS = {"FP32": "fp32_contents", "UINT8": "uint_contents"}  # the field for typed data, by datatype
Answer = dict[str, Any]  # the fields of a response in the JSON form, which HTTP uses too


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
