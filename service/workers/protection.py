"""What a reload may strengthen but not weaken: a worker that would protect less than those before it does not start.

docs/operations.md has the list (a test compares). To protect less, restart the service
(docs/decisions/0038-a-reload-weakens-nothing.md).
"""

from collections.abc import Callable, Mapping, Sequence

from service.base.database_url import is_local_database
from service.base.settings import Settings, SettingsError

Protection = Mapping[str, float | Sequence[str]]
"""By the name of a setting: a number, of which more is better; or ids, of which one has to stay."""

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")  # of libpq, in this order
_CLIENT_CERTIFICATES = ("off", "optional", "required")
_KEY_ID_BYTES = 8


def protection_of(settings: Settings) -> Protection:
    """How far these settings protect; it holds no secret. Raises SettingsError as Settings.keys."""
    return {name: level(settings) for name, level in _LEVELS.items()}


def require_protection(settings: Settings, before: Protection) -> Protection:
    """Return how far these settings protect. Raises SettingsError where that is less than before."""
    after = protection_of(settings)
    if names := weakened(before, after):
        raise SettingsError(
            f"{', '.join(names)}: this would protect less than before, which a reload does not do. Put it back, or "
            "restart the service if you mean it."
        )
    return after


def weakened(before: Protection, after: Protection) -> list[str]:
    """Return the names of the settings that protect less than before. Names that only one side has, as two releases
    may, are not compared.
    """
    return [name for name in before if name in after and _is_less(after[name], before[name])]


def _is_less(after: float | Sequence[str], before: float | Sequence[str]) -> bool:
    if isinstance(after, Sequence) or isinstance(before, Sequence):
        return isinstance(after, Sequence) and isinstance(before, Sequence) and not set(after) & set(before)
    return after < before


def _database_tls(settings: Settings) -> int:
    """The sslmode; that of a database on this machine is no matter."""
    if settings.url is None or is_local_database(settings.url):
        return len(_SSL_MODES)
    mode = settings.url.query.get("sslmode", "prefer")
    return _SSL_MODES.index(mode) if isinstance(mode, str) and mode in _SSL_MODES else 0


def _key_ids(settings: Settings) -> list[str]:
    """Values that tell keys apart and reveal nothing of them. While one key stays, no failed sign-in is forgotten."""
    return [derived[:_KEY_ID_BYTES].hex() for derived in settings.keys().derive("reload")]


_LEVELS: Mapping[str, Callable[[Settings], float | Sequence[str]]] = {
    "TLS_CERTIFICATE_FILE": lambda settings: settings.has_tls,
    "TLS_CLIENT_CERTIFICATES": lambda settings: _CLIENT_CERTIFICATES.index(settings.client_certificates),
    "INSECURE_PLAINTEXT_KEYS": lambda settings: not settings.insecure_plaintext_keys,
    "INSECURE_ONE_ROLE": lambda settings: not settings.insecure_one_role,
    "CALLER_AUTH": lambda settings: settings.caller_auth == "required",
    "CALLER_RATE_LIMIT": lambda settings: settings.caller_rate_limit > 0,
    "CALLER_CODE_RATE_LIMIT": lambda settings: settings.caller_code_rate_limit > 0,
    "DATABASE_URL": _database_tls,
    "SECRET_KEYS": _key_ids,
    "BCRYPT_COST": lambda settings: settings.bcrypt_cost,
    "PASSWORD_MIN_LENGTH": lambda settings: settings.password_min_length,
    "PASSWORD_BLOCKLIST_FILE": lambda settings: settings.password_blocklist_file is not None,
}
