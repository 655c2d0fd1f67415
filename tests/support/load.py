"""Callers that call without a pause: reads, writes and sign-ins, and count how every call ends."""

import contextlib
import json
import re
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc

from personae.v1 import authentication_pb2, authentication_pb2_grpc, user_pb2, user_pb2_grpc
from tests.support.factories import PASSWORD, new_user, unique_name

_ROOT = Path(__file__).parents[2]


def _documented() -> dict[str, Any]:
    """The service config that docs/python.md tells callers to use."""
    text = (_ROOT / "docs/python.md").read_text()
    (block,) = re.findall(r"^(REPEATABLE = .*?^CONFIG = .*?^}$)", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/python.md", "exec"), names)
    config: dict[str, Any] = names["CONFIG"]
    return config


RETRIES = json.dumps(_documented())
"""What docs/python.md tells callers to configure."""


class Load:
    """Threads with a connection each, until `stop`."""

    def __init__(self, address: str, *, threads: int = 6, retries: bool = False) -> None:
        self._address = address
        self._config = RETRIES if retries else None
        self.ended: Counter[str] = Counter()
        """How many calls ended how: method, code and details."""
        self.created: list[int] = []
        """The users that were acknowledged."""
        self._changed = threading.Condition()
        self._is_over = threading.Event()
        with grpc.insecure_channel(address) as channel:
            self._user = new_user(user_pb2_grpc.UserServiceStub(channel), password=PASSWORD)
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(threads)]

    @property
    def failures(self) -> dict[str, int]:
        """What did not end with OK."""
        return {how: count for how, count in self.ended.items() if not how.endswith(" OK")}

    def wait_for_calls(self, more: int) -> None:
        """Until so many more calls have ended well."""
        with self._changed:
            wanted = self._good() + more
            assert self._changed.wait_for(lambda: self._good() >= wanted, 60), self.ended

    def _good(self) -> int:
        return sum(count for how, count in self.ended.items() if how.endswith(" OK"))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for_calls(len(self._threads))
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)

    def _work(self, number: int) -> None:
        with self._channel() as channel:
            users = user_pb2_grpc.UserServiceStub(channel)
            sign_ins = authentication_pb2_grpc.AuthenticationServiceStub(channel)
            turn = number
            while not self._is_over.is_set():
                turn += 1
                name = ("GetUser", "CreateUser", "Authenticate")[turn % 3]
                try:
                    if name == "GetUser":
                        users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=self._user.id)), timeout=20)
                    elif name == "CreateUser":
                        self.created.append(self._create(users))
                    else:
                        sign_ins.Authenticate(
                            authentication_pb2.AuthenticateRequest(user_id=self._user.id, password=PASSWORD),
                            timeout=20,
                        )
                    how = f"{name} OK"
                except grpc.RpcError as error:
                    how = f"{name} {error.code().name} {error.details()}"
                with self._changed:
                    self.ended[how] += 1
                    self._changed.notify_all()

    @contextlib.contextmanager
    def _channel(self) -> Iterator[grpc.Channel]:
        options: list[tuple[str, object]] = [("grpc.use_local_subchannel_pool", 1)]
        if self._config is not None:
            options += [("grpc.service_config", self._config)]
        with grpc.insecure_channel(self._address, options=options) as channel:
            yield channel

    @staticmethod
    def _create(users: user_pb2_grpc.UserServiceStub) -> int:
        name = unique_name()
        request = user_pb2.CreateUserRequest(
            user=user_pb2.User(email=f"{name}@example.com", username=name), request_id=str(uuid.uuid4())
        )
        return users.CreateUser(request, timeout=20).id
