"""The page about metrics names what is exported, with its labels, and nothing else."""

import re

from service.observability.metrics import READINGS, Metrics
from service.workers.metrics import OfSupervisor
from service.workers.supervisor import Limits, Supervisor
from tests.house.test_docs import DOCS, rows

_SUFFIXES = {"counter": "_total", "gauge": "", "histogram": ""}


def test_every_metric_is_described_with_its_labels() -> None:
    """As an operator reads it, with the suffix of a counter."""
    described = {
        name: set(re.findall(r"\w+", labels))
        for name, labels, *_ in (row for row in rows(DOCS / "metrics.md") if row[0].startswith(("grpc_", "personae_")))
    }
    handled = described["grpc_server_handled_total"]
    handled.remove("and")
    handled |= described["grpc_server_started_total"]
    assert described == exported()


def exported() -> dict[str, set[str]]:
    """What a server exports that has everything there is to be read."""
    metrics = Metrics()
    found = {name: set(reading.labels) for name, reading in READINGS.items()}
    for one in list(metrics.registry._collector_to_names):
        found[f"{one._name}{_SUFFIXES[one._type]}"] = set(one._labelnames)  # type: ignore[attr-defined]  # of the library's own
    supervisor = Supervisor(lambda *_: [], [None], Limits(stop=0))
    for family in OfSupervisor(supervisor).collect():
        labels = {label for sample in family.samples for label in sample.labels}
        found[f"{family.name}{_SUFFIXES[family.type]}"] = labels
    return found
