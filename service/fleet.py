"""`serve`: the ports, the plan and the supervisor of the workers."""

from contextlib import ExitStack

from sqlalchemy.engine import URL

from service.base.settings import Settings
from service.planning import make_plan
from service.ports import hold_port
from service.supervisor import Ports, Supervisor, worker_command


def keep_workers(settings: Settings, url: URL) -> int:
    """Keep workers that serve until a signal says otherwise; the exit code. Raises PortError."""
    with ExitStack() as stack:
        ports = Ports(
            grpc=hold_port(settings.grpc_host, settings.grpc_port, "GRPC_PORT", stack),
            mtls=hold_port(settings.grpc_host, settings.grpc_mtls_port, "GRPC_MTLS_PORT", stack)
            if settings.client_certificates == "optional"
            else 0,
        )
        return Supervisor(make_plan(settings, url, ports), start_worker=worker_command).run()
