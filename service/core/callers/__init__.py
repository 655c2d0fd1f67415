"""Callers: the services that may call, the scopes of each, and the API keys and certificate identities that prove them.

A key is live until it expires or is revoked. A caller has at most two live keys, so that one can replace the other
without a gap. Callers are never deleted: the audit trail refers to them by name.
"""
