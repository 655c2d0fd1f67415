"""The executor of RPCs: which calls it has gRPC asked for, when threads are busy."""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any

import pytest

from service.base.errors import ServerBusyError
from service.rpc.admission.executor import BoundedExecutor, require_room

PATIENCE = 20


class Calls:
    """gRPC with twenty calls of one method: hands over one each time it is asked, on a thread of its own."""

    def __init__(self, executor: BoundedExecutor) -> None:
        self.executor = executor
        self.go_on = Event()
        self.asked = 0
        self.begun, self.refused = Semaphore(0), Semaphore(0)
        self.answers: list[str] = []
        self.asks = SimpleQueue[None]()
        self.thread = Thread(target=self.hand_over, daemon=True)

    def come(self) -> None:
        self.thread.start()

    def hand_over(self) -> None:
        for _ in range(20):
            self.executor.ask(lambda: self.asks.put(None))
            self.asks.get()
            self.asked += 1
            self.executor.submit(self.serve)

    def serve(self) -> None:
        try:
            require_room()
        except ServerBusyError:
            self.answers.append("refused")
            self.refused.release()
        else:
            self.begun.release()
            self.go_on.wait(PATIENCE)
            self.answers.append("served")


@contextmanager
def executor(**options: Any) -> Iterator[BoundedExecutor]:
    made = BoundedExecutor(2, name="test", refusal=ServerBusyError, **options)
    yield made
    assert made.end(patience=PATIENCE)


def test_nobody_is_refused_while_there_is_room() -> None:
    """Not even for a moment: two run, the others wait."""
    with executor(max_waiting=30) as narrow:
        calls = Calls(narrow)
        calls.come()
        calls.go_on.set()
        for _ in range(20):
            assert calls.begun.acquire(timeout=PATIENCE)

    assert calls.answers == ["served"] * 20


def test_whoever_is_too_many_is_refused_one_after_the_other() -> None:
    """While nobody is served, each refusal asks for the next one; none is left behind."""
    with executor(max_waiting=3) as narrow:
        calls = Calls(narrow)
        calls.come()
        for _ in range(14):
            assert calls.refused.acquire(timeout=PATIENCE)
        calls.go_on.set()
        for _ in range(6):
            assert calls.begun.acquire(timeout=PATIENCE)

    assert sorted(calls.answers) == ["refused"] * 14 + ["served"] * 6


@pytest.fixture
def _long_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one refusal there is no other."""
    monkeypatch.setattr("service.rpc.admission.executor._REST", 1e9)
    monkeypatch.setattr("service.rpc.admission.executor._LONGEST_REST", PATIENCE)


@pytest.mark.usefixtures("_long_rests")
def test_those_who_are_held_back_are_asked_for_when_there_is_room() -> None:
    """Also while the thread that refuses rests."""
    with executor(max_waiting=3) as narrow:
        calls = Calls(narrow)
        calls.come()
        assert calls.refused.acquire(timeout=PATIENCE)
        assert calls.asked <= 8
        calls.go_on.set()
        for _ in range(19):
            assert calls.begun.acquire(timeout=PATIENCE)

    assert sorted(calls.answers) == ["refused"] + ["served"] * 19


@pytest.mark.usefixtures("_long_rests")
def test_the_end_asks_for_all_and_refuses_them() -> None:
    """Whatever runs, and however long it takes."""
    with executor(max_waiting=3) as narrow:
        calls = Calls(narrow)
        calls.come()
        assert calls.refused.acquire(timeout=PATIENCE)
        narrow.refuse_all()
        for _ in range(13):
            assert calls.refused.acquire(timeout=PATIENCE)
        calls.go_on.set()
        for _ in range(6):
            assert calls.begun.acquire(timeout=PATIENCE)

    assert calls.asked == 20
