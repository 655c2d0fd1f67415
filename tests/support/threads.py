"""Runs calls on many threads at once, and counts their outcomes."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc

from tests.support.errors import failure_of
from tests.support.waiting import PATIENCE

T = TypeVar("T")


def at_once(count: int, call: Callable[[int], T]) -> list[T | grpc.RpcError]:
    """Run call(0) … call(count - 1) on as many threads, released together. Returns results and RpcErrors in order."""
    barrier = threading.Barrier(count, timeout=PATIENCE)

    def run(index: int) -> T | grpc.RpcError:
        barrier.wait()
        try:
            return call(index)
        except grpc.RpcError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def outcomes(results: Iterable[object]) -> Counter[str]:
    """The number of results by reason; successes count as OK."""
    return Counter(failure_of(one).reason if isinstance(one, grpc.RpcError) else "OK" for one in results)
