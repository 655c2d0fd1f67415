"""The one interceptor: wraps every handler of the service, once, in the stages of service/rpc/pipeline/stages.py.

gRPC calls `intercept_service` on its serving thread under the server's lock, so nothing is done there but to look up
the wrapped handler; the work happens on the thread of the RPC. Every unary method is served as one whose requests are
a stream of raw bytes, so that they are waited for, read and parsed after the call has been authorised.
"""

from __future__ import annotations  # gRPC's classes are generic in their type stubs only

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from service.base.clock import monotonic
from service.base.errors import MalformedMessageError, PersonaeError
from service.base.randomness import random_id
from service.rpc.context import REQUEST_ID_KEY, CallContext, enter, read_metadata
from service.rpc.pipeline.request_reader import take_message
from service.rpc.pipeline.stages import Handler, Method, Stage
from service.rpc.pipeline.status import status_of


class Pipeline(grpc.ServerInterceptor):
    """Runs the stages around each handler. Health and reflection pass without: they have no callers to authorise."""

    def __init__(
        self, stages: Sequence[Stage], *, max_seconds: float, executors: Mapping[str, ThreadPoolExecutor]
    ) -> None:
        """max_seconds: how long an RPC may take whose caller set no deadline, or a later one.

        executors: where the methods run that do not run on the server's own executor.
        """
        self._stages = tuple(stages)
        self._executors = executors
        self._max_seconds = max_seconds
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
        self._wrapped[method] = _without_stages(handler) if method.startswith("/grpc.") else self._wrap(method, handler)
        return self._wrapped[method]

    def _wrap(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.unary_unary is None:
            raise TypeError(f"{method} streams, and the pipeline has no stages for streams")
        described = Method(method, handler.request_deserializer, handler.unary_unary)
        run = _composed(self._stages, described)
        max_seconds = self._max_seconds

        def behaviour(requests: Any, context: grpc.ServicerContext) -> Any:
            remaining = context.time_remaining()
            deadline = monotonic() + min(remaining, max_seconds)  # remaining is huge where the caller set none
            call = CallContext(method, context, deadline)
            read_metadata(call)
            enter(call)
            response = run(requests, call)
            if call.status is not None:
                context.abort_with_status(call.status)  # raises: nothing may come after it
            context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
            return response

        if method in self._executors:  # an attribute of the function: that is where gRPC looks for it
            behaviour.experimental_thread_pool = self._executors[method]  # type: ignore[attr-defined]
        return _taking_requests(handler, stream_unary=behaviour)


def _without_stages(handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of gRPC's own services, which waits for its message no longer than ours do."""
    if handler.request_streaming:
        return handler  # type: ignore[no-any-return]  # a handler as it came
    method, parse = handler.unary_unary or handler.unary_stream, handler.request_deserializer

    def behaviour(requests: Any, context: grpc.ServicerContext) -> Any:
        try:
            request = parse(take_message(requests, monotonic() + context.time_remaining()))
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


def _composed(stages: Sequence[Stage], method: Method) -> Handler:
    run: Handler = method.handle
    for stage in reversed(stages):
        run = stage(run, method)
    return run
