"""The one interceptor: wraps the handler of every method, once, in the stages of the pipeline.

gRPC calls `intercept_service` on its serving thread, so nothing is done there but to look up the wrapped handler; the
work happens on the RPC's thread. Every unary method is served as one whose requests are a stream of raw bytes, so that
its message is read and parsed after the call was authorised.
"""

from __future__ import annotations  # gRPC's classes are generic in their type stubs only

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from service.base.clock import monotonic
from service.base.errors import MalformedMessageError, PersonaeError
from service.base.randomness import random_id
from service.rpc.admission.executor import BoundedExecutor
from service.rpc.context import REQUEST_ID_KEY, CallContext, enter, read_metadata
from service.rpc.methods import METHODS, Executor
from service.rpc.pipeline.request_reader import RequestReader
from service.rpc.pipeline.stages import Handler, Stage, WrappedMethod, require_admitted
from service.rpc.pipeline.status import status_of


class Pipeline(grpc.ServerInterceptor):
    """Runs the stages around each handler. gRPC's own services (health, reflection) have no callers to authorise."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        max_seconds: float,
        executors: Mapping[Executor, BoundedExecutor],
        readers: Mapping[Executor, RequestReader],
        health_reader: RequestReader,
    ) -> None:
        """max_seconds: how long an RPC may take whose caller set no deadline, or a later one.

        readers: read the messages of the RPCs of each executor. health_reader: the same for health checks.
        """
        self._stages = tuple(stages)
        self._max_seconds = max_seconds
        self._executors = executors
        self._readers = readers
        self._health_reader = health_reader
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        handler = continuation(handler_call_details)
        if handler is None:
            return None  # an unknown method is not remembered: anybody could fill the memory with names
        if method.startswith("/grpc."):
            self._wrapped[method] = _reading_within_a_bound(handler, self._health_reader)
        else:
            self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def _wrap(self, name: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.unary_unary is None:
            raise TypeError(f"{name} streams, and the pipeline has no stages for streams")
        executor = METHODS[name].executor
        method = WrappedMethod(name, METHODS[name], handler.request_deserializer, self._readers[executor])
        run = _composed(self._stages, method, handler.unary_unary)
        max_seconds = self._max_seconds

        def behaviour(requests: Any, context: grpc.ServicerContext) -> Any:
            # The time remaining is huge where the caller set no deadline.
            call = CallContext(name, context, monotonic() + min(context.time_remaining(), max_seconds))
            read_metadata(call)
            enter(call)
            response = run(requests, call)
            if call.status is not None:
                context.abort_with_status(call.status)  # raises: nothing may come after it
            context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
            return response

        # gRPC looks for the executor of a method in this attribute of its function.
        behaviour.experimental_thread_pool = self._executors[executor]  # type: ignore[attr-defined]
        return _taking_requests(handler, stream_unary=behaviour)


def _reading_within_a_bound(handler: Any, reader: RequestReader) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of gRPC's own services, with its message read as that of our RPCs is."""
    if handler.request_streaming:
        return handler  # type: ignore[no-any-return]  # a handler as it came
    method, parse = handler.unary_unary or handler.unary_stream, handler.request_deserializer

    def behaviour(requests: Any, context: grpc.ServicerContext) -> Any:
        try:
            require_admitted()
            request = parse(reader.read(requests, context, monotonic() + context.time_remaining()))
        except DecodeError:
            context.abort_with_status(status_of(MalformedMessageError(), random_id()))
        except PersonaeError as error:
            context.abort_with_status(status_of(error, random_id()))
        return method(request, context)

    if hasattr(method, "experimental_thread_pool"):
        behaviour.experimental_thread_pool = method.experimental_thread_pool  # type: ignore[attr-defined]  # as above
    kind = "stream_stream" if handler.response_streaming else "stream_unary"
    return _taking_requests(handler, **{kind: behaviour})


def _taking_requests(handler: Any, **behaviour: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler with another behaviour, which is given the stream of requests, undeserialised."""
    taking: grpc.RpcMethodHandler[Any, Any] = handler._replace(
        unary_unary=None, unary_stream=None, request_streaming=True, request_deserializer=None, **behaviour
    )
    return taking


def _composed(stages: Sequence[Stage], method: WrappedMethod, servicer_method: Callable[[Any, Any], Any]) -> Handler:
    def run_servicer(request: Any, call: CallContext) -> Any:
        return servicer_method(request, call.context)

    run: Handler = run_servicer
    for stage in reversed(stages):
        run = stage(run, method)
    return run
