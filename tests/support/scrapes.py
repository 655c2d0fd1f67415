"""Reads metrics as Prometheus does, and reserves ports for servers that cannot choose one themselves."""

import http.client
import socket
from collections.abc import Callable, Mapping
from contextlib import closing
from email.message import Message

from prometheus_client.parser import text_string_to_metric_families

from tests.support.waiting import PATIENCE, eventually

Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]
_reserved: list[socket.socket] = []


def free_port() -> int:
    """Reserve a port of 127.0.0.1 until this process ends. Nothing listens on it yet.

    A socket stays bound to it that never listens. So the kernel gives the port to no other process that asks for a free
    one, nor to an outgoing connection; a server that sets SO_REUSEADDR or SO_REUSEPORT, as all do, can still bind it.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("127.0.0.1", 0))
    _reserved.append(reserved)
    return int(reserved.getsockname()[1])


Answer = tuple[int, Message, bytes]
"""Status, headers and body."""


def request(port: int, path: str, *, method: str, headers: Mapping[str, str] | None = None) -> Answer:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def get(port: int, path: str = "/metrics", **headers: str) -> Answer:
    return request(port, path, method="GET", headers=headers)


def parsed(text: str) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(port: int) -> Series:
    status, _, body = get(port)
    assert status == 200
    return parsed(body.decode())


def wait_until(port: int, condition: Callable[[Series], bool]) -> Series:
    """Wait until the metrics meet a condition, and return them. Gauges are set every two seconds."""
    return eventually(lambda: found if condition(found := scrape(port)) else None, f"metrics on port {port}")


def value(series: Series, name: str, **labels: str) -> float:
    """The sum of the series that have at least these labels; 0 if there are none."""
    wanted = set(labels.items())
    return sum(found for (one, has), found in series.items() if one == name and wanted <= has)
