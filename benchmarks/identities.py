"""How callers come to a server: in clear text or by TLS, and as whom: as nobody, by an API key or by a certificate."""

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
    """Everything that decides how a call reaches the server, and whose it is."""

    key: str | None = field(default=None, repr=False)
    """The API key that goes along with each call."""
    ca: bytes | None = None
    """Who vouches for the server; None: in clear text."""
    certificate: tuple[bytes, bytes] | None = field(default=None, repr=False)
    """The caller's private key and certificate."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What goes along with each call."""
        return None if self.key is None else (("authorization", f"Bearer {self.key}"),)


ANONYMOUS = Identity()


@dataclass(frozen=True, slots=True)
class Certificates:
    """A CA, and what it signed for one server and for the one caller."""

    directory: Path

    @property
    def server_settings(self) -> dict[str, str]:
        """The settings of a server that shows its certificate, and asks nobody for one."""
        return {
            "TLS_CERTIFICATE_FILE": str(self.directory / SERVER_CERTIFICATE),
            "TLS_PRIVATE_KEY_FILE": str(self.directory / SERVER_KEY),
        }

    @property
    def client_ca_settings(self) -> dict[str, str]:
        """With these settings as well it lets nobody in without one."""
        return {"TLS_CLIENT_CA_FILE": str(self.directory / CA_CERTIFICATE)}

    def identity(self, *, key: str | None = None, with_client_certificate: bool = False) -> Identity:
        """By TLS, and as assumed_caller is said."""
        read = {name: (self.directory / name).read_bytes() for name in (CA_CERTIFICATE, CLIENT_KEY, CLIENT_CERTIFICATE)}
        return Identity(
            key=key,
            ca=read[CA_CERTIFICATE],
            certificate=(read[CLIENT_KEY], read[CLIENT_CERTIFICATE]) if with_client_certificate else None,
        )


def make_certificates(directory: Path) -> Certificates:
    """Make them in this directory."""
    make_dev_certificates(directory, now=utc_now())
    return Certificates(directory)


def make_caller(url: URL, directory: Path) -> str:
    """Let the caller of all measurements read users; its API key. Its certificate is the one of make_certificates.

    Raises MeasurementError.
    """
    return run_verb(url, directory, "callers", "create", _CALLER, "--scope", _SCOPE, "--identity", CLIENT_ID).strip()
