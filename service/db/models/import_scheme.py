"""The import_schemes table: secrets without which imported hashes cannot be verified, such as a pepper."""

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base, CreatedAt


class ImportScheme(Base):
    """A secret that a batch of imported hashes has in common: Firebase's signer key, Devise's pepper.

    The hashes name it by its id, which is a MAC of the secret: importing the same one again adds no row.
    """

    __tablename__ = "import_schemes"

    id: Mapped[str] = mapped_column(
        String(16, collation="C"), primary_key=True, comment="What hashes name it by; a MAC of the secret"
    )
    kind: Mapped[str] = mapped_column(String(16, collation="C"), comment="What the secret is: firebase or pepper")
    parameters: Mapped[bytes] = mapped_column(comment="The secret, encrypted with a key that derives from SECRET_KEYS")
    created_at: Mapped[CreatedAt]

    __table_args__ = ({"comment": "Secrets that batches of imported password hashes have in common"},)
