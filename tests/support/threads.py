"""Many threads that start at the same moment."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc

T = TypeVar("T")


def at_once(count: int, call: Callable[[int], T]) -> list[T | grpc.RpcError]:
    """Run call(0) … call(count - 1) on as many threads, let go together; results and RpcErrors in order."""
    barrier = threading.Barrier(count)

    def run(index: int) -> T | grpc.RpcError:
        barrier.wait()
        try:
            return call(index)
        except grpc.RpcError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
