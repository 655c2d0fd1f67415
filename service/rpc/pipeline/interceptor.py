"""The one interceptor: wraps the handler of every method, once, in the stages of the pipeline.

gRPC calls `intercept_service` on its serving thread, so it only looks up the wrapped handler; the work happens on the
RPC's thread. Every unary method is served as one with a stream of raw requests, so that its message is read and parsed
after authorisation.
"""

from __future__ import annotations  # gRPC's classes are generic in their type stubs only

from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any

import grpc

from service.base.clock import monotonic
from service.rpc.admission.executor import BoundedExecutor, is_refused
from service.rpc.context import (
    REQUEST_ID_KEY,
    CallContext,
    Send,
    enter,
    leave,
    read_metadata,
    require_client_waiting,
)
from service.rpc.methods import METHODS, Executor
from service.rpc.pipeline.built_in import built_in
from service.rpc.pipeline.request_reader import CHECK_INTERVAL, RequestReader
from service.rpc.pipeline.stages import Handler, Stage, WrappedMethod, compose, receiving


class Pipeline(grpc.ServerInterceptor):
    """Runs the stages around each handler. Health and reflection are served without authorisation."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        refusal_stages: Sequence[Stage],
        max_seconds: float,
        executors: Mapping[Executor, BoundedExecutor],
        watch_executor: BoundedExecutor,
    ) -> None:
        """refusal_stages: the stages of an RPC that was not admitted. They run on gRPC's serving thread.

        max_seconds: the deadline of RPCs whose caller set none or a later one. watch_executor: sends to the watchers of
        health.
        """
        self._stages, self._refusal_stages = tuple(stages), tuple(refusal_stages)
        self._max_seconds = max_seconds
        self._executors = executors
        self._crowded = Event()
        self._readers: dict[BoundedExecutor, RequestReader] = {}
        self._watch_reader = self._reader_for(watch_executor)
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def cancel_slow_messages(self) -> None:
        """Cancel calls whose message does not come in time. Waits until too many calls wait, at most CHECK_INTERVAL."""
        self._crowded.wait(CHECK_INTERVAL)
        self._crowded.clear()
        for reader in tuple(self._readers.values()):
            reader.cancel_slow()

    def wake(self) -> None:
        """End the wait of cancel_slow_messages."""
        self._crowded.set()

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
            return None  # not cached: anybody could fill the memory with names of unknown methods
        if method.startswith("/grpc."):
            behaviour = built_in(handler, self._reader_for, self._watch_reader)
            self._wrapped[method] = _with_raw_requests(handler, behaviour)
        else:
            self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def _reader_for(self, executor: BoundedExecutor) -> RequestReader:
        """The reader of all methods of this executor. Slow clients may hold half of its threads.

        Bulk calls may hold all of theirs: their messages are large, and no other calls run there.
        """
        is_bulk = executor is self._executors[Executor.BULK]
        max_slow = executor.threads if is_bulk else max(1, executor.threads // 2)
        return self._readers.setdefault(executor, RequestReader(max_slow=max_slow, crowded=self._crowded))

    def _wrap(self, name: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        executor = METHODS[name].executor
        reader = self._reader_for(self._executors[executor])
        method = WrappedMethod(name, METHODS[name], receiving(reader, handler.request_deserializer))
        servicer = (
            _streaming(handler.unary_stream, reader) if handler.response_streaming else _servicer(handler.unary_unary)
        )
        run = compose(self._stages, method, servicer)
        refuse = compose(self._refusal_stages, method, servicer)
        max_seconds = self._max_seconds

        def behaviour(requests: Any, context: grpc.ServicerContext, send: Send | None = None) -> Any:
            # Without a deadline of the caller time_remaining() is huge.
            call = CallContext(name, context, monotonic() + min(context.time_remaining(), max_seconds))
            call.send = send
            read_metadata(call)
            entered = enter(call)
            try:
                response = refuse(requests, call) if is_refused() else run(requests, call)
            finally:
                leave(entered)
            if call.status is not None:
                context.abort_with_status(call.status)  # always raises
            context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
            if send is not None:
                send(None)  # the end of the stream
            return response

        # gRPC reads the executor of a method from this attribute; and from the other whether to pass `send`, with which
        # a stream passes the same stages as any other method: its handler returns when the stream is at its end.
        if handler.response_streaming:
            behaviour.experimental_non_blocking = True  # type: ignore[attr-defined]
        behaviour.experimental_thread_pool = self._executors[executor]  # type: ignore[attr-defined]
        return _with_raw_requests(handler, behaviour)


def _streaming(method: Callable[[Any, Any], Any], reader: RequestReader) -> Handler:
    """Sends what the servicer yields. A client that takes no message in time is cancelled."""

    def run(request: Any, call: CallContext) -> None:
        assert call.send is not None  # noqa: S101  for the type checker: gRPC passes it to streams
        for response in method(request, call.context):
            require_client_waiting(call)
            reader.send(call.send, response, call.context)

    return run


def _with_raw_requests(handler: Any, behaviour: Callable[..., Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler with another behaviour, which gets the stream of requests as raw bytes."""
    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    replaced: grpc.RpcMethodHandler[Any, Any] = make(behaviour, None, handler.response_serializer)
    return replaced


def _servicer(method: Callable[[Any, Any], Any]) -> Handler:
    def run(request: Any, call: CallContext) -> Any:
        return method(request, call.context)

    return run
