"""Unauthorised calls reach no servicer: 500 generated requests for each RPC, and 10,000 with PERSONAE_FULL=1."""

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from personae.v1 import user_pb2, user_pb2_grpc
from service.core.callers.api_keys import NewKey
from service.db.models import Base
from service.rpc.methods import ALL_SCOPES, METHODS
from service.rpc.proxies.envoy import AuthorizationServicer
from service.rpc.servicers.audit import AuditServicer
from service.rpc.servicers.authentication import AuthenticationServicer
from service.rpc.servicers.credential import CredentialServicer
from service.rpc.servicers.factors.factor import FactorServicer
from service.rpc.servicers.session import SessionServicer
from service.rpc.servicers.signing_key import SigningKeyServicer
from service.rpc.servicers.users.user import UserServicer
from service.rpc.services import SERVED_METHODS
from tests.support.callers import REFUSALS, REQUESTS, Operator, bearer, keyed, naming, operating, told
from tests.support.databases import Postgres
from tests.support.factories import PASSWORD, new_user
from tests.support.leak_detector import DETECTOR
from tests.support.proxy import PostgresProxy
from tests.support.servers import RunningServer, running
from tests.support.waiting import PATIENCE, is_of_a_job

COUNT = 10_000 if os.environ.get("PERSONAE_FULL") == "1" else 500
DISTINCT = 100
"""Different requests of each kind."""
AT_ONCE = 250
"""Concurrent calls."""
CHANNELS = 2
SERVICERS = {
    "UserService": UserServicer,
    "AuthenticationService": AuthenticationServicer,
    "CredentialService": CredentialServicer,
    "AuditService": AuditServicer,
    "SessionService": SessionServicer,
    "SigningKeyService": SigningKeyServicer,
    "FactorService": FactorServicer,
    "Authorization": AuthorizationServicer,
}
HOSTILE = (
    *("", "\0", "a\0b", "\x1b[31m", "ada@example.com", "ADA", "'; DROP TABLE users; --", "%s%n", "v1", "*"),
    *("a@" + "b" * 250 + ".com", "a" + "\u0300\u0323" * 500, "\U0001f600" * 30, "\u212aelvin@example.com"),
    "7b0e2d34-9f4c-4f5b-8a25-0f7ed2f2b9a1",
)
INTEGERS = (0, 1, 2, -1, 2**31 - 1, -(2**31))
NEUTRAL = {"SELECT 1", "BEGIN", "COMMIT"}
"""Statements that any transaction or job sends."""
BY_THE_SERVER = re.compile(
    r"(FROM|UPDATE) caller_keys|FROM caller_identities|pg_is_in_recovery"
    r"|transaction_read_only|SET LOCAL synchronous_commit = off$"
)
"""Reads of callers, writes of the last use of keys, and health checks of the database."""
Outcome = tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]


def hostile(made: Message, chance: random.Random, depth: int = 3) -> Message:
    """A message with hostile values in any of its fields."""
    for field in made.DESCRIPTOR.fields:
        for _ in range(chance.choice((0, 1, 1, 2) if field.is_repeated else (0, 1, 1))):
            if field.message_type is not None:
                child = getattr(made, field.name)
                if field.message_type.GetOptions().map_entry:
                    child.update({chance.choice(HOSTILE): chance.choice(HOSTILE)})  # of text, in what is asked
                    continue
                child = child.add() if field.is_repeated else child
                child.SetInParent()
                if depth:
                    hostile(child, chance, depth - 1)
            elif field.is_repeated:
                getattr(made, field.name).append(hostile_value(field.type, chance))
            else:
                setattr(made, field.name, hostile_value(field.type, chance))
    return made


def hostile_value(kind: int, chance: random.Random) -> Any:
    match kind:
        case FieldDescriptor.TYPE_STRING:
            return chance.choice(HOSTILE)
        case FieldDescriptor.TYPE_BYTES:
            return chance.randbytes(20)
        case FieldDescriptor.TYPE_BOOL:
            return chance.random() < 0.5
        case _:
            return chance.choice(INTEGERS)


def damaged(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] if chance.random() < 0.5 else data[:place] + chance.randbytes(1) + data[place + 1 :]


def requests(method: str, users: Sequence[user_pb2.User]) -> list[bytes]:
    """Random bytes, hostile messages, and valid requests about these users, also damaged; the same in each run."""
    chance = random.Random(method)
    made = [chance.randbytes(chance.randrange(200)) for _ in range(DISTINCT)]
    made += [hostile(REQUESTS[method](), chance).SerializeToString() for _ in range(DISTINCT)]
    good = [naming(method, user) for user in users]
    made += good * (DISTINCT // len(good))
    made += [damaged(chance.choice(good), chance) for _ in range(DISTINCT)]
    chance.shuffle(made)
    return made


def flood(channels: Sequence[grpc.Channel], method: str, data: Sequence[bytes], metadata: Any) -> Counter[Outcome]:
    """Send these requests. Returns the number of each outcome, without the request ids."""
    calls: list[Any] = [channel.unary_unary(method) for channel in channels]
    ended: Counter[Outcome] = Counter()
    for start in range(0, len(data), AT_ONCE):
        under_way = [
            calls[index % len(calls)].future(request, metadata=metadata, timeout=PATIENCE)
            for index, request in enumerate(data[start : start + AT_ONCE])
        ]
        for call in under_way:
            trailers = [(key, value) for key, value in call.trailing_metadata() if key != "x-request-id"]
            ended[call.code(), call.details(), tuple(sorted(trailers))] += 1
    return ended


def counting(method: str, reached: Counter[str], function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        reached[method] += 1
        return function(*arguments)

    return run


@dataclass(frozen=True)
class Attacked:
    """A server that counts calls of its servicers, with a proxy that records statements."""

    server: RunningServer
    proxy: PostgresProxy
    operator: Operator
    reached: Counter[str]
    channels: Sequence[grpc.Channel]
    everything: NewKey
    all_but: dict[str, NewKey]
    users: Sequence[user_pb2.User]
    """An existing one and an unknown one."""

    def feature_statements(self) -> list[str]:
        """The statements other than those that the server sends without a call."""
        return [
            one
            for one in self.proxy.statements
            if one not in NEUTRAL and not BY_THE_SERVER.search(one) and not is_of_a_job(one)
        ]

    def rows(self) -> dict[str, list[str]]:
        """All rows, except for the last use of keys."""
        with self.operator.database.engine.connect() as connection:
            return {
                table: list(connection.exec_driver_sql(f"SELECT t::text FROM {table} t ORDER BY 1").scalars())
                for table in Base.metadata.tables
                if table != "caller_keys"
            }


@pytest.fixture(scope="module")
def reached() -> Iterator[Counter[str]]:
    """The number of calls of each servicer method."""
    counted: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for method in SERVED_METHODS:
            _, service, name = method.replace("/", ".").rsplit(".", 2)
            servicer = SERVICERS[service]
            patch.setattr(servicer, name, counting(method, counted, getattr(servicer, name)))
        yield counted


@pytest.fixture(scope="module")
def attacked(postgres: Postgres, template: str, reached: Counter[str]) -> Iterator[Attacked]:
    with postgres.scratch(template=template) as url, operating(url) as operator:
        everything = operator.create_with_key(*ALL_SCOPES)
        all_but = {scope: operator.create_with_key(*(ALL_SCOPES - {scope})) for scope in ALL_SCOPES}
        settings = {"caller_auth": "required", "caller_cache_seconds": 60, "hash_max_waiting": AT_ONCE}
        with PostgresProxy(url) as proxy, running(proxy.proxied, **settings) as server:
            stub = user_pb2_grpc.UserServiceStub(keyed(server.channel, everything))
            users = (new_user(stub, password=PASSWORD), user_pb2.User(id=2**40, email="no@example.com", username="no"))
            options = [("grpc.use_local_subchannel_pool", 1)]
            channels = [grpc.insecure_channel(server.address, options) for _ in range(CHANNELS)]
            try:
                yield Attacked(server, proxy, operator, reached, channels, everything, all_but, users)
            finally:
                for channel in channels:
                    channel.close()


@pytest.mark.parametrize("method", SERVED_METHODS)
def test_generated_requests_reach_no_servicer(attacked: Attacked, method: str) -> None:
    """Without credentials, or with a key for all other scopes: all answers are the same, and no servicer is called."""
    distinct = requests(method, attacked.users)
    data = [distinct[index % len(distinct)] for index in range(COUNT // 2)]
    key = bearer(attacked.all_but[METHODS[method].scope])
    before = attacked.rows()
    attacked.reached.clear()
    del attacked.proxy.statements[:]

    unknown = flood(attacked.channels, method, data, [])
    known = flood(attacked.channels, method, data, [("authorization", key)])

    assert (attacked.reached, attacked.feature_statements()) == ({}, [])
    assert attacked.rows() == before
    for ended, code, message in (
        (unknown, grpc.StatusCode.UNAUTHENTICATED, REFUSALS["CREDENTIALS_MISSING"]),
        (
            known,
            grpc.StatusCode.PERMISSION_DENIED,
            f"The caller has not been granted the scope {METHODS[method].scope}.",
        ),
    ):
        [((was, said, trailers), count)] = ended.items()
        assert (was, said, count) == (code, message, COUNT // 2)
        assert [name for name, _ in trailers] == ["grpc-status-details-bin"]
        DETECTOR.record(said, trailers)
    # The counters do work: a call with every scope is counted.
    told(attacked.server.channel, bearer(attacked.everything), method=method, request=naming(method, user_pb2.User()))
    assert attacked.reached == {method: 1}


def test_statements_and_rows_of_a_feature_are_seen(attacked: Attacked) -> None:
    """So the test above can fail."""
    before = attacked.rows()
    del attacked.proxy.statements[:]
    call = "/personae.v1.AuthenticationService/Authenticate"
    request = naming(call, attacked.users[0])

    assert told(attacked.server.channel, bearer(attacked.everything), method=call, request=request) == "OK"

    assert len(attacked.feature_statements()) >= 2
    after = attacked.rows()
    assert [table for table in after if after[table] != before[table]] == ["audit_events"]
