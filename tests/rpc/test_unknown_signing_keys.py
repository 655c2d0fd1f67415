"""Access tokens of a key that the server has not read."""

import grpc
from sqlalchemy import event
from sqlalchemy.engine import URL

from service.rpc.signing_keys import SigningKeys
from service.server.wiring import key_maker
from tests.support.credentials import outcome
from tests.support.errors import fails
from tests.support.forgeries import UNKNOWN_KID, signed
from tests.support.proxy import serving_through_a_proxy
from tests.support.servers import running, settings_for
from tests.support.sessions import introspecting, signed_in
from tests.support.threads import at_once
from tests.support.waiting import eventually, is_of_a_job


def test_many_unknown_keys_at_once_cause_few_reads(private_url: URL) -> None:
    """Strangers cannot multiply statements by the header of a token. The server's job reads the keys as well."""
    with running(private_url) as server:
        keys = SigningKeys(server.database, key_maker(settings_for(private_url)), server.clock)
        reads: list[str] = []

        def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            reads.extend(["read"] * is_of_a_job(statement))

        event.listen(server.database.engine, "before_cursor_execute", note)
        assert at_once(32, lambda _: keys.find("x" * 43)) == [None] * 32
        assert len(reads) < 8


def test_while_keys_cannot_be_read_an_unknown_one_is_not_invalid(private_url: URL) -> None:
    """Its token may be valid: IntrospectToken is UNAVAILABLE, also when the call causes no read."""
    with serving_through_a_proxy(private_url) as proxied:
        server = proxied.server
        good = signed_in(server)[1].access_token
        keys = server.server.state.signing_keys
        assert keys is not None
        _, key = keys.current(server.clock())
        unknown = introspecting(signed(good, key, {"kid": UNKNOWN_KID}))
        proxied.proxy.refuse()
        proxied.proxy.cut()
        eventually(lambda: outcome(server.sessions.IntrospectToken, unknown) != "OK", "the keys are to be read again")
        failures = [fails(server.sessions.IntrospectToken, unknown) for _ in range(3)]
        assert {failure.code for failure in failures} == {grpc.StatusCode.UNAVAILABLE}
        proxied.proxy.refuse(refusing=False)
        eventually(lambda: outcome(server.sessions.IntrospectToken, unknown) == "OK", "the keys are read")
        assert not server.sessions.IntrospectToken(unknown).active
