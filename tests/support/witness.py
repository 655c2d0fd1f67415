"""Hears whatever the servers of the suite say, and remembers every secret that the suite tells them.

What is said: every event of the log at every level, and the message, details and trailers of every failed call. What is
secret: passwords and codes, wherever they stand in a message, emails, and the keys of callers. Keys are told by their
shape, whosever they are; what callers send in the place of one is a secret too, since it is often nearly one.
A fixture in tests/conftest.py looks for the one in the other when all tests have run.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message
from structlog.typing import EventDict, WrappedLogger

from service.core.api_keys import KEY_PATTERN

MIN_LENGTH = 10
"""Shorter texts stand in a log by chance."""
_SECRET_FIELDS = frozenset(
    {"password", "current_password", "new_password", "code", "email", "new_email", "deliver_to", "identifier"}
)
_SHAPES = re.compile(rf"\$2[aby]\$\d\d\$|\$bcrypt-sha256\$|[\w.+-]+@[\w-]+\.\w+|{KEY_PATTERN}")
"""What a bcrypt hash, an email and a key look like, whosever they are."""


class Witness:
    """What was said and what was secret, in one run of the tests."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.secrets: set[str] = set()

    def learn(self, message: Message) -> None:
        """Remember the secrets in a message of ours."""
        if not message.DESCRIPTOR.full_name.startswith("personae."):
            return
        for field, value in message.ListFields():
            values = value if field.is_repeated else [value]
            if field.type == field.TYPE_MESSAGE:
                for inner in values:
                    self.learn(inner)
            elif field.name in _SECRET_FIELDS:
                self.secrets |= {one for one in values if isinstance(one, str) and len(one) >= MIN_LENGTH}

    def learn_credentials(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Remember what a caller sends to prove who it is: each word, and of what has the form of a key its secret."""
        for name, value in metadata:
            if name == "authorization" and isinstance(value, str):
                words = [*value.split(), *value.rsplit("_", 1)]
                self.secrets |= {word for word in words if len(word) >= MIN_LENGTH}

    def hear(self, *texts: object) -> None:
        """Note what was said."""
        self.said += [str(text) for text in texts]

    def leaks(self) -> Iterator[str]:
        """What was said and holds a secret, or looks like one."""
        for text in self.said:
            if _SHAPES.search(text):
                yield text
        everything = "\0".join(self.said)
        for secret in self.secrets:
            if secret in everything:
                yield f"{secret!r}: {next(text for text in self.said if secret in text)}"


WITNESS = Witness()


class Log:
    """What was said since it was made."""

    def __init__(self) -> None:
        self._start = len(WITNESS.said)

    def __contains__(self, words: str) -> bool:
        return any(words in text for text in WITNESS.said[self._start :])


def heard(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """A processor of structlog: hears every event, and lets those through that are worth a look."""
    WITNESS.hear(event)
    if event["level"] not in {"error", "critical"}:
        raise structlog.DropEvent
    return event


class Handler(logging.Handler):
    """Hears what libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Note the whole record, arguments and traceback included."""
        WITNESS.hear(self.format(record))


class Interceptor(grpc.UnaryUnaryClientInterceptor):
    """Learns what is sent and answered, and hears how calls fail."""

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        """Look at the request, then at the outcome, when it is there."""
        if isinstance(request, Message):
            WITNESS.learn(request)
        WITNESS.learn_credentials(client_call_details.metadata or ())
        call = continuation(client_call_details, request)
        call.add_done_callback(_note)
        return call


def _note(call: Any) -> None:
    if call.code() is grpc.StatusCode.OK:
        answer = call.result()
        if isinstance(answer, Message):
            WITNESS.learn(answer)
    elif call.code() is not None:
        WITNESS.hear(call.details(), *(f"{key}: {value!r}" for key, value in call.trailing_metadata() or ()))
