"""Health and reflection: the services that gRPC tools expect of every server."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

_V1ALPHA = "grpc.reflection.v1alpha"
_V1 = "grpc.reflection.v1"
_V1_SERVICE = f"{_V1}.ServerReflection"


class Health(health.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking is untyped
    """Says whether the server can do its work. Answers on a thread of its own, so also under full load."""

    def __init__(self, services: tuple[str, ...]) -> None:
        pool = ThreadPoolExecutor(1, thread_name_prefix="health")
        super().__init__(experimental_non_blocking=True, experimental_thread_pool=pool)
        for name in ("Check", "List"):
            setattr(self, name, _on_pool(getattr(self, name), pool))
        self.services = ("", *services)
        self._is_serving: bool | None = None
        self.set_serving(is_serving=False)  # the base class starts out as SERVING, before anything is known

    def set_serving(self, *, is_serving: bool) -> None:
        """Say the same of the server as a whole and of each service. Without effect once the server stops.

        Only a change is passed on: the base class sends every watcher a message each time.
        """
        if is_serving is self._is_serving:
            return
        self._is_serving = is_serving
        status = health_pb2.HealthCheckResponse
        for service in self.services:
            self.set(service, status.SERVING if is_serving else status.NOT_SERVING)

    def List(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        """Every service with its status: the newest method of the health protocol, which the library lacks."""
        with self._lock:
            statuses = {
                service: health_pb2.HealthCheckResponse(status=status)
                for service, status in self._server_status.items()
            }
        return health_pb2.HealthListResponse(statuses=statuses)


def _on_pool(method: Callable[[Any, grpc.ServicerContext], Any], pool: ThreadPoolExecutor) -> Any:
    """The method with its own thread pool, as an attribute: that is where gRPC looks for it."""

    def run(request: Any, context: grpc.ServicerContext) -> Any:
        return method(request, context)

    run.experimental_thread_pool = pool  # type: ignore[attr-defined]  # see above
    return run


def enable_reflection(server: grpc.Server, services: tuple[str, ...]) -> None:
    """Serve reflection, v1alpha from the library and v1, which newer tools ask for and the library lacks.

    Both versions have the same messages but for their package, so v1 is served by the same servicer; its descriptors
    are added to the pool, so that reflection can describe itself.
    """
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME, _V1_SERVICE)
    _describe_v1()
    reflection.enable_server_reflection(names, server)
    servicer = reflection.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_V1_SERVICE, {"ServerReflectionInfo": handler}),)
    )


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
            for field in filter(lambda found: found.type_name, message.field):
                field.type_name = field.type_name.replace(_V1ALPHA, _V1)
        for method in file.service[0].method:
            method.input_type = method.input_type.replace(_V1ALPHA, _V1)
            method.output_type = method.output_type.replace(_V1ALPHA, _V1)
        pool.Add(file)
