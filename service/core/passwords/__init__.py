"""Passwords: hashing and verifying (hashing), which may be chosen (policy), and the list of common ones (common)."""

from service.core.passwords.hashing import MAX_COST, hash_password, is_match, is_over_ceiling, parse_hash, renewal_cost

__all__ = ["MAX_COST", "hash_password", "is_match", "is_over_ceiling", "parse_hash", "renewal_cost"]
