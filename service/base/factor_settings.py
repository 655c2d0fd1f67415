"""The settings of second factors: a part of service.base.settings.Settings."""

from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings


class FactorSettings(BaseSettings):
    totp_issuer: Annotated[str, Field(min_length=1, max_length=64, pattern="^[^:\\x00-\\x1f]*$")] = "Personae"
