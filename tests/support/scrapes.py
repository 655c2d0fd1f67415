"""Reading metrics as Prometheus does."""

import http.client
import socket
from collections.abc import Callable, Mapping
from contextlib import closing
from email.message import Message

from prometheus_client.parser import text_string_to_metric_families

from tests.support.waiting import eventually

Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def free_port() -> int:
    """A port on which nobody listens just now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


Answer = tuple[int, Message, bytes]
"""Status, headers and body."""


def request(port: int, path: str, *, method: str, headers: Mapping[str, str] | None = None) -> Answer:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
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


def wait_until(port: int, is_so: Callable[[Series], bool]) -> Series:
    """The metrics once this is so; gauges are set every two seconds."""
    return eventually(lambda: found if is_so(found := scrape(port)) else None, f"metrics on port {port}")


def value(series: Series, name: str, **labels: str) -> float:
    """The sum of the series that have these labels, whatever others they have; 0 if there are none."""
    wanted = set(labels.items())
    return sum(found for (one, has), found in series.items() if one == name and wanted <= has)
