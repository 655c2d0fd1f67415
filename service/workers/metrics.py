"""The metrics of all workers, and those that only their supervisor knows. Loaded only where metrics are wanted."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from service.observability.metrics import all_workers
from service.workers.supervisor import Supervisor


def registry_of(supervisor: Supervisor, directory: str) -> CollectorRegistry:
    """The metrics of the supervisor, and of the workers that keep theirs in this directory."""
    registry = all_workers(directory)
    registry.register(SupervisorCollector(supervisor))
    return registry


class SupervisorCollector(Collector):
    """Collects what the supervisor knows of its workers."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("personae_workers", "Workers that serve", self._supervisor.serving)
        yield GaugeMetricFamily("personae_workers_wanted", "Workers that there should be", self._supervisor.wanted)
        restarts = CounterMetricFamily("personae_worker_restarts", "Workers that were replaced", labels=["cause"])
        for cause, count in self._supervisor.restarts.items():
            restarts.add_metric([cause], count)
        yield restarts
