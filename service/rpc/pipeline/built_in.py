"""The services that gRPC brings along, health and reflection. They are served without authorisation.

So clients without credentials must not be able to keep others out. A reader waits for the client: for each message, and
for the client to take what a stream sends. A health call for which no thread is free, or which comes on a slow
connection, is answered without its message, as if it asked for the server as a whole: however many half-open calls
there are, a health probe is answered.
"""

from __future__ import annotations  # gRPC's classes are generic in their type stubs only

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from service.base.clock import monotonic
from service.base.errors import MalformedMessageError, PersonaeError, ServerBusyError
from service.base.randomness import random_id
from service.rpc.admission.executor import BoundedExecutor, is_refused
from service.rpc.pipeline.request_reader import RequestReader
from service.rpc.pipeline.stages import require_admitted
from service.rpc.pipeline.status import status_of


def built_in(
    handler: Any, reader_for: Callable[[BoundedExecutor], RequestReader], watch_reader: RequestReader
) -> Callable[..., Any]:
    """What gRPC shall run for this handler, on the executor of its method, with the stream of raw requests.

    reader_for: the reader of an executor. watch_reader: waits for the clients of Health.Watch to take their messages.
    """
    parse = handler.request_deserializer
    method = handler.unary_unary or handler.unary_stream or handler.stream_stream
    reader = reader_for(method.experimental_thread_pool)
    behaviour = _conversing(method, parse, reader) if handler.request_streaming else _answering(method, parse, reader)
    if method is handler.unary_stream:
        behaviour = _watching(behaviour, watch_reader)
        behaviour.experimental_non_blocking = True  # gRPC passes `send`, and the stream outlives the call
    behaviour.experimental_thread_pool = method.experimental_thread_pool
    return behaviour  # type: ignore[no-any-return]  # gRPC's handlers are untyped


def _answering(method: Any, parse: Callable[[bytes], Any], reader: RequestReader) -> Any:
    def answer(requests: Iterator[bytes], context: grpc.ServicerContext, *send: Any) -> Any:
        with _errors_as_status(context):
            request = parse(_read_unless_busy(reader, requests, context))
        return method(request, context, *send)

    return answer


def _watching(answer: Any, reader: RequestReader) -> Any:
    def watch(requests: Iterator[bytes], context: grpc.ServicerContext, send: Callable[[Any], None]) -> None:
        def send_in_time(response: Any) -> None:
            with reader.sending(context):
                send(response)

        answer(requests, context, send_in_time)

    return watch


def _conversing(method: Any, parse: Callable[[bytes], Any], reader: RequestReader) -> Any:
    def messages(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        while True:
            try:
                message = _read(reader, requests, context)
            except MalformedMessageError:  # the client has no more
                return
            yield parse(message)

    def converse(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        with _errors_as_status(context):
            require_admitted()
            for response in method(messages(requests, context), context):
                with reader.sending(context):
                    yield response

    return converse


def _read_unless_busy(reader: RequestReader, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    try:
        return b"" if is_refused() else _read(reader, requests, context)
    except ServerBusyError:
        return b""


def _read(reader: RequestReader, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    return reader.read(requests, context, monotonic() + context.time_remaining())


@contextmanager
def _errors_as_status(context: grpc.ServicerContext) -> Iterator[None]:
    try:
        yield
    except DecodeError:
        context.abort_with_status(status_of(MalformedMessageError(), random_id()))
    except PersonaeError as error:
        context.abort_with_status(status_of(error, random_id()))
