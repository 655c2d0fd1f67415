"""Ports that a server listens on."""


class PortInUseError(Exception):
    """An address cannot be bound. The text says what to do."""
