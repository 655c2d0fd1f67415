"""Database URLs with one host, or with several of which one is the primary.

Several hosts can be spelled in three ways: libpq's `//user@h1:5432,h2:5433/db`, its `?host=h1,h2&port=5432,5433`, and
SQLAlchemy's `?host=h1:5432&host=h2:5433`. All are turned into the second, which both libraries read.
"""

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import unquote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

DEFAULT_PORT = "5432"
# Up to the first @ it is user and password, as SQLAlchemy has it: a password may hold commas and slashes.
_AUTHORITY = re.compile(r"(?P<scheme>[\w+]+://)(?>(?P<user>[^@]*@)?)(?P<hosts>[^/?]*,[^/?]*)(?P<rest>.*)", re.DOTALL)
_HOST = re.compile(r"(\[[^\]]+\]|[^:]+)(?::(\d*))?")


def parse_url(text: str) -> URL:
    """Parse a URL, with several hosts in one spelling. Of several hosts the writable one is used, unless the URL itself
    says which (`target_session_attrs`).

    Raises ValueError; its text shows nothing of the URL.
    """
    hosts: list[str] = []
    found = _AUTHORITY.fullmatch(text)
    if found is not None:
        hosts = found["hosts"].split(",")
        text = f"{found['scheme']}{found['user'] or ''}{found['rest']}"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("not a database URL; expected postgresql://user:password@host:port/database") from None
    repeated = url.query.get("host")
    if isinstance(repeated, tuple):
        hosts += repeated
    if hosts:
        url = url.set(query={**url.query, **_one_spelling(hosts)})
    names, port = url.query.get("host"), url.query.get("port")
    if isinstance(names, str) and isinstance(port, str) and "," not in port:  # libpq uses one port for all hosts
        url = url.update_query_dict({"port": ",".join([port] * (names.count(",") + 1))})
    if len(hosts_of(url)) > 1 and "target_session_attrs" not in url.query:
        url = url.update_query_dict({"target_session_attrs": "read-write"})
    return url


def hosts_of(url: URL) -> list[str]:
    """All hosts in the URL, without ports."""
    named = [url.host] if url.host else []
    for name in ("host", "hostaddr"):
        value = url.query.get(name, ())
        for one in (value,) if isinstance(value, str) else value:
            named += [host.rsplit(":", 1)[0] if host.count(":") == 1 else host for host in one.split(",")]
    return named


def is_local_host(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost" or host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_local_database(url: URL) -> bool:
    """Whether every server that the URL names is on this machine."""
    if "service" in url.query:  # the host is in a service file
        return False
    return all(is_local_host(host) for host in hosts_of(url))


def described(url: URL) -> str:
    """The hosts and ports of the database, for people."""
    hosts, ports = url.query.get("host") or url.host or "the local socket", url.query.get("port") or url.port
    names = hosts.split(",") if isinstance(hosts, str) else list(hosts)
    if len(names) == 1:
        return f"{names[0]}, port {ports or DEFAULT_PORT}"
    numbers = str(ports or DEFAULT_PORT).split(",")
    numbers *= len(names) if len(numbers) == 1 else 1
    return " and ".join(f"{name}:{number}" for name, number in zip(names, numbers, strict=True))


def _one_spelling(hosts: Iterable[str]) -> dict[str, str]:
    parts = [_HOST.fullmatch(unquote(host)) for host in hosts]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        raise ValueError("not a database URL; expected postgresql://user:password@host1:port1,host2:port2/database")
    return {
        "host": ",".join(part[1].strip("[]") for part in known),
        "port": ",".join(part[2] or DEFAULT_PORT for part in known),
    }
