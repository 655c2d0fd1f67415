"""What concerns several features at once: a change of email, and a purge.

Deactivation, deletion and a new password need no such flow: a new access_epoch makes codes void and ends sessions.
"""

from datetime import datetime

from sqlalchemy.orm import Session

from service.core import audit, users
from service.core.codes import remove_codes
from service.core.sessions.rows import carry_over
from service.core.users import UserRecord

_PURGE_BATCH = 20
"""Few, because each user may have signed in many thousand times, and the transaction rewrites all of these events."""


def update_user(
    session: Session, user_id: int, *, email: str | None, username: str | None, version: int | None
) -> UserRecord:
    """As users.update_row. Sessions go on: a person who changes the email is not signed out."""
    return users.update_row(
        session,
        user_id,
        email=email,
        username=username,
        version=version,
        on_new_email=lambda: carry_over(session, user_id),
    )


def purge_user(session: Session, user_id: int) -> None:
    """Remove a softly deleted user and everything personal. Its sessions go with its row.

    Raises UserNotFoundError, UserNotDeletedError.
    A concurrent call that has read the user as live may still store a code: it opens nothing, but its email stays until
    it expires; a sign-in that is settled meanwhile still says where it came from. Failed sign-ins stay for their day,
    under hashes of the names.
    """
    users.purge_row(session, user_id)
    remove_codes(session, [user_id])
    audit.forget_clients(session, [user_id])
    audit.record(session, "PurgeUser", target_user_id=user_id)


def purge_expired(session: Session, *, now: datetime, limit: int) -> int:
    """As purge_user, for some users whose purge_at has passed, up to `limit`; how many, 0 when none is due."""
    purged = users.purge_expired_rows(session, now=now, limit=min(limit, _PURGE_BATCH))
    if purged:
        remove_codes(session, purged)
        audit.forget_clients(session, purged)
        audit.record_many(session, "PurgeUser", purged)
    return len(purged)
