"""The settings of passkeys and apps: what a browser or an app would refuse is refused at the start."""

import pytest

from service.base.settings import Settings, SettingsError, load_settings


def loaded(**changes: str) -> Settings:
    return load_settings(_env_file=None, **changes)


def test_origins_are_those_of_the_domain() -> None:
    """Separated by commas; below the domain; http for this machine alone."""
    assert loaded().webauthn_rp_id is None
    assert loaded(webauthn_rp_id="example.com").webauthn_origins is None
    origins = loaded(
        webauthn_rp_id="example.com", webauthn_origins="https://example.com, https://id.example.com:8443"
    ).webauthn_origins
    assert origins == ("https://example.com", "https://id.example.com:8443")
    assert loaded(webauthn_rp_id="localhost", webauthn_origins="http://localhost:8000").webauthn_origins


@pytest.mark.parametrize(
    "domain, origins",
    [
        ("Example.com", None),
        ("https://example.com", None),
        ("example.com:443", None),
        ("example.com", "https://example.org"),
        ("example.com", "https://badexample.com"),
        ("example.com", "https://example.com/"),
        ("example.com", "http://example.com"),
        ("example.com", "example.com"),
        (None, "https://example.com"),
    ],
)
def test_other_origins_are_refused(domain: str | None, origins: str | None) -> None:
    given = {"webauthn_rp_id": domain, "webauthn_origins": origins}
    with pytest.raises(SettingsError, match="WEBAUTHN_"):
        loaded(**{name: value for name, value in given.items() if value is not None})


@pytest.mark.parametrize("issuer", ["", "a:b", "a\nb", "x" * 65])
def test_an_issuer_that_apps_misread_is_refused(issuer: str) -> None:
    """A colon separates it from the account in the URI."""
    with pytest.raises(SettingsError, match="TOTP_ISSUER"):
        loaded(totp_issuer=issuer)
