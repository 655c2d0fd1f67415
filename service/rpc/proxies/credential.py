"""The access token of a request at a proxy: in its Authorization header (RFC 6750, 2.1), or in a cookie. Pure."""

import re

_SCHEME = re.compile(r" *Bearer +", re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, 2.1


class BadCredentialError(ValueError):
    """There is a credential, and it is no single token."""


def find_token(authorization: str | None, cookies: str, *, cookie: str) -> str | None:
    """The token; None where there is none. Raises BadCredentialError.

    An Authorization header decides, whatever the cookies are: else a request that is refused could be sent again with
    somebody's cookie. cookie: the name of the cookie that may hold the token; "": none may.
    """
    if authorization is not None:
        scheme = _SCHEME.match(authorization)
        if scheme is None:
            return None  # Basic, say
        return _one_token(authorization[scheme.end() :].rstrip(" "))
    found = [value for name, value in _split(cookies) if name == cookie] if cookie else []
    if not found:
        return None
    if len(found) > 1:  # a subdomain can set a second one of the same name (RFC 6265, 8.6)
        raise BadCredentialError
    return _one_token(found[0])


def without_cookie(cookies: str, cookie: str) -> str:
    """The Cookie header without this cookie."""
    return "; ".join(one.strip() for one in cookies.split(";") if one.partition("=")[0].strip() != cookie)


def _split(cookies: str) -> list[tuple[str, str]]:
    pairs = (one.partition("=") for one in cookies.split(";"))
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def _one_token(text: str) -> str:
    if _TOKEN.fullmatch(text) is None:
        raise BadCredentialError
    return text
