"""Reference servers that the service is compared with, and a collector of traces.

    python -m benchmarks.servers bare      returns messages from values in memory: the cost of gRPC alone
    python -m benchmarks.servers session   one SELECT in a Session, with Core: gRPC and the database
    python -m benchmarks.servers collector accepts traces over OTLP and discards them

The first two have as many threads as the service and use DATABASE_URL. Each logs one line once it listens, as the
service does.
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
"""The bare server keeps the users with the lowest ids; the benchmark requests no others."""


class Bare(user_pb2_grpc.UserServiceServicer):
    """GetUser without a database, with the service's function that builds the message."""

    def __init__(self, url: URL) -> None:
        engine = create_engine(url)
        with engine.connect() as connection:
            rows = connection.execute(select(*COLUMNS).order_by(_users.c.id).limit(_SAMPLE))
            self._records = {row.id: UserRecord._make(row) for row in rows}
        engine.dispose()

    def GetUser(self, request: user_pb2.GetUserRequest, context: grpc.ServicerContext) -> user_pb2.User:  # noqa: ARG002, N802  gRPC's signature and name
        return user_message(self._records[request.key.id])


class SessionAndCore(user_pb2_grpc.UserServiceServicer):
    """GetUser as one autocommit SELECT in a plain Session, without a pipeline.

    The pool has the size of the service's and does not ping, which favours this server over the service.
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
    """Accepts every request without parsing it."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":  # noqa: ARG002  gRPC's signature
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")


def main(kind: str) -> None:
    """Serve until a signal ends the process."""
    settings = load_settings()
    assert settings.url is not None
    server = grpc.server(ThreadPoolExecutor(settings.grpc_threads), options=(("grpc.so_reuseport", 0),))
    if kind == "collector":
        server.add_generic_rpc_handlers((Collector(),))
    else:  # the servicers implement GetUser only
        servicer = Bare(settings.url) if kind == "bare" else SessionAndCore(settings.url, settings)  # type: ignore[abstract]
        user_pb2_grpc.add_UserServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(json.dumps({"event": "listening", "port": port, "pid": os.getpid()}), file=sys.stderr, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main(sys.argv[1])
