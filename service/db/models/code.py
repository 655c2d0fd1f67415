"""The codes table: codes that were delivered and have not been used."""

from datetime import datetime

from sqlalchemy import CheckConstraint, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base, CreatedAt


class Code(Base):
    """A code that resets a password or proves an email. Only its hash is stored: 256 random bits need no salt.

    A user has at most one of each purpose: a newer one takes the row over. A reset for an unknown name stores a row of
    the same size, one for each name, so that it takes the same time. For the same reason there is no foreign key to
    users: it would be checked only for names that exist. A purge removes a user's codes.
    """

    __tablename__ = "codes"

    code_hash: Mapped[bytes] = mapped_column(primary_key=True, comment="SHA-256 of the code")
    purpose: Mapped[str] = mapped_column(String(20, collation="C"), comment="What the code is for")
    subject: Mapped[str] = mapped_column(
        String(80, collation="C"), comment="Whose it is: user:<id>, or name:<HMAC of the name> for nobody"
    )
    user_id: Mapped[int] = mapped_column(comment="Whose it is; 0: nobody's, it opens nothing")
    access_epoch: Mapped[int] = mapped_column(
        comment="The user's epoch when it was made; the code is void once the user has another"
    )
    email: Mapped[str] = mapped_column(
        String(255, collation="C"), comment="Where it may be delivered, and what it proves; nobody's: nowhere"
    )
    # Nothing reads it any more. A later migration drops it, once no server that does can run beside it.
    tries: Mapped[int] = mapped_column(
        server_default=text("0"), comment="How often something was tried by it that was not completed yet"
    )
    created_at: Mapped[CreatedAt]
    expires_at: Mapped[datetime] = mapped_column(index=True, comment="From when on it is void")

    __table_args__ = (
        UniqueConstraint("subject", "purpose"),
        CheckConstraint("purpose IN ('password_reset', 'email_verification')", name="known_purpose"),
        {"comment": "Codes, until they are used, replaced or expired"},
    )
