"""Settings, keys and tokens: parsing, refusals, and nothing secret in print."""

import gc
from pathlib import Path
from typing import Any

import pytest

from service.base.gc_tuning import freeze_startup_objects
from service.base.secret_keys import load_or_create, parse_secret_keys
from service.base.settings import SettingsError, load_settings, psycopg2_url
from service.core.page_tokens import BadPageTokenError, PageTokens, Position

ONE = "a:" + "QUJD" * 11
TWO = "b:" + "REVG" * 11


class TestSecretKeys:
    def test_the_first_signs(self) -> None:
        """Order is kept; derived keys differ by purpose and by key."""
        keys = parse_secret_keys(f"{ONE}, {TWO}")

        assert list(keys.keys) == ["a", "b"]
        assert len({*keys.derive("one"), *keys.derive("two")}) == 4
        assert keys.derive("one")[0] == parse_secret_keys(ONE).derive("one")[0]

    @pytest.mark.parametrize(
        "text", ["", ",", "nocolon", "id:", "id:c2hvcnQ=", f"{ONE},{ONE}", "b\u00e4d:QUJD", ONE[2:]]
    )
    def test_refusals_show_nothing(self, text: str) -> None:
        """What is wrong is said without the secret."""
        with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is checked below
            parse_secret_keys(text)
        assert "QUJDQUJD" not in str(caught.value)

    def test_repr_shows_ids_only(self) -> None:
        """An accident in a log costs nothing."""
        assert repr(parse_secret_keys(ONE)) == "SecretKeys(a)"

    def test_a_generated_file_is_private_and_stays(self, tmp_path: Path) -> None:
        """Mode 0600, and the same keys the next time."""
        path = tmp_path / "deep" / "keys"
        first = load_or_create(path)

        assert path.stat().st_mode & 0o777 == 0o600
        assert load_or_create(path) == first
        assert [one.name for one in path.parent.iterdir()] == ["keys"]

    def test_a_file_that_others_may_have_written_is_refused(self, tmp_path: Path) -> None:
        """A planted key would let its owner forge tokens."""
        path = tmp_path / "keys"
        load_or_create(path)
        (tmp_path / "link").symlink_to(path)
        with pytest.raises(OSError, match="symbolic links"):
            load_or_create(tmp_path / "link")
        path.chmod(0o666)
        with pytest.raises(ValueError, match="0600"):
            load_or_create(path)


class TestSettings:
    def load(self, **values: Any) -> Any:
        return load_settings(_env_file=None, **values)

    @pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
    def test_the_driver_is_spelled_out(self, scheme: str) -> None:
        """A bare postgresql:// would mean another driver to SQLAlchemy."""
        assert psycopg2_url(f"{scheme}://u@h/d").drivername == "postgresql+psycopg2"

    def test_all_bad_settings_are_named_without_their_values(self) -> None:
        """An operator sees each at once; a password in a URL is not printed."""
        with pytest.raises(SettingsError) as caught:
            self.load(database_url="mysql://u:topsecret@h/d", grpc_port="x", bcrypt_cost=3)

        assert all(name in str(caught.value) for name in ("DATABASE_URL", "GRPC_PORT", "BCRYPT_COST"))
        assert "topsecret" not in str(caught.value)

    def test_no_secret_in_repr(self) -> None:
        """Settings can be printed by accident."""
        settings = self.load(database_url="postgresql://u:topsecret@127.0.0.1/d", secret_keys=ONE)

        assert "topsecret" not in repr(settings)
        assert "QUJDQUJD" not in repr(settings)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "db.example.com"])
    def test_plaintext_beyond_loopback_has_to_be_said(self, host: str) -> None:
        """Passwords do not cross a network by default."""
        with pytest.raises(SettingsError, match="INSECURE_PLAINTEXT"):
            self.load(grpc_host=host)
        assert self.load(grpc_host=host, insecure_plaintext=True).is_loopback is False

    @pytest.mark.parametrize(
        "issuer",
        [
            "https://id.example.com",
            "https://id.example.com:8443/tenants/a",
            "http://127.0.0.1:8080",
            "http://localhost",
            "http://[::1]:8080",
            f"https://{'i' * 247}",
        ],
    )
    def test_issuers(self, issuer: str) -> None:
        assert self.load(token_issuer=issuer).token_issuer == issuer

    @pytest.mark.parametrize(
        "issuer",
        [
            *("id.example.com", "ftp://id.example.com", "https://", "https:///path", "http://id.example.com"),
            *("https://id.example.com/", "https://id.example.com/a/", "https://id.example.com//a"),
            *("https://id.example.com?a=b", "https://id.example.com#a", "https://id.example.com/a?", "https://u@h"),
            *("https://u:topsecret@h", "https://h\\@evil", "https://h/a b", "https://h/\n", "https://ü.example"),
            *("https://h:port", "HTTPS://id.example.com", f"https://{'i' * 248}"),
        ],
    )
    def test_bad_issuers(self, issuer: str) -> None:
        """Verifiers compare it letter by letter, and append a path."""
        with pytest.raises(SettingsError, match="TOKEN_ISSUER: must be") as caught:
            self.load(token_issuer=issuer)
        assert "topsecret" not in str(caught.value)

    def test_the_http_port_needs_an_issuer(self) -> None:
        with pytest.raises(SettingsError, match="HTTP_PORT is set without TOKEN_ISSUER"):
            self.load(http_port=8080)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "db.example.com"])
    def test_public_keys_in_clear_text_beyond_loopback_have_to_be_said(self, host: str) -> None:
        """An attacker who replaces them on their way can forge tokens. Without HTTP_HOST the port is at GRPC_HOST."""
        http = {"http_port": 8080, "token_issuer": "https://id.example.com"}
        with pytest.raises(SettingsError, match=f"HTTP_HOST={host} .*INSECURE_PLAINTEXT=true"):
            self.load(http_host=host, **http)
        assert self.load(http_host=host, token_issuer="https://id.example.com").http_port == 0
        assert self.load(http_host=host, insecure_plaintext=True, **http).http_listen_host == host
        assert self.load(http_host=host, tls_certificate_file="c", tls_private_key_file="k", **http)
        assert self.load(grpc_host=host, insecure_plaintext=True, **http).http_listen_host == host

    @pytest.mark.parametrize("name", ["database_url", "migration_database_url"])
    @pytest.mark.parametrize(
        "url, is_local",
        [
            ("postgresql://u@127.0.0.1/d", True),
            ("postgresql://u@127.9.9.9/d?sslmode=disable", True),
            ("postgresql://u@LOCALHOST/d", True),
            ("postgresql://u@[::1]/d", True),
            ("postgresql:///d", True),
            ("postgresql:///d?host=/run/postgresql", True),
            ("postgresql://%2Frun%2Fpostgresql/d", True),
            ("postgresql://u@10.0.0.1/d", False),
            ("postgresql://u@db/d?sslmode=require", False),
            ("postgresql://u@db/d?sslmode=verify-ca", False),
            ("postgresql://u@db/d?sslmode=VERIFY-FULL", False),
            ("postgresql://u@127.0.0.1,db/d", False),
            ("postgresql://u@localhost/d?host=db", False),
            ("postgresql://u@localhost/d?hostaddr=10.0.0.1", False),
            ("postgresql:///d?host=127.0.0.1,db", False),
            ("postgresql:///d?service=prod", False),
            ("postgresql://u@[fe80::1%25eth0]/d", False),
            ("postgresql://u@[::ffff:10.0.0.1]/d", False),
        ],
    )
    def test_a_database_on_another_machine_is_verified_unless_it_is_said(
        self, name: str, url: str, is_local: bool
    ) -> None:
        """Without verify-full the driver may fall back to clear text, or trust any server."""
        if not is_local:
            with pytest.raises(SettingsError, match=f"{name.upper()} .*verify-full.*INSECURE_PLAINTEXT_DATABASE=true"):
                self.load(**{name: url})
        assert self.load(**{name: url}, insecure_plaintext_database=not is_local)
        base, _, query = url.partition("?")
        options = "" if query.startswith("sslmode") else query
        assert self.load(**{name: f"{base}?sslmode=verify-full&{options}"})

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "db.example.com"])
    def test_cheap_hashes_beyond_loopback_are_refused(self, host: str) -> None:
        """OWASP's least is 10. A server that nobody else reaches may hash for tests."""
        with pytest.raises(SettingsError, match="BCRYPT_COST=9 is for tests only"):
            self.load(grpc_host=host, insecure_plaintext=True, bcrypt_cost=9)
        assert self.load(grpc_host=host, insecure_plaintext=True, bcrypt_cost=10).bcrypt_cost == 10
        assert self.load(grpc_host="127.0.0.1", bcrypt_cost=4).bcrypt_cost == 4

    @pytest.mark.parametrize(
        "url, needed",
        [
            ("postgresql://u@127.0.0.1/d", False),
            ("postgresql://u@localhost/d", False),
            ("postgresql://u@/d?host=/run/postgresql", False),
            ("postgresql://u@db.internal/d", True),
            ("postgresql://u@/d?host=127.0.0.1,db.internal", True),
            ("postgresql://u@/d?host=127.0.0.1:1&host=db.internal:2", True),
            ("postgresql://u@localhost/d?hostaddr=10.1.2.3", True),
            ("postgresql:///d?service=prod", True),
        ],
    )
    def test_keys_are_needed_where_others_reach(self, url: str, needed: bool, tmp_path: Path) -> None:
        """Servers that share a database must share their keys; on one machine they are generated."""
        settings = self.load(database_url=url, dev_data_dir=tmp_path / "postgres", insecure_plaintext_database=True)
        if needed:
            with pytest.raises(SettingsError, match="generate-key"):
                settings.keys()
        else:
            assert settings.keys().keys
            assert (tmp_path / "postgres" / "secret_keys").exists()

    def test_keys_from_a_file(self, tmp_path: Path) -> None:
        """Docker and Kubernetes hand secrets over as files."""
        path = tmp_path / "keys"
        with pytest.raises(SettingsError, match="cannot be read"):
            self.load(secret_keys_file=path).keys()
        path.write_text(f"{ONE}\n{TWO}\n")
        assert list(self.load(secret_keys_file=path).keys().keys) == ["a", "b"]


class TestPageTokens:
    TOKENS = PageTokens((b"1" * 32,))

    @pytest.mark.parametrize("position", [Position(1_700_000_000_000_000, 5), Position("ada@example.com", 9)])
    def test_round_trip(self, position: Position) -> None:
        """What is sealed comes back, and cannot be read in between."""
        token = self.TOKENS.seal(position, binding="list")

        assert self.TOKENS.open(token, binding="list") == position
        assert "ada" not in token

    def test_foreign_edited_and_moved_tokens(self) -> None:
        """A token serves the list that it was made for, on servers with the same keys."""
        token = self.TOKENS.seal(Position(1, 1), binding="list")
        for tokens, text, binding in (
            (self.TOKENS, token, "another list"),
            (self.TOKENS, token[:-2] + "xx", "list"),
            (self.TOKENS, "", "list"),
            (self.TOKENS, "\u00fc", "list"),
            (PageTokens((b"2" * 32,)), token, "list"),
        ):
            with pytest.raises(BadPageTokenError):
                tokens.open(text, binding=binding)

    def test_rotation(self) -> None:
        """After a new key was put in front, older tokens go on to work."""
        token = self.TOKENS.seal(Position(1, 1), binding="list")

        assert PageTokens((b"2" * 32, b"1" * 32)).open(token, binding="list") == Position(1, 1)


def test_the_garbage_collector_spares_what_stays() -> None:
    """A process that serves does not go through all its modules again and again."""
    gc.unfreeze()  # what the tests have frozen themselves
    try:
        freeze_startup_objects()
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
