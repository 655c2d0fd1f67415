"""Threads that call without a pause, and count the outcomes of their calls."""

import json
import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_status import rpc_status

from personae.v1 import authentication_pb2, authentication_pb2_grpc, user_pb2, user_pb2_grpc
from service.base.clock import monotonic
from tests.support.errors import failure_of
from tests.support.factories import PASSWORD, creation, get_request, new_user
from tests.support.waiting import PATIENCE

Call = tuple[str, Callable[[], Any]]
"""The name of an RPC, and a function that calls it."""
_ROOT = Path(__file__).parents[2]


def _documented() -> dict[str, Any]:
    """The service config that docs/python.md recommends."""
    text = (_ROOT / "docs/python.md").read_text()
    (block,) = re.findall(r"^(REPEATABLE = .*?^CONFIG = .*?^}$)", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/python.md", "exec"), names)
    config: dict[str, Any] = names["CONFIG"]
    return config


RETRIES = json.dumps(_documented())
"""The service config that docs/python.md recommends, as JSON."""


class Callers:
    """Threads that make one call after another until the block ends."""

    def __init__(self, calls: Callable[[int], Generator[Call]], *, threads: int) -> None:
        """calls: the endless calls of the thread with this number."""
        self._calls = calls
        self.ended: Counter[str] = Counter()
        """The number of calls by outcome: the RPC, the code, and the reason or the message."""
        self.created: list[int] = []
        """The users whose creation was acknowledged."""
        self._created_at: list[float] = []
        self._changed = threading.Condition()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(threads)]

    @property
    def failures(self) -> dict[str, int]:
        """The outcomes other than OK."""
        return {how: count for how, count in dict(self.ended).items() if how.split()[1] != "OK"}

    @property
    def longest_gap(self) -> float:
        """The longest time in seconds between two creations that were acknowledged."""
        return max(later - earlier for earlier, later in pairwise(sorted(self._created_at)))

    def wait_for_calls(self, more: int, *, code: str = "OK") -> None:
        """Wait until this many more calls have ended with this code."""
        with self._changed:
            wanted = self._count(code) + more
            assert self._changed.wait_for(lambda: self._count(code) >= wanted, PATIENCE), self.ended

    def _count(self, code: str) -> int:
        return sum(count for how, count in self.ended.items() if how.split()[1] == code)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for_calls(len(self._threads))
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def _work(self, number: int) -> None:
        with closing(self._calls(number)) as calls:
            for name, call in calls:
                if self._is_over.is_set():
                    return
                try:
                    answer = call()
                    how = f"{name} OK"
                except grpc.RpcError as error:
                    answer = None
                    said = error.details() if rpc_status.from_call(error) is None else failure_of(error).reason
                    how = f"{name} {error.code().name} {said}"
                with self._changed:
                    self.ended[how] += 1
                    if answer is not None and name == "CreateUser":
                        self.created.append(answer.id)
                        self._created_at.append(monotonic())
                    self._changed.notify_all()


class Load(Callers):
    """Reads, writes and sign-ins from threads with a connection each."""

    def __init__(self, address: str, *, threads: int = 4, retries: bool = False) -> None:
        super().__init__(self._mixed, threads=threads)
        self._address = address
        self._options: list[tuple[str, object]] = [("grpc.use_local_subchannel_pool", 1)]
        if retries:
            self._options.append(("grpc.service_config", RETRIES))
        with grpc.insecure_channel(address) as channel:
            self._user = new_user(user_pb2_grpc.UserServiceStub(channel), password=PASSWORD)

    def _mixed(self, number: int) -> Generator[Call]:
        with grpc.insecure_channel(self._address, options=self._options) as channel:
            users = user_pb2_grpc.UserServiceStub(channel)
            authenticate = authentication_pb2_grpc.AuthenticationServiceStub(channel).Authenticate
            get = get_request(self._user)
            sign_in = authentication_pb2.AuthenticateRequest(user_id=self._user.id, password=PASSWORD)
            calls: list[Call] = [
                ("GetUser", partial(users.GetUser, get, timeout=PATIENCE)),
                ("CreateUser", lambda: users.CreateUser(creation(request_id=str(uuid.uuid4())), timeout=PATIENCE)),
                ("Authenticate", partial(authenticate, sign_in, timeout=PATIENCE)),
            ]
            while True:
                number += 1
                yield calls[number % len(calls)]


class Writers(Callers):
    def __init__(self, users: user_pb2_grpc.UserServiceStub, *, threads: int) -> None:
        super().__init__(self._creations, threads=threads)
        self._users = users

    def _creations(self, _: int) -> Generator[Call]:
        while True:
            yield "CreateUser", partial(self._users.CreateUser, creation(), timeout=PATIENCE)


def missing(users: user_pb2_grpc.UserServiceStub, ids: Iterable[int]) -> list[int]:
    """The ids of users that do not exist."""
    found = []
    for user_id in ids:
        try:
            users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user_id)), timeout=PATIENCE)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            found.append(user_id)
    return found
