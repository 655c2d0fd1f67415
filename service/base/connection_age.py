"""How long callers' connections live, and how long it takes until a retired server has none left."""

from service.base.settings import Settings

_JITTER = 1.1
"""gRPC spreads the age of connections by up to a tenth."""
_BEYOND_RPC_TIMEOUT = 5.0


def age_grace(settings: Settings) -> float:
    """Return for how many seconds RPCs may go on after their connection has reached its age: longer than any RPC may
    take.
    """
    return settings.rpc_timeout + _BEYOND_RPC_TIMEOUT


def retirement_seconds(settings: Settings) -> float:
    """Return after how many seconds the last connection of a server that accepts no new ones has closed; 0 where
    connections have no maximum age.
    """
    age = settings.grpc_max_connection_age
    return age * _JITTER + age_grace(settings) if age else 0.0
