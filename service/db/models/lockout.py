"""The lockouts table: failed sign-ins that are counted against a name."""

from datetime import datetime

from sqlalchemy import CheckConstraint, DateTime, Integer, LargeBinary, func
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base


class Lockout(Base):
    """What is counted on one name that somebody typed, whether or not a user has it.

    The name itself is not here: the key is a hash of it under a key of the service, so that the table is no list of
    who signs in, or of what was typed into the wrong field.
    """

    __tablename__ = "lockouts"

    key: Mapped[bytes] = mapped_column(
        LargeBinary, primary_key=True, comment="HMAC of the kind of the name and its stored form"
    )
    failures: Mapped[int] = mapped_column(Integer, comment="Failed sign-ins in a row that were not refused unseen")
    last_failed_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), index=True, comment="When the last of them was; the row is forgotten a day later"
    )
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now(), comment="When the row was made"
    )

    __table_args__ = (
        CheckConstraint("failures >= 0", name="failures_not_negative"),
        {"comment": "Failed sign-ins by name, for a day after the last one"},
    )
