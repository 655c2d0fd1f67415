"""The request_ids table: it makes a creation or an import safe to repeat."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, PrimaryKeyConstraint, String
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base, CreatedAt


class RequestId(Base):
    """A creation or an import that was acknowledged, remembered for a day.

    The row is inserted before the user it names, so that two calls with one id conflict here and not at the email; the
    foreign key is checked at the commit.
    """

    __tablename__ = "request_ids"

    caller: Mapped[str] = mapped_column(String(255, collation="C"), comment="Who called")
    method: Mapped[str] = mapped_column(String(100, collation="C"), comment="Full name of the RPC")
    request_id: Mapped[UUID] = mapped_column(comment="Chosen by the caller")
    fingerprint: Mapped[bytes] = mapped_column(comment="Keyed hash of the request without passwords and hashes")
    user_id: Mapped[int | None] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        index=True,
        comment="What the call created; NULL for an import",
    )
    results: Mapped[list[Any] | None] = mapped_column(
        JSONB(none_as_null=True), comment="What became of each row of an import: outcome, user id, reasons"
    )
    created_at: Mapped[CreatedAt]
    expires_at: Mapped[datetime] = mapped_column(
        index=True, comment="From when on the id may be used for something else"
    )

    __table_args__ = (
        PrimaryKeyConstraint("caller", "method", "request_id"),
        {"comment": "Acknowledged creations and imports by the caller's request id, for a day"},
    )
