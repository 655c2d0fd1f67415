"""What the service is compared with: two servers that do less for the same answer. Programs of their own.

    python -m benchmarks.servers bare      builds the message from values that lie ready: what gRPC itself costs
    python -m benchmarks.servers session   one statement in a Session, by Core: what the database costs on top
    python -m benchmarks.servers collector takes traces by OTLP, and throws them away

The first two have as many threads as the service and get DATABASE_URL. All log one line as the service does once they
listen.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from sqlalchemy import BigInteger, bindparam, create_engine, select
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from personae.v1 import user_pb2, user_pb2_grpc
from service.base.settings import Settings, load_settings
from service.core.users import COLUMNS, UserRecord
from service.db.models import User, table_of
from service.rpc.validation import user_message

_users = table_of(User)
_BY_ID = select(*COLUMNS).where(_users.c.id == bindparam("value", type_=BigInteger()))
_SAMPLE = 1000
"""How many users the bare server knows: those with the lowest ids, which are the ones that callers ask it for."""


class Bare(user_pb2_grpc.UserServiceServicer):
    """No database: the same message from the same values, by the same function."""

    def __init__(self, url: URL) -> None:
        engine = create_engine(url)
        with engine.connect() as connection:
            rows = connection.execute(select(*COLUMNS).order_by(_users.c.id).limit(_SAMPLE))
            self._records = {row.id: UserRecord._make(row) for row in rows}
        engine.dispose()

    def GetUser(self, request: user_pb2.GetUserRequest, context: grpc.ServicerContext) -> user_pb2.User:  # noqa: ARG002, N802  gRPC's signature and name
        return user_message(self._records[request.key.id])


class SessionAndCore(user_pb2_grpc.UserServiceServicer):
    """One autocommit SELECT in a plain Session, and nothing around it.

    The pool is as large as the service's. It does not ping at all, where the service answers its own ping without a
    round trip: the comparison is to err against the service.
    """

    def __init__(self, url: URL, settings: Settings) -> None:
        self._engine = create_engine(
            url,
            pool_size=settings.db_pool_size,
            max_overflow=settings.db_max_overflow,
            pool_timeout=settings.db_pool_timeout,
            pool_recycle=settings.db_pool_recycle,
            pool_use_lifo=True,
        )

    def GetUser(self, request: user_pb2.GetUserRequest, context: grpc.ServicerContext) -> user_pb2.User:  # noqa: ARG002, N802  gRPC's signature and name
        with Session(self._engine) as session:
            driver = session.connection().connection.dbapi_connection
            assert driver is not None
            if not driver.autocommit:
                driver.autocommit = True
            row = session.execute(_BY_ID, {"value": request.key.id}).one()
        return user_message(UserRecord._make(row))


class Collector(grpc.GenericRpcHandler):
    """Says yes to every request, without looking at it."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":  # noqa: ARG002  gRPC's signature
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")


def main(kind: str) -> None:
    """Serve until a signal ends the process."""
    settings = load_settings()
    assert settings.url is not None
    server = grpc.server(ThreadPoolExecutor(settings.grpc_threads), options=(("grpc.so_reuseport", 0),))
    if kind == "collector":
        server.add_generic_rpc_handlers((Collector(),))
    else:  # GetUser is all that is asked of them
        servicer = Bare(settings.url) if kind == "bare" else SessionAndCore(settings.url, settings)  # type: ignore[abstract]
        user_pb2_grpc.add_UserServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(json.dumps({"event": "listening", "port": port, "pid": os.getpid()}), file=sys.stderr, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main(sys.argv[1])
