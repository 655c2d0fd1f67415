"""Server reflection, from which grpcurl and other tools learn the API."""

from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

from service.rpc.admission.executor import BoundedExecutor
from service.rpc.health import on_pool

_V1ALPHA = "grpc.reflection.v1alpha"
_V1 = "grpc.reflection.v1"
_V1_SERVICE = f"{_V1}.ServerReflection"
_THREADS = 4
_MAX_WAITING = 64


class _Descriptors:
    """The default descriptor pool, with methods among its symbols: it finds every other kind by itself."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802  the pool's own name for it
        """The file that declares a symbol. Raises KeyError when there is none."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file


def enable_reflection(server: grpc.Server, services: tuple[str, ...]) -> BoundedExecutor:
    """Serve reflection v1alpha, and v1, which newer tools use and grpcio-reflection lacks. Returns its executor.

    The messages of both versions differ only in their package, so the same servicer serves v1. Its descriptors are
    added to the pool, so that reflection can describe itself.
    """
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME, _V1_SERVICE)
    _describe_v1()
    servicer = reflection.ReflectionServicer(names, pool=_Descriptors())
    # An open stream holds a thread while the server waits for its client, so it must not be one that serves RPCs.
    pool = BoundedExecutor(_THREADS, max_waiting=_MAX_WAITING, name="reflection")
    handler = grpc.stream_stream_rpc_method_handler(
        on_pool(servicer.ServerReflectionInfo, pool),
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in (reflection.SERVICE_NAME, _V1_SERVICE):
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler}),)
        )
    return pool


def _describe_v1() -> None:
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(_V1_SERVICE)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        file.name = "grpc/reflection/v1/reflection.proto"
        file.package = _V1
        for message in file.message_type:
            for field in filter(lambda candidate: candidate.type_name, message.field):
                field.type_name = field.type_name.replace(_V1ALPHA, _V1)
        for method in file.service[0].method:
            method.input_type = method.input_type.replace(_V1ALPHA, _V1)
            method.output_type = method.output_type.replace(_V1ALPHA, _V1)
        pool.Add(file)
