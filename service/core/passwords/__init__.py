"""Passwords: hashing and verifying (hashing), the hashes that are verified (schemes), which may be chosen (policy), and
the list of common ones (common).
"""

from service.core.passwords.hashing import hash_password, is_match, is_over_ceiling, parse_hash, renewal_cost
from service.core.passwords.schemes.bcrypt_variants import MAX_COST

__all__ = ["MAX_COST", "hash_password", "is_match", "is_over_ceiling", "parse_hash", "renewal_cost"]
