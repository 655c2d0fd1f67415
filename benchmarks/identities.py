"""Identities of clients: anonymous, API key or client certificate, with or without TLS."""

from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.engine import URL

from benchmarks.processes import run_verb
from service.base.clock import utc_now
from service.dev.certificates import (
    CA_CERTIFICATE,
    CLIENT_CERTIFICATE,
    CLIENT_ID,
    CLIENT_KEY,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    make_dev_certificates,
)

_CALLER = "bench"
_SCOPE = "users.read"


@dataclass(frozen=True, slots=True)
class Identity:
    """The transport and the credentials of a client."""

    key: str | None = field(default=None, repr=False)
    """The API key sent with each call."""
    ca: bytes | None = None
    """The CA of the server's certificate; None: no TLS."""
    certificate: tuple[bytes, bytes] | None = field(default=None, repr=False)
    """Private key and client certificate."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """The metadata of each call."""
        return None if self.key is None else (("authorization", f"Bearer {self.key}"),)


ANONYMOUS = Identity()


@dataclass(frozen=True, slots=True)
class Certificates:
    """A CA, a server certificate and a client certificate."""

    directory: Path

    @property
    def server_settings(self) -> dict[str, str]:
        """Settings of a server with TLS, without client certificates."""
        return {
            "TLS_CERTIFICATE_FILE": str(self.directory / SERVER_CERTIFICATE),
            "TLS_PRIVATE_KEY_FILE": str(self.directory / SERVER_KEY),
        }

    @property
    def client_ca_settings(self) -> dict[str, str]:
        """Settings that require a client certificate, in addition to server_settings."""
        return {"TLS_CLIENT_CA_FILE": str(self.directory / CA_CERTIFICATE)}

    def identity(self, *, key: str | None = None, with_client_certificate: bool = False) -> Identity:
        """An identity over TLS, with or without API key and client certificate."""
        read = {name: (self.directory / name).read_bytes() for name in (CA_CERTIFICATE, CLIENT_KEY, CLIENT_CERTIFICATE)}
        return Identity(
            key=key,
            ca=read[CA_CERTIFICATE],
            certificate=(read[CLIENT_KEY], read[CLIENT_CERTIFICATE]) if with_client_certificate else None,
        )


def make_certificates(directory: Path) -> Certificates:
    """Create the certificates in this directory."""
    make_dev_certificates(directory, now=utc_now())
    return Certificates(directory)


def make_caller(url: URL, directory: Path) -> str:
    """Create a caller with the scope users.read and return its API key.

    Its identity is that of the certificate of make_certificates. Raises MeasurementError.
    """
    return run_verb(url, directory, "callers", "create", _CALLER, "--scope", _SCOPE, "--identity", CLIENT_ID).strip()
