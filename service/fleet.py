"""`serve`: the ports, the plan and the supervisor of the workers, and what is served of their metrics."""

from contextlib import ExitStack
from dataclasses import replace
from tempfile import TemporaryDirectory

from sqlalchemy.engine import URL

from service.base.settings import Settings
from service.planning import make_plan
from service.ports import hold_port
from service.supervisor import Plan, Ports, Supervisor, worker_command


def keep_workers(settings: Settings, url: URL) -> int:
    """Keep workers that serve until a signal says otherwise; the exit code. Raises PortInUseError."""
    with ExitStack() as stack:
        ports = Ports(
            grpc=hold_port(settings.grpc_host, settings.grpc_port, "GRPC_PORT", stack),
            mtls=hold_port(settings.grpc_host, settings.grpc_mtls_port, "GRPC_MTLS_PORT", stack)
            if settings.client_certificates == "optional"
            else 0,
        )
        plan = make_plan(settings, url, ports)
        supervisor = _watched(plan, settings, stack) if settings.metrics_port else Supervisor(plan, worker_command)
        return supervisor.run()


def _watched(plan: Plan, settings: Settings, stack: ExitStack) -> Supervisor:
    """A supervisor that serves the metrics of its workers, which they write into files of a directory of its own."""
    from service.base.metrics import forget_slot
    from service.exposition import Exposition
    from service.worker_metrics import registry_of

    directory = stack.enter_context(TemporaryDirectory(prefix="personae-metrics-"))
    plan = replace(plan, directories={"PROMETHEUS_MULTIPROC_DIR": directory})
    supervisor = Supervisor(plan, worker_command, on_gone=lambda slot: forget_slot(directory, slot))
    exposition = Exposition(
        settings.metrics_host,
        settings.metrics_port,
        registry_of(supervisor, directory),
        is_ready=lambda: supervisor.serving > 0,
    )
    exposition.start()
    stack.callback(exposition.close)
    return supervisor
