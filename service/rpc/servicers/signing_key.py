"""SigningKeyService: reading, rotating and revoking the keys that sign access tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import grpc

from personae.v1 import signing_key_pb2, signing_key_pb2_grpc
from service.base.clock import Clock
from service.base.errors import TokensNotConfiguredError
from service.core.signing_keys import rows
from service.core.signing_keys.rows import KeyMaker
from service.core.signing_keys.rules import State, StoredKey, state_of
from service.db.engine import Database, reading
from service.rpc.context import rpc_scope
from service.rpc.signing_keys import SigningKeys
from service.rpc.validation import Violations, bounded_text, to_timestamp

_KID_MAX_BYTES = 64
_STATES = {
    State.NEXT: signing_key_pb2.SigningKey.STATE_NEXT,
    State.SIGNING: signing_key_pb2.SigningKey.STATE_SIGNING,
    State.RETIRED: signing_key_pb2.SigningKey.STATE_RETIRED,
    State.REVOKED: signing_key_pb2.SigningKey.STATE_REVOKED,
}


@dataclass(eq=False)
class SigningKeyServicer(signing_key_pb2_grpc.SigningKeyServiceServicer):
    database: Database
    clock: Clock
    maker: KeyMaker
    signing_keys: SigningKeys
    issues_tokens: bool

    def GetJwks(
        self, request: signing_key_pb2.GetJwksRequest, context: grpc.ServicerContext
    ) -> signing_key_pb2.GetJwksResponse:
        if not self.issues_tokens:
            raise TokensNotConfiguredError  # before the keys are read, which makes those that are missing
        return signing_key_pb2.GetJwksResponse(jwks=self.signing_keys.jwks().decode())

    def ListSigningKeys(
        self, request: signing_key_pb2.ListSigningKeysRequest, context: grpc.ServicerContext
    ) -> signing_key_pb2.ListSigningKeysResponse:
        with rpc_scope(self.database) as session, reading(session):
            keys = rows.read_keys(session)
        now = self.clock()
        return signing_key_pb2.ListSigningKeysResponse(signing_keys=[_message(key, keys, now) for key in keys])

    def RotateSigningKey(
        self, request: signing_key_pb2.RotateSigningKeyRequest, context: grpc.ServicerContext
    ) -> signing_key_pb2.SigningKey:
        now = self.clock()
        with rpc_scope(self.database) as session, session.begin():
            key = rows.rotate(session, self.maker, immediately=request.immediately, now=now)
            keys = rows.read_keys(session)
        self.signing_keys.refresh()
        return _message(key, keys, now)

    def RevokeSigningKey(
        self, request: signing_key_pb2.RevokeSigningKeyRequest, context: grpc.ServicerContext
    ) -> signing_key_pb2.SigningKey:
        violations = Violations()
        kid = bounded_text(request.kid, "kid", violations, max_bytes=_KID_MAX_BYTES)
        if not request.kid:
            violations.add("kid", "REQUIRED", "must say which key")
        violations.check()
        now = self.clock()
        with rpc_scope(self.database) as session, session.begin():
            key = rows.revoke(session, self.maker, kid, now=now)
            keys = rows.read_keys(session)
        self.signing_keys.refresh()
        return _message(key, keys, now)


def _message(key: StoredKey, keys: Sequence[StoredKey], now: datetime) -> signing_key_pb2.SigningKey:
    return signing_key_pb2.SigningKey(
        kid=key.kid,
        state=_STATES[state_of(key, keys, now)],
        created_at=to_timestamp(key.created_at),
        activates_at=to_timestamp(key.activates_at),
        revoked_at=to_timestamp(key.revoked_at),
    )
