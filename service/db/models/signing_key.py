"""The signing_keys table: the keys that sign access tokens."""

from datetime import datetime

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base, CreatedAt


class SigningKey(Base):
    """A key pair. Only the private half is stored, encrypted: a role that can write here, but has no SECRET_KEYS, can
    add no key that servers accept. Of the keys that were not revoked, the one with the latest activates_at in the past
    signs.
    """

    __tablename__ = "signing_keys"

    kid: Mapped[str] = mapped_column(
        String(43, collation="C"), primary_key=True, comment="Thumbprint of the public half (RFC 7638)"
    )
    private_key: Mapped[bytes] = mapped_column(
        comment="PKCS #8 in DER, encrypted with a key that derives from SECRET_KEYS"
    )
    created_at: Mapped[CreatedAt]
    activates_at: Mapped[datetime] = mapped_column(comment="From when on it signs")
    revoked_at: Mapped[datetime | None] = mapped_column(comment="When it was revoked; NULL: it was not")

    __table_args__ = ({"comment": "Keys that sign access tokens, until their last token has expired"},)
