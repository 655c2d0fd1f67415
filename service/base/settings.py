"""The service's configuration: parsed once from the environment and `.env`, frozen, passed on value by value.

Every field here is described in docs/settings.md; tests/house/test_docs.py compares the two.
"""

import io
import ipaddress
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from dotenv.parser import parse_stream
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict
from sqlalchemy.engine import URL

from service.base.database_url import connect_timeout_of, is_local_database, is_local_host, overriding, parse_url
from service.base.factor_settings import FactorSettings
from service.base.secret_keys import SecretKeys, load_or_create, parse_secret_keys
from service.base.text import is_utf8, read_text

Seconds = Annotated[float, Field(allow_inf_nan=False)]
_DAY = 86_400
_HOST = re.compile(r"(?!-)[\w-]{1,63}(\.[\w-]{1,63})*\.?", re.ASCII)
_MAX_HOST_LENGTH = 253
_ISSUER = re.compile(
    r"(?P<scheme>https?)://(?P<host>[\w.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?(/[\w.~!$&'()*+,;=:@%-]+)*", re.ASCII
)
_MAX_ISSUER_LENGTH = 255
_ENV_FILE = ".env"
OPERATOR_MAX_LENGTH = 64
SAFE_BCRYPT_COST = 10
"""The least that OWASP's Password Storage Cheat Sheet asks for. Less is for tests, on this machine only."""


class SettingsError(Exception):
    """The configuration cannot be used. The text names each bad setting and is safe to print."""


class Settings(FactorSettings):
    model_config = SettingsConfigDict(
        env_file=_ENV_FILE,
        env_file_encoding="utf-8-sig",
        env_ignore_empty=True,
        extra="ignore",  # .env also holds what docker compose reads
        frozen=True,
        hide_input_in_errors=True,  # a bad DATABASE_URL must not be printed with its password
    )

    # ---- database
    database_url: SecretStr | None = None
    db_echo: bool = False
    db_pool_size: Annotated[int, Field(ge=1, le=1000)] = 5
    db_max_overflow: Annotated[int, Field(ge=0, le=1000)] = 10
    db_pool_recycle: Annotated[int, Field(ge=-1)] = 3600
    db_pool_pre_ping: bool = True
    db_pool_ping_idle: Annotated[Seconds, Field(ge=0, le=_DAY)] = 5
    db_pool_timeout: Annotated[Seconds, Field(gt=0, le=60)] = 3
    db_connect_timeout: Annotated[int, Field(ge=2, le=60)] = 2

    # ---- server
    grpc_host: str = "127.0.0.1"
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 50051
    grpc_workers: Annotated[int, Field(ge=0, le=1000)] = 0
    grpc_pin_workers: bool = True
    grpc_max_connection_age: Annotated[Seconds, Field(ge=0, le=86_400)] = 60
    grpc_threads: Annotated[int, Field(ge=1, le=1000)] = 5
    grpc_max_waiting: Annotated[int, Field(ge=0, le=100_000)] = 512
    grpc_max_connections: Annotated[int, Field(ge=2, le=1_000_000)] = 4096
    hash_threads: Annotated[int, Field(ge=0, le=1000)] = 0
    hash_max_waiting: Annotated[int, Field(ge=0, le=1000)] = 32
    grpc_reflection: bool = False
    insecure_plaintext: bool = False
    insecure_plaintext_keys: bool = False
    insecure_plaintext_database: bool = False
    insecure_one_role: bool = False
    tls_certificate_file: Path | None = None
    tls_private_key_file: Path | None = None
    tls_client_ca_file: Path | None = None
    tls_client_certificates: Literal["required", "optional", "off"] | None = None
    grpc_mtls_port: Annotated[int, Field(ge=0, le=65535)] = 50052
    rpc_timeout: Annotated[Seconds, Field(gt=0, le=3600)] = 30
    shutdown_drain: Annotated[Seconds, Field(ge=0, le=3600)] = 5
    shutdown_grace: Annotated[Seconds, Field(ge=0, le=3600)] = 10
    health_probe_interval: Annotated[Seconds, Field(gt=0, le=60)] = 0.5

    # ---- http
    http_host: str | None = None
    http_port: Annotated[int, Field(ge=0, le=65535)] = 0
    token_issuer: str | None = None

    # ---- observability
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    otel_exporter_otlp_endpoint: str | None = None
    otel_exporter_otlp_traces_endpoint: str | None = None

    # ---- callers
    caller_auth: Literal["required", "off"] = "required"
    caller_cache_seconds: Annotated[Seconds, Field(ge=0.1, le=60)] = 5
    caller_rate_limit: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    caller_rate_burst: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    caller_code_rate_limit: Annotated[int, Field(ge=0, le=1_000_000)] = 10
    caller_code_rate_burst: Annotated[int | None, Field(ge=1, le=1_000_000)] = 100
    audit_retention_days: Annotated[int, Field(ge=91, le=36_500)] = 400

    # ---- domain
    secret_keys: Annotated[SecretKeys | None, NoDecode] = None
    secret_keys_file: Path | None = None
    bcrypt_cost: Annotated[int, Field(ge=4, le=16)] = 12
    password_min_length: Annotated[int, Field(ge=8, le=256)] = 15
    password_blocklist_file: Path | None = None
    password_reset_valid: Annotated[Seconds, Field(ge=60, le=3600)] = 600
    email_verification_valid: Annotated[Seconds, Field(ge=60, le=86_400)] = 86_400
    email_allow_special_domains: bool = False
    access_token_seconds: Annotated[int, Field(ge=60, le=3600)] = 300
    session_idle_seconds: Annotated[int, Field(ge=60, le=90 * _DAY)] = 7 * _DAY
    session_lifetime_seconds: Annotated[int, Field(ge=60, le=365 * _DAY)] = 30 * _DAY
    refresh_grace_seconds: Annotated[int, Field(ge=0, le=300)] = 30
    signing_key_days: Annotated[int, Field(ge=1, le=365)] = 30
    purge_after_days: Annotated[int, Field(ge=1, le=3650)] = 30
    purge_interval: Annotated[Seconds, Field(ge=0, le=_DAY)] = 600

    # ---- commands
    operator: str | None = None

    # ---- logging
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"

    # ---- migrations
    migration_database_url: SecretStr | None = None
    migration_wait: Annotated[Seconds, Field(gt=0, le=_DAY)] = 60
    migration_lock_timeout: Annotated[Seconds, Field(ge=0.001, le=_DAY)] = 5
    migration_statement_timeout: Annotated[Seconds, Field(ge=0.001, le=7 * _DAY)] = 300

    # ---- a developer's machine
    dev_data_dir: Path = Path(".dev/postgres")
    pg_bindir: Path | None = None

    @field_validator("log_level", "log_format", "caller_auth", "tls_client_certificates", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("grpc_host", "metrics_host", "http_host")
    @classmethod
    def _a_host(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            ipaddress.ip_address(value.strip("[]"))
        except ValueError:
            if len(value) > _MAX_HOST_LENGTH or _HOST.fullmatch(value) is None:
                raise ValueError("is no IP address and no host name; the port has a setting of its own") from None
        return value

    @field_validator("token_issuer")
    @classmethod
    def _an_issuer(cls, value: str | None) -> str | None:
        """Verifiers compare the text, and append a path to it (OpenID Connect Discovery, section 4.1)."""
        if value is None:
            return None
        if len(value) > _MAX_ISSUER_LENGTH or (found := _ISSUER.fullmatch(value)) is None:
            raise ValueError(
                f"must be a URL like https://id.example.com of at most {_MAX_ISSUER_LENGTH} characters, without user, "
                "query, fragment and a slash at its end"
            )
        if found["scheme"] == "http" and not is_local_host(found["host"]):
            raise ValueError("must be https: an attacker who changes the public keys on their way can forge tokens")
        return value

    @field_validator("operator")
    @classmethod
    def _a_name_for_the_trail(cls, value: str | None) -> str | None:
        if value is not None and not (value.isprintable() and len(value) <= OPERATOR_MAX_LENGTH):
            raise ValueError(f"must be at most {OPERATOR_MAX_LENGTH} printable characters")
        return value

    @field_validator("database_url", "migration_database_url")
    @classmethod
    def _a_postgresql_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            elsewhere = overriding(psycopg2_url(value.get_secret_value()), os.environ)  # noqa: TID251  libpq's own
            if elsewhere:
                raise ValueError(
                    f"{' and '.join(elsewhere)} in the environment would lead elsewhere: unset it, and say in the URL "
                    "where the database is"
                )
        return value

    @field_validator("secret_keys", mode="before")
    @classmethod
    def _parsed_keys(cls, value: object) -> object:
        return parse_secret_keys(value) if isinstance(value, str) else value

    @field_validator("*", mode="before")  # the last of its mode runs first
    @classmethod
    def _utf8(cls, value: object) -> object:
        """Text without the blanks around it, which `docker run --env-file` keeps."""
        if not isinstance(value, str):
            return value
        if not is_utf8(value):
            raise ValueError("is not UTF-8")
        return value.strip()

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "Settings":
        if (self.tls_certificate_file is None) != (self.tls_private_key_file is None):
            raise ValueError("TLS_CERTIFICATE_FILE and TLS_PRIVATE_KEY_FILE are set together, or neither is")
        if self.tls_client_ca_file is not None and not self.has_tls:
            raise ValueError("TLS_CLIENT_CA_FILE is of no use without TLS_CERTIFICATE_FILE and TLS_PRIVATE_KEY_FILE")
        if self.client_certificates != "off" and self.tls_client_ca_file is None:
            raise ValueError(
                f"TLS_CLIENT_CERTIFICATES={self.client_certificates} needs TLS_CLIENT_CA_FILE, the CA that signs the "
                "certificates of callers"
            )
        if self.tls_client_ca_file is not None and self.client_certificates == "off":
            raise ValueError("TLS_CLIENT_CA_FILE is set, but TLS_CLIENT_CERTIFICATES=off shows none")
        if self.client_certificates == "optional" and self.grpc_port == self.grpc_mtls_port != 0:
            raise ValueError(
                f"GRPC_PORT and GRPC_MTLS_PORT are both {self.grpc_port}: TLS_CLIENT_CERTIFICATES=optional needs two"
            )
        return self

    @model_validator(mode="after")
    def _plaintext_stays_on_this_machine(self) -> "Settings":
        if not self.is_loopback and not self.has_tls and not self.insecure_plaintext:
            raise ValueError(
                f"GRPC_HOST={self.grpc_host} is reached from other machines, and the server has no certificate: "
                "passwords would cross the network in clear text. Set TLS_CERTIFICATE_FILE and TLS_PRIVATE_KEY_FILE, "
                "or bind 127.0.0.1, or put a TLS proxy or mesh in front and say INSECURE_PLAINTEXT=true"
            )
        return self

    @model_validator(mode="after")
    def _http_has_an_issuer_and_is_safe(self) -> "Settings":
        if not self.http_port:
            return self
        if self.token_issuer is None:
            raise ValueError(
                "HTTP_PORT is set without TOKEN_ISSUER: the port says who issues tokens, by that URL. On a developer's "
                f"machine: TOKEN_ISSUER=http://127.0.0.1:{self.http_port}"
            )
        if not is_local_host(self.http_listen_host) and not self.has_tls and not self.insecure_plaintext:
            raise ValueError(
                f"HTTP_HOST={self.http_listen_host} is reached from other machines, and the server has no certificate: "
                "an attacker who changes the public keys on their way can forge tokens. Set TLS_CERTIFICATE_FILE and "
                "TLS_PRIVATE_KEY_FILE, or bind 127.0.0.1, or put a TLS proxy in front and say INSECURE_PLAINTEXT=true"
            )
        return self

    @model_validator(mode="after")
    def _databases_are_reached_by_tls(self) -> "Settings":
        for name, url in (("DATABASE_URL", self.url), ("MIGRATION_DATABASE_URL", self.migration_url)):
            if url is None or is_local_database(url) or url.query.get("sslmode") == "verify-full":
                continue
            if not self.insecure_plaintext_database:
                raise ValueError(
                    f"{name} leads to another machine without sslmode=verify-full: emails and password hashes could "
                    "cross the network in clear text, or go to a server that is not yours. Add ?sslmode=verify-full"
                    "&sslrootcert=FILE, the CA that signs the database's certificate, or, where the network itself "
                    "protects the connection, say INSECURE_PLAINTEXT_DATABASE=true"
                )
        return self

    @model_validator(mode="after")
    def _cheap_hashes_stay_on_this_machine(self) -> "Settings":
        if not self.is_loopback and self.bcrypt_cost < SAFE_BCRYPT_COST:
            raise ValueError(
                f"BCRYPT_COST={self.bcrypt_cost} is for tests only, and GRPC_HOST={self.grpc_host} is reached from "
                f"other machines. Set {SAFE_BCRYPT_COST} or more; `python -m service calibrate` proposes a value"
            )
        return self

    @property
    def has_tls(self) -> bool:
        return self.tls_certificate_file is not None and self.tls_private_key_file is not None

    @property
    def client_certificates(self) -> Literal["required", "optional", "off"]:
        """Whether clients show certificates. A client CA without TLS_CLIENT_CERTIFICATES means that they must."""
        if self.tls_client_certificates is None:
            return "off" if self.tls_client_ca_file is None else "required"
        return self.tls_client_certificates

    @cached_property
    def is_loopback(self) -> bool:
        """Whether the server can be reached from this machine only."""
        return is_local_host(self.grpc_host)

    @property
    def http_listen_host(self) -> str:
        """The address of the HTTP port: HTTP_HOST, else that of gRPC."""
        return self.http_host or self.grpc_host

    @property
    def requires_own_role(self) -> bool:
        """Whether the role of DATABASE_URL must not own the tables: where other machines reach server or database."""
        if self.url is None or self.insecure_one_role:
            return False
        return not (self.is_loopback and is_local_database(self.url))

    @cached_property
    def url(self) -> URL | None:
        """DATABASE_URL with the driver named."""
        return None if self.database_url is None else psycopg2_url(self.database_url.get_secret_value())

    @cached_property
    def migration_url(self) -> URL | None:
        """MIGRATION_DATABASE_URL with the driver named; `url` when it is not set."""
        if self.migration_database_url is None:
            return self.url
        return psycopg2_url(self.migration_database_url.get_secret_value())

    def connect_timeout(self, url: URL) -> int:
        """Seconds for a connection to this database: connect_timeout in its URL, else DB_CONNECT_TIMEOUT."""
        return connect_timeout_of(url) or self.db_connect_timeout

    def address(self, port: int) -> str:
        """Where the server listens, in gRPC's form: an IPv6 address is in brackets."""
        host = self.grpc_host.strip("[]")
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def keys(self) -> SecretKeys:
        """The secret keys: from SECRET_KEYS, SECRET_KEYS_FILE, or a generated file in DEV_DATA_DIR.

        Raises SettingsError when none are set and the server or its database can be reached from other machines:
        servers that share a database must share their keys.
        """
        if self.secret_keys is not None:
            return self.secret_keys
        if self.secret_keys_file is not None:
            return _keys_from(self.secret_keys_file)
        if not self.is_loopback or (self.url is not None and not is_local_database(self.url)):
            raise SettingsError(
                "SECRET_KEYS is not set. It is required when the server or its database can be reached from other "
                "machines. Make one with: python -m service generate-key"
            )
        return _generated_keys(self.dev_data_dir / "secret_keys")


def load_settings(**overrides: object) -> Settings:
    """The settings of this process. Raises SettingsError, which names every bad setting."""
    if overrides.get("_env_file", _ENV_FILE) is not None:
        _require_readable(Path(_ENV_FILE))
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # keyword values are validated by the model
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in fault['loc']).upper() or 'settings'}: "
            f"{fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors(include_input=False, include_context=False)
        ]
        raise SettingsError("\n".join(lines)) from None


def _require_readable(env_file: Path) -> None:
    """Refuse a `.env` that would be ignored, in whole or in part. Without one there is nothing to refuse."""
    try:
        if not env_file.exists():
            return
        found = read_text(env_file) if env_file.is_file() else None
    except OSError as error:
        raise SettingsError(f"{env_file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{env_file}: {error}") from None
    if found is None:
        raise SettingsError(f"{env_file} is not a file")
    for line in parse_stream(io.StringIO(found)):
        if line.error:
            raise SettingsError(f"{env_file}: line {line.original.line} is not of the form NAME=value")


def psycopg2_url(text: str) -> URL:
    """The URL with the driver named: to SQLAlchemy 2.1 a bare `postgresql://` means psycopg 3. Several hosts as in
    parse_url.

    Raises ValueError as parse_url does.
    """
    return parse_url(text).set(drivername="postgresql+psycopg2")


def _keys_from(path: Path) -> SecretKeys:
    try:
        return parse_secret_keys(read_text(path))
    except OSError as error:
        raise SettingsError(f"SECRET_KEYS_FILE: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"SECRET_KEYS_FILE: {path}: {error}") from None


def _generated_keys(path: Path) -> SecretKeys:
    try:
        return load_or_create(path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"The generated keys in {path} cannot be used: {error}") from None
