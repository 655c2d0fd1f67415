"""Identifying a caller by the client certificate of its connection, whose signature gRPC has verified."""

import re
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from cryptography import x509

from service.base.clock import Clock
from service.base.errors import CertificateExpiredError, CertificateUnknownError
from service.core.callers.index import KnownCaller
from service.rpc.callers.directory import CallerDirectory
from service.rpc.context import CallContext

_DNS_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")


class ClientCertificate(NamedTuple):
    """What a client certificate says about its owner."""

    identities: tuple[str, ...]
    """The SPIFFE ID, or else the DNS names in lower case without wildcards. Compared as whole strings."""
    not_after: datetime | None


def identify_by_certificate(
    certificate: ClientCertificate, call: CallContext, directory: CallerDirectory, clock: Clock
) -> KnownCaller:
    """The caller with this certificate. Raises the PersonaeError that says why it is refused."""
    if certificate.not_after is not None and clock() >= certificate.not_after:
        raise CertificateExpiredError  # the handshake may be long past
    found = directory.find(lambda index: index.owners(certificate.identities) or None, until=call.deadline)
    if found is None or len(found) != 1:  # a certificate that names two callers identifies neither
        raise CertificateUnknownError
    return found.pop()


def client_certificate(auth_context: Mapping[str, Any]) -> ClientCertificate | None:
    """The client certificate of the connection with this auth_context(); None when the client has shown none.

    The values are lists of bytes, whatever the stubs say.
    """
    pem = next(iter(auth_context.get("x509_pem_cert", ())), None)
    return None if pem is None else _parse(pem)


@lru_cache(maxsize=1024)  # parsing costs more than the rest of a refused call
def _parse(pem: bytes) -> ClientCertificate:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        uris = alternative_names(certificate, x509.UniformResourceIdentifier)
        dns_names = alternative_names(certificate, x509.DNSName)
        is_ca = _is_ca(certificate)
    except Exception:  # noqa: BLE001  valid for gRPC, but it identifies nobody
        return ClientCertificate((), None)
    if any(uri.startswith("spiffe://") for uri in uris):
        # X.509-SVID, 2 and 5.2: exactly one URI, and not the certificate of a CA.
        identities = tuple(uris) if len(uris) == 1 and not is_ca else ()
    else:
        identities = tuple(dict.fromkeys(name for name in map(str.lower, dns_names) if _DNS_NAME.fullmatch(name)))
    return ClientCertificate(identities, certificate.not_valid_after_utc)


def alternative_names(
    certificate: x509.Certificate, kind: type[x509.DNSName] | type[x509.UniformResourceIdentifier]
) -> list[str]:
    """The subject alternative names of this kind."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return found.value.get_values_for_type(kind)


def _is_ca(certificate: x509.Certificate) -> bool:
    is_ca = False
    for extension in certificate.extensions:
        match extension.value:
            case x509.BasicConstraints(ca=ca):
                is_ca |= ca
            case x509.KeyUsage(key_cert_sign=signs, crl_sign=signs_lists):
                is_ca |= signs or signs_lists
    return is_ca
