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
    *("web", "web.internal", "web_1.shop-2.internal", "10.0.0.1", "a" * 63 + ".internal"),
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
    with pytest.raises(CallerError):
        require_identity(identity)


@pytest.mark.parametrize("rate", [UNLIMITED, Rate(1, 1), Rate(MAX_PER_SECOND, MAX_BURST)])
def test_rates(rate: Rate) -> None:
    require_rate(rate)


@pytest.mark.parametrize("rate", [Rate(1, 0), Rate(MAX_PER_SECOND + 1, 1), Rate(1, MAX_BURST + 1)])
def test_bad_rates(rate: Rate) -> None:
    """A rate at which nothing could be called, and rates that do not fit."""
    with pytest.raises(CallerError):
        require_rate(rate)
