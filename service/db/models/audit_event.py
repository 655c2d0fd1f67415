"""The audit_events table: who did what to whom, when, and with which outcome. Its rows are never changed."""

from datetime import datetime

from sqlalchemy import ARRAY, BigInteger, CheckConstraint, Index, PrimaryKeyConstraint, String, func, text, true
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models.base import Base, CreatedAt


class AuditEvent(Base):
    """A change, or a sign-in that was answered. Ids and names of fields only: no value and no secret.

    Partitioned by month (UTC): retention drops whole months, and triggers on the table and on every partition refuse
    UPDATE, DELETE and TRUNCATE. The triggers, the partitions and the functions are in migrations 0006, 0008 and 0009; a
    row without a month of its own goes to audit_events_default.

    The client columns are personal data, and the exception to the triggers: audit_forget_clients sets them to NULL.

    There is no foreign key to users: an event outlives the purge of its user, and a sign-in under an unknown name costs
    the same as any other. For the same reason the index on target_user_id holds NULLs too. occurred_at stands for
    created_at, by the database's clock: one for all servers.
    """

    __tablename__ = "audit_events"

    id: Mapped[int] = mapped_column(
        BigInteger, autoincrement=True, comment="Assigned by the database; tells events of one moment apart"
    )
    occurred_at: Mapped[datetime] = mapped_column(
        server_default=func.clock_timestamp(), comment="When the row was written"
    )
    caller: Mapped[str] = mapped_column(
        String(63, collation="C"), comment="Which service called, or which part of Personae acted by itself"
    )
    acting_user_id: Mapped[int | None] = mapped_column(
        BigInteger, comment="Who pressed the button, as the caller says; never trusted"
    )
    action: Mapped[str] = mapped_column(String(64, collation="C"), comment="The name of the RPC or of the verb")
    target_user_id: Mapped[int | None] = mapped_column(
        BigInteger, comment="Whom it was about, perhaps purged since; NULL: nobody, or no user"
    )
    target_caller: Mapped[str | None] = mapped_column(
        String(63, collation="C"), comment="Which caller it was about; NULL: none"
    )
    outcome: Mapped[str] = mapped_column(String(16, collation="C"), comment="How it ended")
    reason: Mapped[str | None] = mapped_column(
        String(64, collation="C"), comment="Why it was refused, as the error says it; NULL: it was not"
    )
    request_id: Mapped[str] = mapped_column(
        String(64, collation="C"), comment="The id of the call, as in the log and the trailer; may be empty"
    )
    changed_fields: Mapped[list[str]] = mapped_column(
        ARRAY(String(64)), server_default=text("'{}'"), comment="Names of the fields that were changed; never values"
    )
    client_ip: Mapped[str | None] = mapped_column(
        INET, comment="Where the person who signs in was seen, as the caller says; NULL: not said, or forgotten"
    )
    client_user_agent: Mapped[str | None] = mapped_column(
        String(512), comment="The user agent of that person, as the caller says; NULL: not said, or forgotten"
    )
    operator: Mapped[str | None] = mapped_column(
        String(64), comment="Who ran the command, as the operating system or OPERATOR says; NULL: no command"
    )

    __table_args__ = (
        PrimaryKeyConstraint("occurred_at", "id"),
        CheckConstraint("outcome IN ('succeeded', 'refused')", name="known_outcome"),
        CheckConstraint("(outcome = 'refused') = (reason IS NOT NULL)", name="refused_has_reason"),
        Index(None, "target_user_id", "occurred_at", "id"),
        Index(None, "caller", "occurred_at", "id"),
        # Rare among successful sign-ins: a page of them would otherwise read past all of those.
        Index(
            "ix_audit_events_action", "action", "occurred_at", "id", postgresql_where=text("action <> 'Authenticate'")
        ),
        Index(
            "ix_audit_events_acting_user_id",
            "acting_user_id",
            "occurred_at",
            "id",
            postgresql_where=text("acting_user_id IS NOT NULL"),
        ),
        Index("ix_audit_events_refused", "occurred_at", "id", postgresql_where=text("outcome = 'refused'")),
        {
            "comment": "The audit trail: append-only, partitioned by month",
            "postgresql_partition_by": "RANGE (occurred_at)",
        },
    )


class AuditRetention(Base):
    """How long the audit trail is kept: one row, which the owner of the tables writes and the service only reads."""

    __tablename__ = "audit_retention"

    is_only: Mapped[bool] = mapped_column(primary_key=True, server_default=true(), comment="There is one row at most")
    days: Mapped[int] = mapped_column(comment="How many days after its end a month is dropped")
    created_at: Mapped[CreatedAt]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), comment="When the days last changed")

    __table_args__ = (
        CheckConstraint("is_only", name="one_row"),
        CheckConstraint("days BETWEEN 91 AND 36500", name="days_in_range"),
        {"comment": "How long the audit trail is kept; no row: for ever"},
    )
