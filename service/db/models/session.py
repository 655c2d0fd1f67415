"""The sessions table: people who are signed in."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import ARRAY, ForeignKey, PrimaryKeyConstraint, String, text
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base, CreatedAt


class Session(Base):
    """A person who is signed in at one device. Its refresh tokens are not stored: a refresh token carries the secret
    whose hash is here and the generation, under a MAC.

    A session that was ended has no row. One that is over by time or epoch keeps its row for a while.

    The one index besides the key is on a column that never changes, so that refreshes are heap-only updates.
    """

    __tablename__ = "sessions"

    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), comment="Whose session it is")
    id: Mapped[UUID] = mapped_column(comment="A UUID of version 7: its order is that of the starts")
    access_epoch: Mapped[int] = mapped_column(comment="The user's epoch; the session is over once the user has another")
    secret_hash: Mapped[bytes] = mapped_column(comment="SHA-256 of the secret in its refresh tokens")
    generation: Mapped[int] = mapped_column(server_default=text("1"), comment="That of its newest refresh token")
    caller: Mapped[str] = mapped_column(
        String(63, collation="C"), comment="Which service started it; no other may refresh it"
    )
    audience: Mapped[list[str]] = mapped_column(ARRAY(String(255)), comment="For which services its access tokens are")
    amr: Mapped[list[str]] = mapped_column(ARRAY(String(16)), comment="How the person was authenticated (RFC 8176)")
    authenticated_at: Mapped[datetime] = mapped_column(comment="When the person was last authenticated")
    refreshed_at: Mapped[datetime] = mapped_column(comment="When the newest refresh token was issued")
    idle_expires_at: Mapped[datetime] = mapped_column(
        comment="When it is over, if it is not refreshed; 1970 after a theft"
    )
    expires_at: Mapped[datetime] = mapped_column(index=True, comment="When it is over in any case; never changes")
    idle_seconds: Mapped[int] = mapped_column(comment="How long it may be idle")
    ip_address: Mapped[str | None] = mapped_column(INET, comment="Where the person was seen, as the caller says")
    user_agent: Mapped[str | None] = mapped_column(String(512), comment="The person's user agent, as the caller says")
    created_at: Mapped[CreatedAt]

    __table_args__ = (
        PrimaryKeyConstraint("user_id", "id"),
        {"comment": "Sessions, until their expires_at", "postgresql_with": {"fillfactor": "85"}},
    )
