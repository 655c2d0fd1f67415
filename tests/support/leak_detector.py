"""Records the output of all servers of the tests, and the secrets that the tests send and receive, to find leaks.

Output is every event of the log at every level, and the message, details and trailers of every failed call. Secrets are
passwords, codes, tokens and emails, wherever they stand in a message, and what callers send as an API key. Anything
that looks like a key, a token, an email or a hash is a leak as well, even if the suite has never sent it.
A fixture in tests/conftest.py searches the output for secrets when all tests have run.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message
from google.rpc import status_pb2
from structlog.typing import EventDict, WrappedLogger

from personae.v1 import authentication_pb2
from service.core.callers.api_keys import KEY_PATTERN
from service.core.factors.recovery_codes import CODE_PATTERN
from service.core.factors.tickets import TICKET_PATTERN
from service.core.sessions.refresh_tokens import TOKEN_PATTERN

_DETAILS = "grpc-status-details-bin"
MIN_LENGTH = 10
"""Shorter texts occur in a log by chance."""
_SECRET_FIELDS = frozenset(
    {
        "password",
        "current_password",
        "new_password",
        "hashed_password",
        "code",
        "email",
        "new_email",
        "deliver_to",
        "identifier",
    }
    | {"refresh_token", "access_token", "token"}
    | {"ticket", "secret", "uri", "recovery_code", "recovery_codes", "replacement_code"}
)
LOOKS_LIKE_A_TOKEN = re.compile(rf"{KEY_PATTERN}|{TOKEN_PATTERN}|eyJ[\w-]+\.eyJ")
"""An API key, a refresh token, an access token."""
_LOOKS_SECRET = re.compile(
    rf"\$2[aby]\$\d\d\$|\$bcrypt-sha256\$|\$argon2|pbkdf2_sha|\$[156PSH]\$|\$(wrapped|firescrypt)\$|\{{S?SHA"
    rf"|[\w.+-]+@[\w-]+\.\w+|{TICKET_PATTERN}|{CODE_PATTERN}|{LOOKS_LIKE_A_TOKEN.pattern}"
)
"""Also hashes, emails, tickets and recovery codes."""


class LeakDetector:
    """The output and the secrets of one run of the tests."""

    def __init__(self) -> None:
        self.output: list[str] = []
        self.secrets: set[str] = set()

    def learn(self, message: Message) -> None:
        """Record the secrets in a message of this API."""
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
        """Record what a caller sends as `authorization`: each word, and the secret part of an API key."""
        for name, value in metadata:
            if name == "authorization" and isinstance(value, str):
                words = [*value.split(), *value.rsplit("_", 1)]
                self.secrets |= {word for word in words if len(word) >= MIN_LENGTH}

    def record(self, *texts: object) -> None:
        self.output += [str(text) for text in texts]

    def leaks(self) -> Iterator[str]:
        """Yield the output that contains a secret, or something that looks like one.

        Looks secrets up by their beginning: to search for each of many thousand would take half a minute.
        """
        by_beginning = defaultdict(list)
        for secret in self.secrets:
            by_beginning[secret[:MIN_LENGTH]].append(secret)
        for text in self.output:
            if _LOOKS_SECRET.search(text):
                yield text
            for start in range(len(text) - MIN_LENGTH + 1):
                for secret in by_beginning.get(text[start : start + MIN_LENGTH], ()):
                    if text.startswith(secret, start):
                        yield f"{secret!r}: {text}"


DETECTOR = LeakDetector()


class Log:
    """The output since this object was made."""

    def __init__(self) -> None:
        self._start = len(DETECTOR.output)

    def __contains__(self, words: str) -> bool:
        return any(words in text for text in DETECTOR.output[self._start :])


def record_event(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """A processor of structlog: records every event, and lets only errors through to the terminal."""
    DETECTOR.record(event)
    if event["level"] not in {"error", "critical"}:
        raise structlog.DropEvent
    return event


class Handler(logging.Handler):
    """Records what libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Record the message with its arguments and traceback."""
        DETECTOR.record(self.format(record))


class Interceptor(grpc.UnaryUnaryClientInterceptor):
    """Records the secrets in requests and responses, and how calls fail."""

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        """Record the request now, and the outcome when the call has ended."""
        if isinstance(request, Message):
            DETECTOR.learn(request)
        DETECTOR.learn_credentials(client_call_details.metadata or ())
        call = continuation(client_call_details, request)
        call.add_done_callback(_note)
        return call


def _note(call: Any) -> None:
    if call.code() is grpc.StatusCode.OK:
        answer = call.result()
        if isinstance(answer, Message):
            DETECTOR.learn(answer)
    elif call.code() is not None:
        trailers = dict(call.trailing_metadata() or ())
        if _DETAILS in trailers:
            trailers[_DETAILS] = _without_challenge(trailers[_DETAILS])
        DETECTOR.record(call.details(), *(f"{key}: {value!r}" for key, value in trailers.items()))


def _without_challenge(details: Any) -> bytes:
    """The details of a status without the challenge, whose ticket is a secret and is recorded as one."""
    status, challenge = status_pb2.Status.FromString(details), authentication_pb2.SecondFactorChallenge()
    for index, detail in enumerate(status.details):
        if detail.Unpack(challenge):
            DETECTOR.learn(challenge)
            del status.details[index]
            break
    without: bytes = status.SerializeToString()
    return without
