"""The tables of second factors: TOTP secrets, passkeys, recovery codes, failures, and the tickets between two steps."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    PrimaryKeyConstraint,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base, CreatedAt


class TotpFactor(Base):
    """An authenticator app. Without confirmed_at it is none yet: nobody has proved that an app has its secret."""

    __tablename__ = "totp_factors"

    id: Mapped[UUID] = mapped_column(primary_key=True, comment="Assigned by the service; its order is that of creation")
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True, comment="Whose it is")
    secret: Mapped[bytes] = mapped_column(comment="160 bits, encrypted with a key that derives from SECRET_KEYS")
    last_step: Mapped[int] = mapped_column(
        server_default=text("0"), comment="The step of the last code that was used: only later ones are accepted"
    )
    label: Mapped[str] = mapped_column(String(64), comment="What its owner calls it")
    created_at: Mapped[CreatedAt]
    confirmed_at: Mapped[datetime | None] = mapped_column(comment="Since when it counts; NULL: it does not count yet")
    last_used_at: Mapped[datetime | None] = mapped_column(comment="When a code of it last completed a sign-in")

    __table_args__ = (
        Index("ix_totp_factors_unconfirmed", "created_at", postgresql_where=text("confirmed_at IS NULL")),
        {"comment": "Authenticator apps (RFC 6238)"},
    )


class Passkey(Base):
    """A passkey: the public half of a key pair in a person's device or password manager."""

    __tablename__ = "passkeys"

    id: Mapped[UUID] = mapped_column(primary_key=True, comment="Assigned by the service; its order is that of creation")
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True, comment="Whose it is")
    credential_id: Mapped[bytes] = mapped_column(comment="Assigned by the authenticator; at most 1023 bytes")
    user_handle: Mapped[bytes] = mapped_column(
        comment="By which authenticators know the user: random, the same for all passkeys of a user"
    )
    credential_data: Mapped[bytes] = mapped_column(comment="Attested credential data, with the public key (COSE)")
    sign_count: Mapped[int] = mapped_column(BigInteger, comment="The authenticator's counter; stays 0 if it has none")
    is_synced: Mapped[bool] = mapped_column(comment="Whether it may be copied to other devices of the person")
    is_backed_up: Mapped[bool] = mapped_column(comment="Whether there was a copy at its last use")
    label: Mapped[str] = mapped_column(String(64), comment="What its owner calls it")
    created_at: Mapped[CreatedAt]
    confirmed_at: Mapped[datetime] = mapped_column(comment="Since when it counts")
    last_used_at: Mapped[datetime | None] = mapped_column(comment="When it last completed a sign-in")

    __table_args__ = (
        UniqueConstraint("credential_id"),
        CheckConstraint("octet_length(credential_id) <= 1023", name="credential_id_short"),
        {"comment": "Passkeys (W3C Web Authentication Level 3)"},
    )


class RecoveryCode(Base):
    """A recovery code that was not used. Only its hash is stored: 120 random bits need no salt."""

    __tablename__ = "recovery_codes"

    code_hash: Mapped[bytes] = mapped_column(primary_key=True, comment="SHA-256 of the code")
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True, comment="Whose it is")
    created_at: Mapped[CreatedAt]

    __table_args__ = ({"comment": "Recovery codes, until they are used or replaced"},)


class FactorFailure(Base):
    """Wrong answers in a row for one kind of factor of a user. No row: none."""

    __tablename__ = "factor_failures"

    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), comment="Whose factor it is")
    kind: Mapped[str] = mapped_column(String(16, collation="C"), comment="totp or recovery_code")
    failures: Mapped[int] = mapped_column(comment="Wrong answers in a row that were not refused unseen")
    last_failed_at: Mapped[datetime] = mapped_column(comment="When the last of them was")
    created_at: Mapped[CreatedAt]

    __table_args__ = (
        PrimaryKeyConstraint("user_id", "kind"),
        CheckConstraint("failures > 0", name="failures_positive"),
        {"comment": "Wrong answers for second factors, until one is right"},
    )


class SignInTicket(Base):
    """The first step of a sign-in: the password was right. Only the hash of the ticket is stored: it has 256 random
    bits.
    """

    __tablename__ = "sign_in_tickets"

    ticket_hash: Mapped[bytes] = mapped_column(primary_key=True, comment="SHA-256 of the ticket")
    user_id: Mapped[int | None] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"),
        index=True,
        comment="Who signs in; NULL: the passkey will tell",
    )
    access_epoch: Mapped[int] = mapped_column(
        comment="The user's epoch under which the password was right; the ticket is void once the user has another"
    )
    caller: Mapped[str] = mapped_column(
        String(63, collation="C"), comment="Which service got it; no other may complete the sign-in"
    )
    purpose: Mapped[str] = mapped_column(String(16, collation="C"), comment="What it is good for")
    counted_name: Mapped[str] = mapped_column(
        String(8, collation="C"), comment="email or username: whose failed sign-ins the second factor clears"
    )
    tries: Mapped[int] = mapped_column(server_default=text("0"), comment="Wrong answers; void after five")
    challenge: Mapped[bytes | None] = mapped_column(comment="What a passkey has to sign; NULL: none was asked for")
    user_handle: Mapped[bytes | None] = mapped_column(comment="That of the passkey that is made")
    session_id: Mapped[UUID | None] = mapped_column(comment="The session that makes a passkey: it must not be over")
    created_at: Mapped[CreatedAt]
    expires_at: Mapped[datetime] = mapped_column(index=True, comment="From when on it is void")

    __table_args__ = (
        CheckConstraint(
            "purpose IN ('second_factor', 'enrolment', 'passkey_enrol', 'passkey_sign_in')", name="known_purpose"
        ),
        {"comment": "Sign-ins whose password was right, until the second factor is"},
    )
