"""What ends with a user: flows that need more than one feature. A feature with rows of its own about users joins here.

What only has to become void, at a deactivation or another password, needs no flow: see access_epoch.
"""

from datetime import datetime

from sqlalchemy.orm import Session

from service.core import audit, users
from service.core.codes import remove_codes


def purge_user(session: Session, user_id: int) -> None:
    """Remove a softly deleted user and everything personal. Raises UserNotFoundError, UserNotDeletedError.

    A code that a call stores at this very moment, having read the user as live, opens nothing, but its email stays
    until it expires. What is counted on the user's names stays for its day, under hashes of them.
    """
    users.purge_user(session, user_id)
    remove_codes(session, [user_id])
    audit.record(session, "PurgeUser", target_user_id=user_id)


def purge_due(session: Session, *, now: datetime, limit: int) -> int:
    """Remove up to `limit` users whose purge_at has come, as purge_user does; how many."""
    purged = users.purge_due(session, now=now, limit=limit)
    if purged:
        remove_codes(session, purged)
        audit.record_many(session, "PurgeUser", purged)
    return len(purged)
