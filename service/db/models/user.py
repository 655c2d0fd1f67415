"""The users table."""

from datetime import datetime

from sqlalchemy import CheckConstraint, Identity, Index, String, UniqueConstraint, false, func, text, true
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base, CreatedAt

HASH_COST = (
    "COALESCE(regexp_substr((left(right(hashed_password, 54), 1) || left(right(hashed_password, 32), 1))"
    " || hashed_password, '^[$][.Oeu][$]2[aby][$](0[4-9]|1[0-6])[$][./A-Za-z0-9]+$', 1, 1, '', 1),"
    " lpad(regexp_substr((left(right(hashed_password, 55), 1) || left(right(hashed_password, 32), 1))"
    " || hashed_password, '^[$]{3}bcrypt-sha256[$]v=2,t=2b,r=0?([4-9]|1[0-6])[$][./A-Za-z0-9]+[.Oeu]"
    "[$][./A-Za-z0-9]+$', 1, 1, '', 1), 2, '0'))"
)
"""The cost of a bcrypt hash as this service writes it, in two digits, as an SQL expression; NULL for any other text.

service.core.passwords.schemes agrees. It is evaluated for each hash that is stored: so the characters at two places,
counted from the end, are put in front of the hash and matched there, since `{53}` in a regular expression takes ten
times as long. Without backslashes, which settings of a database may change. It is the expression of an index: a change
takes a migration.
"""


class User(Base):
    """A user account.

    Email and username are stored normalised: the stored form is unique and is looked up. COLLATE "C" lets one unique
    index serve look-ups, prefix ranges and order, and keeps it valid over upgrades of the OS.
    """

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True, comment="Assigned by the database, never reused")
    email: Mapped[str] = mapped_column(
        String(255, collation="C"), comment="Normalised: ASCII, lower case, domain as IDNA A-labels"
    )
    username: Mapped[str] = mapped_column(
        String(50, collation="C"), comment="Normalised: ASCII, lower case, never with an @"
    )
    hashed_password: Mapped[str | None] = mapped_column(
        String(255),
        comment="Names its scheme, cost and salt: bcrypt, or as imported until the next sign-in; "
        "NULL while no password is set",
    )
    password_changed_at: Mapped[datetime | None] = mapped_column(
        comment="When the user last got another password; a hash renewed at a sign-in does not count"
    )
    password_change_required: Mapped[bool] = mapped_column(
        server_default=false(), comment="The right password signs in only after it was changed to another"
    )
    password_expires_at: Mapped[datetime | None] = mapped_column(
        comment="From when on an initial password is nobody's; NULL: never"
    )
    access_epoch: Mapped[int] = mapped_column(
        server_default=text("1"),
        comment="Moves when email or password change and at deactivation and deletion; what was issued before is void",
    )
    is_active: Mapped[bool] = mapped_column(
        server_default=true(), comment="Deactivated users do not sign in; kept apart from deletion"
    )
    is_superuser: Mapped[bool] = mapped_column(
        server_default=false(), comment="Data for the callers; gives no power in this service"
    )
    created_at: Mapped[CreatedAt]
    updated_at: Mapped[datetime] = mapped_column(
        server_default=func.now(), comment="When a field that callers see last changed"
    )
    version: Mapped[int] = mapped_column(
        server_default=text("1"), comment="Moves together with updated_at; the etag of the user"
    )
    deleted_at: Mapped[datetime | None] = mapped_column(comment="When the user was deleted softly; NULL for a live one")
    purge_at: Mapped[datetime | None] = mapped_column(comment="When a deleted user may be removed for good")
    email_verified_at: Mapped[datetime | None] = mapped_column(
        comment="When the present email was proved to be the user's"
    )
    has_second_factor: Mapped[bool] = mapped_column(
        server_default=false(), comment="Whether a confirmed factor exists: a password alone signs nobody in"
    )
    is_mfa_required: Mapped[bool] = mapped_column(
        server_default=false(), comment="Whether an operator demands a second factor"
    )

    __table_args__ = (
        UniqueConstraint("email"),
        UniqueConstraint("username"),
        CheckConstraint("(deleted_at IS NULL) = (purge_at IS NULL)", name="deleted_has_purge_at"),
        CheckConstraint("position('@' in username) = 0", name="username_without_at"),
        Index(None, "created_at", "id"),
        Index(None, "updated_at", "id"),
        # In every order of a list: live users, so that no page reads past many deleted ones. In the default order also
        # the rare kinds, for which a page would otherwise read the whole table.
        Index("ix_users_live", "created_at", "id", postgresql_where=text("deleted_at IS NULL")),
        Index("ix_users_live_id", "id", postgresql_where=text("deleted_at IS NULL")),
        Index("ix_users_live_email", "email", postgresql_where=text("deleted_at IS NULL")),
        Index("ix_users_live_username", "username", postgresql_where=text("deleted_at IS NULL")),
        Index("ix_users_live_updated_at", "updated_at", "id", postgresql_where=text("deleted_at IS NULL")),
        Index(
            "ix_users_live_superusers", "created_at", "id", postgresql_where=text("is_superuser AND deleted_at IS NULL")
        ),
        Index(
            "ix_users_live_inactive", "created_at", "id", postgresql_where=text("NOT is_active AND deleted_at IS NULL")
        ),
        Index(
            "ix_users_live_with_factor",
            "created_at",
            "id",
            postgresql_where=text("has_second_factor AND deleted_at IS NULL"),
        ),
        Index(
            "ix_users_live_without_factor",
            "created_at",
            "id",
            postgresql_where=text("NOT has_second_factor AND deleted_at IS NULL"),
        ),
        Index("ix_users_superusers", "created_at", "id", postgresql_where=text("is_superuser")),
        Index(
            "ix_users_inactive", "created_at", "id", postgresql_where=text("NOT is_active OR deleted_at IS NOT NULL")
        ),
        Index("ix_users_purge_at", "purge_at", postgresql_where=text("purge_at IS NOT NULL")),
        # Every sign-in reads the highest cost of any stored bcrypt hash: the last entry of this index that is not NULL.
        Index("ix_users_bcrypt_cost", text(HASH_COST)),
        # What the release before reads instead. The next one drops it.
        Index(
            "ix_users_hash_cost",
            text("translate(right(split_part(hashed_password, '$', 3), 2), '=', '0')"),
            postgresql_where=text("hashed_password IS NOT NULL"),
        ),
        {"comment": "User accounts"},
    )
