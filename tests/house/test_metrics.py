"""docs/metrics.md lists the exported metrics with their labels, and no others."""

import re

from prometheus_client import Counter, Histogram

from service.observability.metrics import GAUGES, Metrics
from service.workers.metrics import SupervisorCollector
from service.workers.supervisor import Limits, Supervisor
from tests.house.test_docs import DOCS, rows

_SUFFIXES = {"counter": "_total", "gauge": "", "histogram": ""}


def test_every_metric_is_described_with_its_labels() -> None:
    """Under the exported name: that of a counter has a suffix."""
    described = {
        name: set(re.findall(r"\w+", labels))
        for name, labels, *_ in (row for row in rows(DOCS / "metrics.md") if row[0].startswith(("grpc_", "personae_")))
    }
    handled = described["grpc_server_handled_total"]
    handled.remove("and")
    handled |= described["grpc_server_started_total"]
    assert described == exported()


def exported() -> dict[str, set[str]]:
    """Every metric of a server and a supervisor, with its labels."""
    metrics = Metrics()
    found = {name: set(gauge.labels) for name, gauge in GAUGES.items()}
    for one in vars(metrics).values():
        if isinstance(one, Counter | Histogram):
            found[f"{one._name}{_SUFFIXES[one._type]}"] = set(one._labelnames)  # the library has no public way to ask
    supervisor = Supervisor(lambda *_: [], [None], Limits())
    for family in SupervisorCollector(supervisor).collect():
        labels = {label for sample in family.samples for label in sample.labels}
        found[f"{family.name}{_SUFFIXES[family.type]}"] = labels
    return found
