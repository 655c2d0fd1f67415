"""Connections to a server that cannot be written to: a standby, or a primary that was demoted."""

from sqlalchemy.engine import URL

from tests.support.databases import run
from tests.support.errors import fails
from tests.support.factories import new_user, unique_name
from tests.support.proxy import serving_through_a_proxy


def test_the_change_is_made_on_a_fresh_connection(private_url: URL) -> None:
    """It may lead to the new primary: the caller notices nothing."""
    with serving_through_a_proxy(private_url) as proxied:
        user = new_user(proxied.server.users)
        proxied.proxy.answer("UPDATE users", "25006")

        assert proxied.server.update(user, username=unique_name()).etag == "v2"


def test_while_nothing_can_be_written(private_url: URL) -> None:
    """UNAVAILABLE with pushback; once it is over no connection of that time is used, without a restart."""
    with serving_through_a_proxy(private_url) as proxied:
        server, user = proxied.server, new_user(proxied.server.users)
        run(private_url, f'ALTER DATABASE "{private_url.database}" SET default_transaction_read_only = on')
        server.database.dispose()  # as after an outage: the connections are opened anew

        failure = fails(server.update, user, username=unique_name())

        assert (failure.reason, failure.trailers["grpc-retry-pushback-ms"]) == ("DATABASE_UNAVAILABLE", "1000")
        assert server.read(user) == user
        reset = f'ALTER DATABASE "{private_url.database}" RESET default_transaction_read_only'
        run(private_url, f"SET TRANSACTION READ WRITE; {reset}")
        assert server.update(user, username=unique_name()).etag == "v2"
