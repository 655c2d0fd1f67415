"""The lockouts table: failed sign-ins, counted by name."""

from datetime import datetime

from sqlalchemy import CheckConstraint
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base, CreatedAt


class Lockout(Base):
    """The failed sign-ins under one name, whether or not a user has it.

    The key is a keyed hash of the name, so that the table does not list who signs in, or what was typed into the wrong
    field.
    """

    __tablename__ = "lockouts"

    key: Mapped[bytes] = mapped_column(primary_key=True, comment="HMAC of the kind of the name and its stored form")
    failures: Mapped[int] = mapped_column(comment="Failed sign-ins in a row that were not refused unseen")
    last_failed_at: Mapped[datetime] = mapped_column(
        index=True, comment="When the last of them was; the row is forgotten a day later"
    )
    created_at: Mapped[CreatedAt]

    __table_args__ = (
        CheckConstraint("failures >= 0", name="failures_not_negative"),
        {"comment": "Failed sign-ins by name, for a day after the last one"},
    )
