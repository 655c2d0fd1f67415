"""Reading metrics as Prometheus does."""

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message

from prometheus_client.parser import text_string_to_metric_families

Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def free_port() -> int:
    """A port on which nobody listens just now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def get(port: int, path: str = "/metrics", **headers: str) -> tuple[int, Message, bytes]:
    """Status, headers and body of an answer."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def parsed(text: str) -> Series:
    """Every series with its value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(port: int) -> Series:
    """What is served there now."""
    status, _, body = get(port)
    assert status == 200
    return parsed(body.decode())


def wait_until(port: int, is_so: Callable[[Series], bool]) -> Series:
    """What is served there once this is so: workers write down what they count some time later."""
    pause = threading.Event()
    found = scrape(port)
    for _ in range(1000):
        if is_so(found):
            return found
        pause.wait(0.02)
        found = scrape(port)
    raise AssertionError(found)


def value(series: Series, name: str, **labels: str) -> float:
    """The sum of what has these labels, whatever others it has; 0 where there is nothing."""
    wanted = set(labels.items())
    return sum(found for (one, has), found in series.items() if one == name and wanted <= has)
