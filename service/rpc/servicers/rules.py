"""The settings that the servicers share."""

from dataclasses import dataclass
from datetime import timedelta

from service.core.passwords.policy import PasswordPolicy
from service.core.transfer.rules import ImportRules


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings for users, passwords, emails and the lifetimes of codes."""

    policy: PasswordPolicy
    bcrypt_cost: int
    allow_special_domains: bool
    purge_after: timedelta
    reset_valid_for: timedelta
    verification_valid_for: timedelta

    @property
    def imports(self) -> ImportRules:
        """What ImportUsers needs of them."""
        return ImportRules(self.allow_special_domains, self.bcrypt_cost)
