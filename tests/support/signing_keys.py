"""Lists the keys that sign access tokens."""

import json

import jwt

from personae.v1 import signing_key_pb2 as pb
from tests.support.servers import Services


def keys_of(server: Services) -> list[pb.SigningKey]:
    return list(server.signing_keys.ListSigningKeys(pb.ListSigningKeysRequest()).signing_keys)


def published(server: Services) -> set[str]:
    """The kids in the JWK Set."""
    return {key["kid"] for key in json.loads(server.signing_keys.GetJwks(pb.GetJwksRequest()).jwks)["keys"]}


def kid_of(token: str) -> str:
    """The kid in the header of an access token."""
    found: str = jwt.get_unverified_header(token)["kid"]
    return found
