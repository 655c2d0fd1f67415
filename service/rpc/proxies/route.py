"""The settings of a route: what a proxy's configuration says of the requests that it asks about. Pure.

    personae.audience         for which service a token must be; any without it
    personae.acr              how well the person must have been authenticated: aal1 or aal2
    personae.max_age          how many seconds ago that may be
    personae.mode             session (the default): good while the session lasts; jwt: until the token expires
    personae.cookie           a cookie that may hold the token
    personae.authorization    keep: the service behind the proxy gets the credential as well

An operator may mistype them. A setting that is not understood is an error, so that nothing is open by mistake.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

from service.core.callers.rules import AN_AUDIENCE, is_audience
from service.core.sessions.rules import ACR_VALUES
from service.core.sessions.verification import Needed

PREFIX = "personae."
_NAMES = tuple(PREFIX + key for key in ("audience", "acr", "max_age", "mode", "cookie", "authorization"))
_MODES = ("session", "jwt")
_AUTHORIZATION = ("remove", "keep")
_SECONDS = re.compile(r"[0-9]{1,9}")
_COOKIE = re.compile(r"[\w!#$%&'*+.^`|~-]{1,255}", re.ASCII)  # a token by RFC 9110, 5.6.2
_MAX_SHOWN = 64


class RouteError(ValueError):
    """A setting cannot be used. The text names it, and repeats no value."""


@dataclass(frozen=True, slots=True)
class Route:
    """What a route needs, and where the credential of a request may be."""

    needed: Needed
    is_offline: bool
    """Mode jwt."""
    cookie: str
    """"": none."""
    keeps_credential: bool


def parse_route(settings: Iterable[tuple[str, str]]) -> Route:
    """The route with these settings, by their whole names. Raises RouteError."""
    return _parse(tuple(sorted(settings)))


@lru_cache(maxsize=256)  # a proxy has some routes, each with the same settings at every request
def _parse(items: tuple[tuple[str, str], ...]) -> Route:
    for name, _ in items:
        if name not in _NAMES:  # also without the prefix: `audience` would otherwise guard nothing
            raise RouteError(f"{_shown(name)} is not one of {', '.join(_NAMES)}")
    settings = {name.removeprefix(PREFIX): value for name, value in items}
    if len(settings) < len(items):
        raise RouteError("a setting is given twice")
    audience = settings.get("audience")
    if audience is not None and not is_audience(audience):
        raise RouteError(f"personae.audience must be {AN_AUDIENCE}")
    max_age = settings.get("max_age")
    if max_age is not None and _SECONDS.fullmatch(max_age) is None:
        raise RouteError("personae.max_age must be a whole number of seconds")
    cookie = settings.get("cookie")
    if cookie is not None and _COOKIE.fullmatch(cookie) is None:
        raise RouteError("personae.cookie must be the name of a cookie")
    return Route(
        Needed(
            audience or "",
            _one_of(("", *ACR_VALUES), settings, "acr"),
            None if max_age is None else timedelta(seconds=int(max_age)),
        ),
        is_offline=_one_of(_MODES, settings, "mode") == "jwt",
        cookie=cookie or "",
        keeps_credential=_one_of(_AUTHORIZATION, settings, "authorization") == "keep",
    )


def _one_of(values: tuple[str, ...], settings: Mapping[str, str], name: str) -> str:
    """The value of a setting; the first one where it is not set."""
    value = settings.get(name)
    if value is None:
        return values[0]
    if not value or value not in values:
        raise RouteError(f"personae.{name} must be one of {', '.join(filter(None, values))}")
    return value


def _shown(name: str) -> str:
    """A name that is fit for the log."""
    return "".join(one if one.isprintable() else "?" for one in name[:_MAX_SHOWN])
