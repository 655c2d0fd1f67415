"""Creates callers as an operator does, and calls RPCs with their credentials."""

import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from personae.v1 import user_pb2
from service.base.actor import COMMAND_LINE
from service.base.clock import monotonic
from service.core.callers import administration
from service.core.callers.api_keys import RANDOM_BYTES, NewKey, make_key
from service.db.engine import Database, reading
from service.rpc.services import SERVICES
from service.server.wiring import open_database
from tests.support.certificates import Pair
from tests.support.errors import Failure, failure_of
from tests.support.factories import PASSWORD
from tests.support.leak_detector import DETECTOR, Interceptor
from tests.support.servers import settings_for
from tests.support.waiting import PATIENCE, eventually

LATE = "DATABASE_UNAVAILABLE"
"""The answer on a machine that is so busy that one read of the callers takes longer than it may."""
LIST_USERS = "/personae.v1.UserService/ListUsers"
REQUESTS: dict[str, Any] = {
    f"/{service.full_name}/{method.name}": message_factory.GetMessageClass(method.input_type)
    for service in SERVICES
    for method in service.methods
}
"""The request of each RPC."""
REFUSALS = {
    "CREDENTIALS_MISSING": "The call has no credentials. Send `authorization: Bearer pk_…`, or connect with a client "
    "certificate.",
    "KEY_MALFORMED": "The authorization metadata is not `Bearer` and a complete API key.",
    "KEY_UNKNOWN": "There is no such API key.",
    "KEY_REVOKED": "The API key was revoked.",
    "KEY_EXPIRED": "The API key has expired.",
    "KEY_OVER_PLAINTEXT": "The API key was sent in clear text, and was refused unread. Revoke it, and use TLS.",
    "CERTIFICATE_UNKNOWN": "The client certificate does not identify exactly one caller.",
    "CERTIFICATE_EXPIRED": "The client certificate has expired. Connect again with a new one.",
}
"""The messages of refusals, by reason. They are repeated here because they are part of the contract."""


def new_key() -> NewKey:
    """A key that no caller has."""
    return make_key(os.urandom(RANDOM_BYTES))


def bearer(key: NewKey) -> str:
    """The `authorization` metadata of a caller."""
    return f"Bearer {key.text}"


@dataclass(frozen=True)
class Operator:
    """An operator, who creates and changes callers."""

    database: Database

    @contextlib.contextmanager
    def changing(self) -> Iterator[Session]:
        with self.database.scope(actor=COMMAND_LINE) as session, session.begin():
            yield session

    def create(self, *scopes: str, identities: Sequence[str] = (), audiences: Sequence[str] = ()) -> str:
        """Create a caller. Returns its name, which is unique."""
        name = f"caller-{secrets.token_hex(6)}"
        with self.changing() as session:
            administration.create_caller(session, name, scopes=scopes, audiences=audiences, identities=identities)
        return name

    def add_key(self, name: str, *, valid_for: timedelta = timedelta(days=365), now: datetime | None = None) -> NewKey:
        """Give a caller another key. Raises CallerError."""
        key, now = new_key(), now or datetime.now(UTC)
        with self.changing() as session:
            administration.add_key(session, name, key, expires_at=now + valid_for, now=now)
        DETECTOR.secrets.add(key.text)
        return key

    def create_with_key(
        self, *scopes: str, valid_for: timedelta = timedelta(days=365), audiences: Sequence[str] = ()
    ) -> NewKey:
        return self.add_key(self.create(*scopes, audiences=audiences), valid_for=valid_for)

    def revoke(self, key: NewKey) -> None:
        with self.changing() as session:
            administration.revoke_key(session, key.key_id, now=datetime.now(UTC))

    def change_scopes(self, name: str, *, add: Sequence[str] = (), remove: Sequence[str] = ()) -> None:
        with self.changing() as session:
            administration.change_scopes(session, name, add=add, remove=remove)

    def caller(self, name: str) -> administration.CallerRecord:
        with self.database.scope() as session, reading(session):
            return administration.get_caller(session, name)

    def last_used_at(self, name: str) -> list[datetime | None]:
        """The stored last use of each key of a caller."""
        return [key.last_used_at for key in self.caller(name).keys]


@contextlib.contextmanager
def operating(url: URL, *, connections: int = 5) -> Iterator[Operator]:
    """Open the database for an operator."""
    database = open_database(settings_for(url, db_pool_size=connections), url)
    try:
        yield Operator(database)
    finally:
        database.dispose()


def tls_settings(pair: Pair, **changes: object) -> dict[str, object]:
    """The settings of a TLS server with these files that requires authentication by key or certificate."""
    files = pair.files
    return {
        "caller_auth": "required",
        "tls_certificate_file": files.certificate,
        "tls_private_key_file": files.private_key,
        "tls_client_ca_file": files.client_ca,
    } | changes


class _WithAuthorization(grpc.UnaryUnaryClientInterceptor):
    """Sends the same credentials with every call."""

    def __init__(self, authorization: str) -> None:
        self._pair = ("authorization", authorization)

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        metadata = [*(client_call_details.metadata or ()), self._pair]
        return continuation(client_call_details._replace(metadata=metadata), request)


def keyed(channel: grpc.Channel, key: NewKey) -> grpc.Channel:
    """A channel that sends the key with every call."""
    return grpc.intercept_channel(channel, _WithAuthorization(bearer(key)))


@contextlib.contextmanager
def connected(address: str) -> Iterator[grpc.Channel]:
    """A channel with a connection of its own, without TLS."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield grpc.intercept_channel(channel, Interceptor())


def call(
    channel: grpc.Channel,
    *authorization: str,
    method: str = LIST_USERS,
    request: bytes = b"",
    metadata: Sequence[tuple[str, str]] = (),
) -> Any:
    """Call with all of these credentials. Raises RpcError."""
    function: Any = channel.unary_unary(method)
    sent = [*metadata, *(("authorization", one) for one in authorization)]
    return function(request, metadata=sent, timeout=PATIENCE)


def told(channel: grpc.Channel, *authorization: str, **options: Any) -> str:
    """Call, and return OK or the reason of the failure. Checks the whole answer of a refused call."""
    try:
        call(channel, *authorization, **options)
    except grpc.RpcError as error:
        return reason_of(failure_of(error))
    return "OK"


def reason_of(failure: Failure) -> str:
    """The reason of a failure, for SCOPE_MISSING with the scope. A refusal must reveal no more than that."""
    if failure.reason == "SCOPE_MISSING":
        [(name, scope)] = failure.error_metadata.items()
        assert name == "scope"
        assert failure.code is grpc.StatusCode.PERMISSION_DENIED
        assert failure.message == f"The caller has not been granted the scope {scope}."
        _reveals_no_more(failure)
        return f"SCOPE_MISSING {scope}"
    if failure.reason in REFUSALS:
        assert failure.code is grpc.StatusCode.UNAUTHENTICATED
        assert failure.message == REFUSALS[failure.reason]
        assert failure.error_metadata == {}
        _reveals_no_more(failure)
    return failure.reason


def _reveals_no_more(failure: Failure) -> None:
    assert failure.violations == {}
    assert failure.retry_after is None
    assert failure.trailers.keys() == {"x-request-id"}


def call_until(after: str, call: Callable[[], str], *, before: str) -> float:
    """Call until the answer changes. Returns when the last call began that was answered as before."""
    last = float("-inf")

    def is_new() -> bool:
        nonlocal last
        began, answer = monotonic(), call()
        assert answer in {before, after, LATE}
        if answer == before:
            last = began
        return answer == after

    eventually(is_new, f"{after} instead of {before}")
    assert {call() for _ in range(20)} <= {after, LATE}  # and never the old one again
    return last


def naming(method: str, user: user_pb2.User) -> bytes:
    """A request of this RPC that names the user in every field that can."""
    request: Message = REQUESTS[method]()
    _name(request, user)
    return request.SerializeToString()


def _name(message: Message, user: user_pb2.User) -> None:
    texts = {"email": user.email, "new_email": user.email, "identifier": user.email, "username": user.username}
    texts |= dict.fromkeys(("password", "current_password", "new_password"), PASSWORD)
    for field in message.DESCRIPTOR.fields:
        if field.name in {"id", "user_id"} and field.type == field.TYPE_INT64:
            setattr(message, field.name, user.id)
        elif field.name in texts:
            setattr(message, field.name, texts[field.name])
        elif field.message_type is not None and field.message_type.full_name.startswith("personae."):
            child = getattr(message, field.name)
            _name(child.add() if field.is_repeated else child, user)


def other_address() -> str | None:
    """An address of this machine that is not loopback, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, but finds the route
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if ip_address(address).is_loopback else address
