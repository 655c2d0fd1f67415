"""Server reflection, from which grpcurl and other tools learn the API.

More than grpcio-reflection serves by itself: v1 besides v1alpha, and methods among the symbols. See decision 0052.
"""

from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

from service.rpc.admission.executor import BoundedExecutor
from service.rpc.health import on_pool

_V1_SERVICE = "grpc.reflection.v1.ServerReflection"
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
    """Serve reflection v1alpha and v1. Returns its executor.

    The messages of both versions differ only in their package, so the same servicer serves v1.
    """
    _add_v1_to_pool()
    versions = (reflection.SERVICE_NAME, _V1_SERVICE)
    servicer = reflection.ReflectionServicer((*services, health.SERVICE_NAME, *versions), pool=_Descriptors())
    # An open stream holds a thread while the server waits for its client, so it must not be one that serves RPCs.
    pool = BoundedExecutor(_THREADS, max_waiting=_MAX_WAITING, name="reflection")
    handler = grpc.stream_stream_rpc_method_handler(
        on_pool(servicer.ServerReflectionInfo, pool),
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(version, {"ServerReflectionInfo": handler}) for version in versions]
    )
    return pool


def _add_v1_to_pool() -> None:
    """Add the descriptors of v1, so that reflection can describe itself. Done again, it changes nothing."""
    v1alpha, v1 = descriptor_pb2.FileDescriptorProto(), descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1alpha)
    text_format.Parse(text_format.MessageToString(v1alpha).replace("v1alpha", "v1"), v1)
    descriptor_pool.Default().Add(v1)
