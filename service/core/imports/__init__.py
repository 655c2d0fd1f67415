"""Secrets that imported password hashes need. Importing users: service.core.transfer."""
