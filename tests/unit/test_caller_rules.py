"""The names, certificate identities and rate limits that a caller may have."""

import pytest

from service.core.callers.rules import CallerError, require_identity, require_name, require_rate
from service.core.token_bucket import MAX_BURST, MAX_PER_SECOND, UNLIMITED, Rate

BAD_NAMES = (
    *("", "W", "1web", "-web", "web-", "web_", "web..shop", "web--shop", "web shop", "web\n", "web\0", "wéb"),
    *("web/shop", "a" * 64, "команда", "*", "local", "anonymous", "sweeper", "command-line"),
)
GOOD_NAMES = ("a", "web", "web-2", "shop.web_v2", "a" * 63)
BAD_IDENTITIES = (
    *("", "*", "*.internal", "web.*", "Web.internal", "web.internal.", ".internal", "web..internal", "-web.internal"),
    *("web-.internal", "wéb.internal", "web internal", "web.internal\n", "https://web.internal", "web.internal:443"),
    *("a" * 64 + ".internal", ".".join(["a" * 60] * 5), "spiffe://prod.example", "spiffe://prod.example/"),
    *("spiffe://prod.example/web/", "spiffe://prod.example//web", "spiffe:///web", "spiffe://Prod.example/web"),
    *("SPIFFE://prod.example/web", "spiffe://prod.example/web?a=b", "spiffe://prod.example/web#a", "spiffe://a:1/web"),
    *("spiffe://prod.example/w*b", "spiffe://prod.example/%77eb", "spiffe://prod.example/" + "a" * 2048),
)
GOOD_IDENTITIES = (
    *("web", "web.internal", "web_1.shop-2.internal", "web.1", "10.0.0.1.internal", "a" * 63 + ".internal"),
    *("spiffe://prod.example/web", "spiffe://p/Ns/web_1.a-b", "spiffe://prod.example/" + "a" * 2000),
)


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_names(name: str) -> None:
    """Up to 63 lower-case letters, digits and separators."""
    require_name(name)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(name: str) -> None:
    """Names appear in logs and in the audit trail, where Personae has reserved some."""
    with pytest.raises(CallerError):
        require_name(name)


@pytest.mark.parametrize("identity", GOOD_IDENTITIES)
def test_identities(identity: str) -> None:
    """SPIFFE IDs with a path, whose case counts, and DNS names in lower case."""
    require_identity(identity)


@pytest.mark.parametrize("identity", BAD_IDENTITIES)
def test_bad_identities(identity: str) -> None:
    """No certificate can have them, or they are wildcards."""
    with pytest.raises(CallerError, match="identifies no certificate"):
        require_identity(identity)


ADDRESS = "Give the certificate a DNS name"
WEB = "write web.internal"


@pytest.mark.parametrize(
    "identity, advice",
    [
        *[(address, ADDRESS) for address in ("127.0.0.1", "10.0.0.1", "10.1", "2130706433", "::1", "fe80::1%eth0")],
        *[
            (address, ADDRESS)
            for address in ("[::1]:443", "127.0.0.1:443", "127.0.0.1 ", "https://127.0.0.1/x", "1.1.")
        ],
        *[(name, WEB) for name in ("Web.Internal", "web.internal.", " web.internal\t", "web.internal:443")],
        *[(name, WEB) for name in ("https://web.internal/a", "dns://web.internal", "CN=web.internal", "web. internal")],
        *[(name, "Wildcards are not allowed. Write each name") for name in ("*", "*.internal", "spiffe://td/*")],
        *[(name, "emails in certificates are not compared") for name in ("web@internal", "mailto://web@internal")],
        *[(name, "behind it comes a path") for name in ("spiffe://td", "SPIFFE://td/web", "spiffe://Td/web")],
        *[(name, "behind it comes a path") for name in ("spiffe://td/web/", "spiffe://td:1/web", "spiffe://td/a?b")],
        ("wéb.internal", "begins with xn--"),
        *[(name, "up to 63 letters") for name in ("", "-web", "web..internal", "a" * 64, "web;internal")],
    ],
)
def test_a_bad_identity_is_told_what_to_write(identity: str, advice: str) -> None:
    """The error says which name of the certificate counts."""
    with pytest.raises(CallerError, match=advice):
        require_identity(identity)


@pytest.mark.parametrize("rate", [UNLIMITED, Rate(1, 1), Rate(MAX_PER_SECOND, MAX_BURST)])
def test_rates(rate: Rate) -> None:
    require_rate(rate)


@pytest.mark.parametrize("rate", [Rate(1, 0), Rate(MAX_PER_SECOND + 1, 1), Rate(1, MAX_BURST + 1)])
def test_bad_rates(rate: Rate) -> None:
    """A rate at which nothing could be called, and rates that do not fit."""
    with pytest.raises(CallerError):
        require_rate(rate)
