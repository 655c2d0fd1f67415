"""The one interceptor: wraps every handler of the service, once, in the stages of service/rpc/interceptors/stages.py.

gRPC calls `intercept_service` on its serving thread under the server's lock, so nothing is done there but to look up
the wrapped handler; the work happens on the thread of the RPC. Requests arrive as raw bytes, so that they are parsed
after the call has been authorised.
"""

from __future__ import annotations  # gRPC's classes are generic in their type stubs only

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from service.base.clock import monotonic
from service.rpc.call import REQUEST_ID_KEY, Call, enter, read_metadata
from service.rpc.interceptors.stages import Handler, Method, Stage


class Pipeline(grpc.ServerInterceptor):
    """Runs the stages around each handler. Health and reflection pass untouched: they have no callers to authorise."""

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
        if handler is None or method.startswith("/grpc."):
            return handler  # an unknown method is not remembered: anybody could fill the memory with names
        self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def _wrap(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.unary_unary is None:
            raise TypeError(f"{method} streams, and the pipeline has no stages for streams")
        described = Method(method, handler.request_deserializer, handler.unary_unary)
        run = _composed(self._stages, described)
        max_seconds = self._max_seconds

        def behaviour(raw: bytes, context: grpc.ServicerContext) -> Any:
            remaining = context.time_remaining()
            deadline = monotonic() + min(remaining, max_seconds)  # remaining is huge where the caller set none
            call = Call(method, context, deadline)
            read_metadata(call)
            enter(call)
            response = run(raw, call)
            if call.status is not None:
                context.abort_with_status(call.status)  # raises: nothing may come after it
            context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
            return response

        if method in self._executors:  # an attribute of the function: that is where gRPC looks for it
            behaviour.experimental_thread_pool = self._executors[method]  # type: ignore[attr-defined]
        wrapped: grpc.RpcMethodHandler[Any, Any] = handler._replace(unary_unary=behaviour, request_deserializer=None)
        return wrapped


def _composed(stages: Sequence[Stage], method: Method) -> Handler:
    run: Handler = method.handle
    for stage in reversed(stages):
        run = stage(run, method)
    return run
