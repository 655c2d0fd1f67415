"""Importing users: one INSERT for a batch, and one SELECT that says whose names were taken.

The named constraints decide whether a name is free. A row that is refused never fails the others. Rows go in in the
order of their emails, so that two imports of one file wait for each other instead of ending in a deadlock.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, any_, bindparam, case, func, or_, select, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.engine import Row as DatabaseRow
from sqlalchemy.orm import Session
from sqlalchemy.types import Boolean, DateTime, Integer, Text

from service.base.actor import SUPERUSER_SCOPE
from service.base.errors import (
    ConflictError,
    EmailTakenError,
    PersonaeError,
    ScopeMissingError,
    UserDeletedError,
    UsernameTakenError,
    Violation,
)
from service.core import audit
from service.core.transfer.rules import (
    Checked,
    OnConflict,
    Result,
    Row,
    RowOutcome,
    refuse_duplicates,
    refuse_without_secret,
    secret_of,
)
from service.core.users import NEXT_EPOCH, NEXT_VERSION, USERS, RequestKey, claim, find_results, store_results
from service.db.engine import actor_of
from service.db.fresh_ids import fresh_id
from service.db.models import ImportScheme, table_of

ACTION = "ImportUsers"
"""In the audit trail."""
_SECRETS = table_of(ImportScheme)
_TICK = timedelta(microseconds=1)
_TIME = DateTime(timezone=True)
_NOW = bindparam("now", type_=_TIME)
_TYPES = {
    "email": Text(),
    "username": Text(),
    "hashed_password": Text(),
    "is_active": Boolean(),
    "email_verified_at": _TIME,
    "created_at": _TIME,
}


def _rows_of(types: Mapping[str, Any]) -> Any:
    """Arrays, one for each column, as rows of a table."""
    arrays = (bindparam(f"{name}s", type_=ARRAY(kind)) for name, kind in types.items())
    return func.unnest(*arrays).table_valued(*types, with_ordinality="position", name="new").render_derived()


def _insert() -> Any:
    new = _rows_of(_TYPES)
    # A scalar subquery is looked up by index for each row. EXISTS becomes a join, for which PostgreSQL reads the whole
    # table until there are about 100,000 users: each batch takes longer than the one before.
    whose = select(USERS.c.id).where(USERS.c.email == new.c.email).scalar_subquery()
    next_id = func.nextval(func.pg_get_serial_sequence(USERS.name, "id"), type_=Integer())
    # Not to draw ids in vain, when a file is imported again; the constraints decide all the same. Ids are drawn in the
    # order of the rows, so that an export has the order of the source.
    free = select(next_id.label("id"), new).where(whose.is_(None)).order_by(new.c.position).subquery("free")
    values = {name: free.c[name] for name in ("id", *_TYPES)} | {
        "created_at": func.coalesce(free.c.created_at, _NOW),
        "password_changed_at": case((free.c.hashed_password.is_not(None), _NOW)),
        "password_imported_at": _NOW,
    }
    rows = select(*values.values()).order_by(free.c.email)
    statement = pg_insert(USERS).from_select(list(values), rows).on_conflict_do_nothing()
    return statement.returning(USERS.c.id, USERS.c.email)


def _update() -> Any:
    new = _rows_of({"id": Integer(), "hashed_password": Text()})
    is_first = USERS.c.hashed_password.is_(None)
    return (
        update(USERS)
        .where(USERS.c.id == new.c.id)
        .values(
            hashed_password=new.c.hashed_password,
            password_changed_at=func.greatest(_NOW, USERS.c.password_changed_at + _TICK),
            password_imported_at=_NOW,
            access_epoch=NEXT_EPOCH,
            version=case((is_first, NEXT_VERSION), else_=USERS.c.version),
            updated_at=case((is_first, func.clock_timestamp()), else_=USERS.c.updated_at),
        )
    )


# Built once: building a statement costs more than running it for a few rows.
_INSERT, _UPDATE = _insert(), _update()
_TAKEN: Select[Any] = select(
    USERS.c.id,
    USERS.c.email,
    USERS.c.username,
    USERS.c.hashed_password,
    USERS.c.is_superuser,
    USERS.c.deleted_at,
    USERS.c.password_imported_at,
).where(
    or_(
        USERS.c.email == any_(bindparam("emails", type_=ARRAY(Text()))),
        USERS.c.username == any_(bindparam("usernames", type_=ARRAY(Text()))),
    )
)
_TAKEN_AND_LOCKED = _TAKEN.order_by(USERS.c.id).with_for_update(key_share=True)


def find_imported(session: Session, request: RequestKey, *, now: datetime) -> list[Result] | None:
    """The results of this import; None when the request is new. Raises RequestIdReusedError."""
    stored = find_results(session, request, now=now)
    return None if stored is None else [_unpacked(one) for one in stored]


def import_users(
    session: Session,
    rows: Sequence[Checked],
    on_conflict: OnConflict,
    *,
    request: RequestKey | None = None,
    now: datetime,
) -> list[Result]:
    """Import a batch; what became of each row, at its index. Or the results of the same request, if it was made before.

    Raises RequestIdReusedError, ConflictError.
    """
    if request is not None and claim(session, request, None, now=now) is None:
        found = find_imported(session, request, now=now)
        if found is None:  # cannot be: claim has waited for it
            raise ConflictError
        return found
    kept = refuse_duplicates(_with_secrets(session, rows))
    wanted = [row for row in kept if isinstance(row, Row)]
    created = _create(session, wanted, now=now)
    others = [row for row in wanted if row.email not in created]
    results = {email: Result(RowOutcome.CREATED, user_id) for email, user_id in created.items()}
    if others:
        found_users = _taken(session, others, is_locked=on_conflict is OnConflict.UPDATE_PASSWORD)
        unexplained = [row for row in others if not found_users.is_taken(row)]
        if unexplained:
            results |= _create_again(session, unexplained, now=now)
        results |= {
            row.email: _settled(session, row, found_users, on_conflict) for row in others if found_users.is_taken(row)
        }
        _replace_passwords(session, others, results, now=now)
    done = [results[row.email] if isinstance(row, Row) else Result(RowOutcome.REFUSED, refusals=row) for row in kept]
    _record(session, kept, done)
    if request is not None:
        store_results(session, request, [_packed(result) for result in done])
    return done


def preview(
    session: Session,
    rows: Sequence[Checked],
    on_conflict: OnConflict,
    *,
    secrets: Collection[tuple[str, str]] = (),
) -> list[Result]:
    """What import_users would make of these rows now. Created users have no id. Changes nothing.

    secrets: id and kind of those that the import itself would store.
    """
    kept = refuse_duplicates(_with_secrets(session, rows, secrets))
    taken = _taken(session, [row for row in kept if isinstance(row, Row)], is_locked=False)
    return [
        Result(RowOutcome.REFUSED, refusals=row)
        if not isinstance(row, Row)
        else _settled(session, row, taken, on_conflict)
        if taken.is_taken(row)
        else Result(RowOutcome.CREATED)
        for row in kept
    ]


def _with_secrets(
    session: Session, rows: Sequence[Checked], others: Collection[tuple[str, str]] = ()
) -> Sequence[Checked]:
    """The rows, but for those whose hashes name secrets that are neither here nor among the others. No statement where
    none is named.
    """
    named = {secret[0] for row in rows if (secret := secret_of(row)) is not None}
    if not named:
        return rows
    known = session.execute(select(_SECRETS.c.id, _SECRETS.c.kind).where(_SECRETS.c.id.in_(named))).all()
    return refuse_without_secret(rows, {*others, *((secret_id, kind) for secret_id, kind in known)})


class _Taken:
    """The users who have some of these names."""

    def __init__(self, found: Sequence[DatabaseRow[Any]]) -> None:
        self.by_email = {user.email: user for user in found}
        self.by_username = {user.username: user for user in found}

    def is_taken(self, row: Row) -> bool:
        """Whether somebody has the email or the username of this row."""
        return row.email in self.by_email or row.username in self.by_username


def _taken(session: Session, rows: Sequence[Row], *, is_locked: bool) -> _Taken:
    names = {"emails": [row.email for row in rows], "usernames": [row.username for row in rows]}
    return _Taken(session.execute(_TAKEN_AND_LOCKED if is_locked else _TAKEN, names).all() if rows else [])


def _create(session: Session, rows: Sequence[Row], *, now: datetime) -> dict[str, int]:
    """Insert the rows whose names are free; the ids by their emails."""
    if not rows:
        return {}
    columns = {f"{name}s": [getattr(row, name) for row in rows] for name in _TYPES}
    return {email: user_id for user_id, email in session.execute(_INSERT, columns | {"now": now})}


def _create_again(session: Session, rows: Sequence[Row], *, now: datetime) -> dict[str, Result]:
    """Insert rows whose names nobody has, and that were not inserted: their ids were taken, by rows that came into the
    table with ids of their own; or a name was, and has become free since.
    """
    fresh_id(session, USERS)  # draws the sequence past such ids
    created = _create(session, rows, now=now)
    again = _refused("email", ConflictError())
    return {
        row.email: Result(RowOutcome.CREATED, created[row.email]) if row.email in created else again for row in rows
    }


def _settled(session: Session, row: Row, taken: _Taken, on_conflict: OnConflict) -> Result:
    """What becomes of a row of which somebody has the email or the username."""
    user = taken.by_email.get(row.email)
    if user is None:
        return _refused("username", UsernameTakenError())
    match on_conflict:
        case OnConflict.FAIL:
            return _refused("email", EmailTakenError())
        case OnConflict.SKIP:
            return Result(RowOutcome.SKIPPED, user.id)
        case OnConflict.UPDATE_PASSWORD:
            return _update_or_refusal(session, row, user)


def _update_or_refusal(session: Session, row: Row, user: DatabaseRow[Any]) -> Result:
    """Whether a row replaces the password of this user: see docs/decisions/0047-imports.md."""
    if user.deleted_at is not None:
        return _refused("email", UserDeletedError())
    if row.hashed_password is None or row.hashed_password == user.hashed_password:
        return Result(RowOutcome.SKIPPED, user.id)
    if user.is_superuser and not actor_of(session).may_change_superusers:
        return _refused("email", ScopeMissingError(SUPERUSER_SCOPE))
    if user.password_imported_at is None:
        text = "was used or changed here since it was imported, or was never imported"
        return Result(RowOutcome.REFUSED, refusals=(Violation("hashed_password", "PASSWORD_IN_USE", text),))
    return Result(RowOutcome.UPDATED, user.id)


def _replace_passwords(session: Session, rows: Sequence[Row], results: Mapping[str, Result], *, now: datetime) -> None:
    """Store the hashes of the rows that are to update a user; void what was issued for these. Their rows are locked."""
    hashes = {
        results[row.email].user_id: row.hashed_password
        for row in rows
        if results[row.email].outcome is RowOutcome.UPDATED
    }
    if hashes:
        columns = {"ids": list(hashes), "hashed_passwords": list(hashes.values())}
        session.execute(_UPDATE, columns | {"now": now}, execution_options={"synchronize_session": False})


def _record(session: Session, rows: Sequence[Checked], results: Sequence[Result]) -> None:
    """Write an event for each user who was created or updated: one statement for all that set the same fields."""
    ids: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for row, result in zip(rows, results, strict=True):
        if isinstance(row, Row) and result.outcome is RowOutcome.CREATED:
            ids[row.set_fields].append(result.user_id)
        elif result.outcome is RowOutcome.UPDATED:
            ids[("password",)].append(result.user_id)
    for fields, user_ids in ids.items():
        audit.record_many(session, ACTION, user_ids, changed=fields)


def _refused(field: str, error: PersonaeError) -> Result:
    return Result(RowOutcome.REFUSED, refusals=(Violation(field, error.reason, str(error)),))


def _packed(result: Result) -> list[Any]:
    """A result as JSON. It holds reasons and ids, nothing of the row."""
    return [result.outcome, result.user_id, [[one.field, one.reason, one.description] for one in result.refusals]]


def _unpacked(stored: Sequence[Any]) -> Result:
    outcome, user_id, refusals = stored
    return Result(RowOutcome(outcome), user_id, tuple(Violation(*one) for one in refusals))
