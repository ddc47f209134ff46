"""The Open Inference Protocol over gRPC, with the stubs that tritonclient ships: own ones would clash with them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from itertools import count
from secrets import token_hex
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.serving import tracing
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.errors import Refused, Why, invalid
from mpdsgr_deploy.serving.inference import Request, Wanted, infer
from mpdsgr_deploy.serving.listener import HEAD_BYTES, Tls
from mpdsgr_deploy.serving.model import Model
from mpdsgr_deploy.serving.requests import classes, identifier, timeout
from mpdsgr_deploy.serving.tensors import Tensor

OPEN = {"ServerLive", "ServerReady"}  # without a key
CONTENTS = {"FP32": "fp32_contents", "UINT8": "uint_contents"}


class Grpc:
    """A running gRPC server; make it with `start`."""

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self._server, self.port = server, port

    @classmethod
    async def start(cls, server: Server, host: str, port: int, tls: Tls | None) -> Self:
        """Listen. Raises InputError if the port cannot be used."""
        options = [
            ("grpc.max_receive_message_length", server.limits.in_flight_bytes),
            ("grpc.max_metadata_size", HEAD_BYTES),
            ("grpc.server_handshake_timeout_ms", int(server.limits.header_seconds * 1000)),
            ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake
        ]
        inner = grpc.aio.server(options=options, maximum_concurrent_rpcs=server.limits.connections)
        inner.add_generic_rpc_handlers((Service(server).handlers(),))
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            found = inner.add_secure_port(where, _credentials(tls)) if tls else inner.add_insecure_port(where)
        except RuntimeError as error:
            why = str(error).partition(";")[0]
            raise InputError(f"cannot listen for gRPC: {why}; choose another --grpc-port") from None
        await inner.start()
        return cls(inner, found)

    async def stop(self, seconds: float) -> None:
        """Accept nothing more and wait so long for what is in work."""
        await self._server.stop(seconds)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    ca = None if tls.client_ca is None else tls.client_ca.read_bytes()
    pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


class Call:
    """One call, for the log: the model it reached, if any."""

    method = "gRPC"

    def __init__(self, path: str, metadata: Mapping[str, str], request_id: str) -> None:
        self.path, self.metadata, self.id = path, metadata, metadata.get("x-request-id", "")[:128] or request_id
        self.model: Model | None = None
        self.images = 0
        self.start = time.monotonic()


Handler = Callable[["Service", Any, Call], Awaitable[Any]]


class Service:
    """What the protocol's methods answer. Those that are not here answer UNIMPLEMENTED."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._ids = map(f"{token_hex(4)}-{{:x}}".format, count(1))

    def handlers(self) -> Any:
        """As grpc.aio takes them."""
        methods = {
            # as streams, for their first message to be waited for here: grpc itself would wait for ever
            name: grpc.stream_unary_rpc_method_handler(
                partial(self._guarded, name, handler),
                partial(_parsed, getattr(pb, f"{name}Request")),
                getattr(pb, f"{name}Response").SerializeToString,
            )
            for name, handler in METHODS.items()
        }
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)

    async def _guarded(self, name: str, handler: Handler, _: Any, context: grpc.aio.ServicerContext) -> Any:
        """A handler's answer, or its refusal as a status."""
        server = self.server
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        call = Call(name, metadata, next(self._ids))
        refused = None
        server.requests += 1
        try:
            if name not in OPEN:
                if server.closing:  # gRPC itself would cancel what it has not handed over when it stops
                    raise Refused(Why.NOT_READY, "the server ends")
                server.authorize(metadata.get("authorization", ""))
            request = await self._message(name, context)
            with server.memory.share() as share:
                share.take(request.ByteSize())
                return await handler(self, request, call)
        except Refused as error:
            refused = error
        except asyncio.CancelledError:
            refused = Refused(Why.CANCELLED, "the client left")
            raise
        except Exception as error:  # a bug, of ours or of a backend: this call's answer, not the server's end
            log.exception("call %s failed", call.id)
            refused = Refused(Why.INTERNAL, f"{type(error).__name__}; the server's log has more")
        finally:
            server.requests -= 1
            server.count("grpc", call, "OK" if refused is None else refused.why.grpc, refused)
        await context.abort(getattr(grpc.StatusCode, refused.why.grpc), str(refused))

    async def _message(self, name: str, context: grpc.aio.ServicerContext) -> Any:
        seconds = self.server.limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                request = await context.read()
        except TimeoutError:
            raise Refused(Why.SLOW, f"the message did not arrive within {seconds:g} s") from None
        if request is None or request is grpc.aio.EOF:
            raise invalid(f"the message is no {name}Request")
        return request


def _parsed(kind: Any, content: bytes) -> Any:
    """The message, or None for bytes that are none: the handler says so, where grpc would answer UNKNOWN."""
    try:
        return kind.FromString(content)
    except DecodeError:
        return None


async def _server_live(service: Service, request: Any, call: Call) -> Any:
    return pb.ServerLiveResponse(live=True)


async def _server_ready(service: Service, request: Any, call: Call) -> Any:
    return pb.ServerReadyResponse(ready=service.server.ready)


async def _model_ready(service: Service, request: Any, call: Call) -> Any:
    try:
        service.server.repository.model(request.name, request.version)
    except Refused as error:
        if error.why is Why.INVALID:
            raise
        return pb.ModelReadyResponse(ready=False)
    return pb.ModelReadyResponse(ready=True)


async def _server_metadata(service: Service, request: Any, call: Call) -> Any:
    return ParseDict(service.server.metadata(), pb.ServerMetadataResponse())


async def _model_metadata(service: Service, request: Any, call: Call) -> Any:
    return ParseDict(
        service.server.repository.model(request.name, request.version).metadata(), pb.ModelMetadataResponse()
    )


async def _model_config(service: Service, request: Any, call: Call) -> Any:
    config = service.server.repository.model(request.name, request.version).config()
    return ParseDict({"config": config}, pb.ModelConfigResponse())


async def _model_statistics(service: Service, request: Any, call: Call) -> Any:
    return ParseDict(service.server.statistics(request.name, request.version), pb.ModelStatisticsResponse())


async def _repository_index(service: Service, request: Any, call: Call) -> Any:
    return ParseDict({"models": service.server.index(ready=request.ready)}, pb.RepositoryIndexResponse())


async def _repository_model_load(service: Service, request: Any, call: Call) -> Any:
    service.server.require_control()
    if request.parameters:
        raise invalid("models are loaded from the server's own bundles, as they are; give no parameters")
    await service.server.repository.load(request.model_name)
    return pb.RepositoryModelLoadResponse()


async def _repository_model_unload(service: Service, request: Any, call: Call) -> Any:
    service.server.require_control()
    await service.server.repository.unload(request.model_name)
    return pb.RepositoryModelUnloadResponse()


async def _model_infer(service: Service, request: Any, call: Call) -> Any:
    server = service.server
    model = call.model = server.repository.model(request.model_name, request.model_version)
    wanted = [_wanted(output) for output in request.outputs]
    limit = timeout(_parameter(request.parameters, "timeout"))
    asked = Request(identifier(request.id), _tensors(request), wanted, limit)
    with tracing.span(call.metadata, model, call.id):
        answers = await infer(model, server.batcher, asked, server.limits.request_seconds)
    call.images = answers[0].shape[0]
    response = pb.ModelInferResponse(model_name=model.source.name, model_version=model.version, id=request.id)
    for answer in answers:
        response.outputs.add(name=answer.wanted.name, datatype=answer.datatype, shape=answer.shape)
        response.raw_output_contents.append(answer.raw())
    return response


def _tensors(request: Any) -> list[Tensor]:
    """The inputs, with their data in raw form or as typed contents; never both."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(f"{len(request.inputs)} inputs and {len(raw)} raw contents")
    tensors: list[Tensor] = []
    for i, entry in enumerate(request.inputs):
        if "shared_memory_region" in entry.parameters:
            raise invalid("shared memory is not offered here; send the tensor")
        typed = [field.name for field, _ in entry.contents.ListFields()]
        if raw and typed:
            raise invalid(f"input {entry.name[:100]!r} has its data twice, raw and typed")
        field = CONTENTS.get(entry.datatype, "fp32_contents")
        if not raw and typed not in ([], [field]):
            raise invalid(f"the data of {entry.datatype[:40]!r} stand in {field}, not in {typed[0]}")
        content = raw[i] if raw else list(getattr(entry.contents, field))
        tensors.append(Tensor(entry.name, entry.datatype, tuple(entry.shape), content))
    return tensors


def _wanted(output: Any) -> Wanted:
    if "shared_memory_region" in output.parameters:
        raise invalid("shared memory is not offered here; take the tensor from the answer")
    return Wanted(output.name, True, classes(_parameter(output.parameters, "classification")))


def _parameter(parameters: Any, name: str) -> Any:
    """Its value, of whatever kind; 0 where it is not given."""
    if name not in parameters:
        return 0
    kind = parameters[name].WhichOneof("parameter_choice")
    return kind and getattr(parameters[name], kind)


METHODS: dict[str, Handler] = {
    "ServerLive": _server_live,
    "ServerReady": _server_ready,
    "ServerMetadata": _server_metadata,
    "ModelReady": _model_ready,
    "ModelMetadata": _model_metadata,
    "ModelConfig": _model_config,
    "ModelStatistics": _model_statistics,
    "ModelInfer": _model_infer,
    "RepositoryIndex": _repository_index,
    "RepositoryModelLoad": _repository_model_load,
    "RepositoryModelUnload": _repository_model_unload,
}
