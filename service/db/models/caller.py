"""The tables of callers, their API keys and their certificate identities."""

from datetime import datetime

from sqlalchemy import ARRAY, CheckConstraint, ForeignKey, Identity, String, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base, CreatedAt


class Caller(Base):
    """A service that may call. Never deleted: the audit trail refers to it by name."""

    __tablename__ = "callers"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True, comment="Assigned by the database")
    name: Mapped[str] = mapped_column(String(63, collation="C"), comment="Chosen by the operator; never changed")
    scopes: Mapped[list[str]] = mapped_column(
        ARRAY(String(64)), server_default=text("'{}'"), comment="What it may call, in alphabetical order"
    )
    audiences: Mapped[list[str]] = mapped_column(
        ARRAY(String(255)), server_default=text("'{}'"), comment="For which services it may have access tokens issued"
    )
    rate_limit: Mapped[int | None] = mapped_column(
        comment="How often a second it may call each server process; 0: no limit; NULL: the default"
    )
    rate_burst: Mapped[int | None] = mapped_column(
        comment="How many calls at once before that counts; NULL: a second's worth"
    )
    created_at: Mapped[CreatedAt]
    updated_at: Mapped[datetime] = mapped_column(
        server_default=func.now(), comment="When its scopes, its audiences or its rate last changed"
    )

    __table_args__ = (
        UniqueConstraint("name"),
        CheckConstraint("rate_limit >= 0", name="rate_limit_not_negative"),
        CheckConstraint(
            "rate_burst IS NULL OR (rate_burst > 0 AND coalesce(rate_limit, 0) > 0)", name="rate_burst_of_a_limit"
        ),
        {"comment": "Services that call, with what each may call"},
    )


class CallerKey(Base):
    """An API key of a caller. Only its hash is stored: 192 random bits need no salt."""

    __tablename__ = "caller_keys"

    key_hash: Mapped[bytes] = mapped_column(primary_key=True, comment="SHA-256 of the whole key")
    key_id: Mapped[str] = mapped_column(
        String(8, collation="C"), comment="The part of the key that is no secret, by which operators name it"
    )
    caller_id: Mapped[int] = mapped_column(
        ForeignKey("callers.id", ondelete="CASCADE"), index=True, comment="Whose key it is"
    )
    created_at: Mapped[CreatedAt]
    expires_at: Mapped[datetime] = mapped_column(comment="From when on it opens nothing")
    revoked_at: Mapped[datetime | None] = mapped_column(comment="When an operator revoked it; NULL while it is live")
    last_used_at: Mapped[datetime | None] = mapped_column(
        comment="When it was last used, up to an hour late; NULL: never"
    )

    __table_args__ = (
        UniqueConstraint("key_id"),
        {"comment": "API keys of callers, by their hash"},
    )


class CallerIdentity(Base):
    """An identity in client certificates: a SPIFFE ID or a DNS name, compared as a whole string."""

    __tablename__ = "caller_identities"

    identity: Mapped[str] = mapped_column(
        String(2048, collation="C"), primary_key=True, comment="spiffe://… or a DNS name in lower case"
    )
    caller_id: Mapped[int] = mapped_column(
        ForeignKey("callers.id", ondelete="CASCADE"), index=True, comment="Whose name it is"
    )
    created_at: Mapped[CreatedAt]

    __table_args__ = (
        CheckConstraint("position('*' in identity) = 0", name="without_wildcard"),
        {"comment": "Names in client certificates by which callers are known"},
    )
