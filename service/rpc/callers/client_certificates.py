"""What clients show: the names in a client certificate, read once for each certificate and not for each call."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Lock
from typing import Any

from cryptography import x509

MAX_KNOWN_PEERS = 1024
_DNS_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """What the certificate of a client says; that the client CA has signed it, gRPC has verified."""

    names: tuple[str, ...]
    """By which the client can be known: its SPIFFE id, or else its DNS names in lower case. Compared as a whole."""
    not_before: datetime
    not_after: datetime
    is_ambiguous: bool
    """Whether it has no name because there is more than one URI beside a SPIFFE id."""


_UNREADABLE = PeerCertificate(
    (), datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), is_ambiguous=False
)


class PeerCertificates:
    """Reads the certificates of clients, each once: parsing takes longer than all else that a stranger costs."""

    def __init__(self, *, max_known: int = MAX_KNOWN_PEERS) -> None:
        self._max_known = max_known
        self._known: dict[bytes, PeerCertificate] = {}
        self._lock = Lock()

    def of(self, auth_context: Mapping[str, Any]) -> PeerCertificate | None:
        """The certificate of the connection with this auth_context(); None when the client has shown none.

        Its values are lists of bytes, whatever the stubs say.
        """
        pem = next(iter(auth_context.get("x509_pem_cert", ())), None)
        if pem is None:
            return None
        known = self._known.get(pem)
        return self._learn(pem) if known is None else known

    def _learn(self, pem: bytes) -> PeerCertificate:
        found = _peer(pem)
        with self._lock:
            while len(self._known) >= self._max_known and pem not in self._known:
                del self._known[next(iter(self._known))]  # the oldest
            return self._known.setdefault(pem, found)


def _peer(pem: bytes) -> PeerCertificate:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        uris = alternative_names(certificate, x509.UniformResourceIdentifier)
        dns_names = alternative_names(certificate, x509.DNSName)
        may_sign = _may_sign(certificate)
    except Exception:  # noqa: BLE001  it is valid to gRPC, but nobody's who could be known
        return _UNREADABLE
    is_spiffe = any(uri.startswith("spiffe://") for uri in uris)
    if is_spiffe:  # X.509-SVID, 2 and 5.2: one URI, and not the certificate of a CA
        names = tuple(uris) if len(uris) == 1 and not may_sign else ()
    else:
        names = tuple(dict.fromkeys(name for name in map(str.lower, dns_names) if _DNS_NAME.fullmatch(name)))
    return PeerCertificate(
        names,
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        is_ambiguous=is_spiffe and len(uris) > 1,
    )


def alternative_names(
    certificate: x509.Certificate, kind: type[x509.DNSName] | type[x509.UniformResourceIdentifier]
) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return found.value.get_values_for_type(kind)


def _may_sign(certificate: x509.Certificate) -> bool:
    """Whether it is the certificate of a CA."""
    is_ca = False
    for extension in certificate.extensions:
        match extension.value:
            case x509.BasicConstraints(ca=ca):
                is_ca |= ca
            case x509.KeyUsage(key_cert_sign=signs, crl_sign=signs_lists):
                is_ca |= signs or signs_lists
    return is_ca
