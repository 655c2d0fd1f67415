"""The keys that sign access tokens: made, replaced and revoked."""
