"""Callers that create users without a pause, whatever happens to the database, and remember what they were told."""

import threading
from collections.abc import Iterable
from itertools import pairwise
from typing import Self

import grpc

from personae.v1 import user_pb2, user_pb2_grpc
from service.base.clock import monotonic
from tests.support.errors import failure_of
from tests.support.factories import unique_name

_PAUSE_SECONDS = 0.005
_SECONDS = 60


class Writers:
    """So many threads, each of which creates one user after another until the block ends."""

    def __init__(self, users: user_pb2_grpc.UserServiceStub, *, threads: int) -> None:
        self._users = users
        self._is_over = threading.Event()
        self._changed = threading.Condition()
        self._answers: list[tuple[float, str]] = []
        self.refused: set[str] = set()
        """The reasons of what failed."""
        self._threads = [threading.Thread(target=self._write) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(_SECONDS)
            assert not thread.is_alive()

    @property
    def acknowledged(self) -> list[str]:
        """The usernames of those that were created, as far as the callers were told."""
        return [name for _, name in self._answers]

    @property
    def longest_gap(self) -> float:
        """The longest time in seconds between two acknowledgements."""
        times = sorted(at for at, _ in self._answers)
        return max(later - earlier for earlier, later in pairwise(times))

    def wait_for_more(self, count: int) -> None:
        """Until so many more have been acknowledged."""
        with self._changed:
            enough = len(self._answers) + count
            assert self._changed.wait_for(lambda: len(self._answers) >= enough, _SECONDS), self.refused

    def _write(self) -> None:
        while not self._is_over.is_set():
            name = unique_name()
            user = user_pb2.User(email=f"{name}@example.com", username=name)
            try:
                self._users.CreateUser(user_pb2.CreateUserRequest(user=user), timeout=5)
            except grpc.RpcError as error:
                self.refused.add(failure_of(error).reason)
                self._is_over.wait(_PAUSE_SECONDS)
                continue
            with self._changed:
                self._answers.append((monotonic(), name))
                self._changed.notify_all()


def missing(users: user_pb2_grpc.UserServiceStub, names: Iterable[str]) -> list[str]:
    """Which of these users are not there."""
    found = []
    for name in names:
        try:
            users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(username=name)), timeout=5)
        except grpc.RpcError:
            found.append(name)
    return found
