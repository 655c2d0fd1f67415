"""The settings of second factors: a part of service.base.settings.Settings."""

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode

_DOMAIN = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*", re.ASCII)
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]+)(:[0-9]{1,5})?", re.ASCII)


class FactorSettings(BaseSettings):
    totp_issuer: Annotated[str, Field(min_length=1, max_length=64, pattern="^[^:\\x00-\\x1f]*$")] = "Personae"
    webauthn_rp_id: str | None = None
    webauthn_origins: Annotated[tuple[str, ...] | None, NoDecode] = None

    @field_validator("webauthn_rp_id")
    @classmethod
    def _a_domain(cls, value: str | None) -> str | None:
        if value is not None and not _DOMAIN.fullmatch(value):
            raise ValueError("must be a domain in lower case, such as example.com")
        return value

    @field_validator("webauthn_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(filter(None, (one.strip() for one in value.split(",")))) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _origins_are_of_the_domain(self) -> "FactorSettings":
        """A browser would refuse all others; http it takes from localhost alone."""
        if self.webauthn_origins is not None and self.webauthn_rp_id is None:
            raise ValueError("WEBAUTHN_ORIGINS needs WEBAUTHN_RP_ID")
        for origin in self.webauthn_origins or ():
            found = _ORIGIN.fullmatch(origin)
            domain = self.webauthn_rp_id
            if found is None or not (found["host"] == domain or found["host"].endswith(f".{domain}")):
                raise ValueError(f"WEBAUTHN_ORIGINS: {origin} is not of the form https://host[:port] below {domain}")
            if found["scheme"] == "http" and found["host"] != "localhost":
                raise ValueError(f"WEBAUTHN_ORIGINS: {origin} must be https")
        return self
