"""Sign-ins of users who came along with the hash of another product: verified once, then renewed to bcrypt."""

import base64

import bcrypt
import pytest
from sqlalchemy import event
from sqlalchemy.engine import URL

from personae.v1 import user_pb2
from service.base.actor import COMMAND_LINE
from service.base.randomness import random_bytes
from service.core.passwords.schemes import HashError, Parameters, parse, sources, wrap
from service.core.transfer.hash_secrets import HashSecrets, SecretKind
from service.core.users.hash_report import count_hashes
from service.db.engine import reading
from service.db.models.user import HASH_COST
from tests.support.credentials import NEW, NEW_KEY, OLD_KEY, by_id, change, counted, outcome, rows_of, signing_in, store
from tests.support.databases import run
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.foreign_hashes import MADE, PUBLISHED
from tests.support.foreign_hashes import PASSWORD as MADE_OF
from tests.support.servers import RunningServer, running, settings_for
from tests.support.threads import at_once, outcomes

VECTORS = {parse(text).scheme: (password, parse(text).text) for _, password, text in PUBLISHED}
VECTORS |= {scheme: (MADE_OF, parse(text).text) for _, scheme, text in MADE}
VECTORS["bcrypt"] = next((MADE_OF, text) for _, _, text in MADE if text.startswith("$2y$04$"))
del VECTORS["bcrypt_sha256"]  # as this service writes it, and its cost would be everybody's
VECTORS["wrapped_digest"] = (
    MADE_OF,
    wrap(parse(next(text for _, kind, text in MADE if kind == "ldap_digest")), 4).text,
)
CHEAP = "pbkdf2_sha256$10$salt$DOx9vW6YMAydtr5ryozskeiF1dx+pIW4YpipY5SGYQo="
"""Of PASSWORD."""
FIREBASE: Parameters = {"signer_key": bytes(range(64)), "salt_separator": b"\x07"}
PEPPER: Parameters = {"pepper": b"pepper and more of it"}


def with_hash(server: RunningServer, text: str) -> user_pb2.User:
    user = new_user(server.users, password=PASSWORD)
    store(server.url, user, text)
    return user


def stored(server: RunningServer, user: user_pb2.User) -> str:
    [[text]] = run(server.url, "SELECT hashed_password FROM users WHERE id = %s", (user.id,))
    assert isinstance(text, str)
    return text


def secret_of(
    server: RunningServer, kind: SecretKind, parameters: Parameters, secrets: HashSecrets | None = None
) -> str:
    secrets = secrets or HashSecrets(settings_for(server.url).keys(), random_bytes)
    with server.database.scope(actor=COMMAND_LINE) as session, session.begin():
        return secrets.store(session, kind, parameters)


def peppered(server: RunningServer, secrets: HashSecrets | None = None) -> user_pb2.User:
    hashed = bcrypt.hashpw(PASSWORD.encode() + PEPPER["pepper"], bcrypt.gensalt(4)).decode()
    return with_hash(server, sources.peppered(hashed, secret_id=secret_of(server, "pepper", PEPPER, secrets)))


@pytest.mark.parametrize("scheme", VECTORS)
def test_a_user_of_each_scheme_signs_in(server: RunningServer, scheme: str) -> None:
    """A wrong password is refused and counted and changes nothing; the right one signs in and leaves a bcrypt hash."""
    password, text = VECTORS[scheme]
    user = with_hash(server, text)

    assert signing_in(server, user, "not " + password) == "INVALID_CREDENTIALS"
    assert counted(server, user)[0] == 1
    assert stored(server, user) == text
    assert signing_in(server, user, password) == "OK"
    assert counted(server, user) == (0, 0)
    assert stored(server, user).startswith("$2b$04$")
    assert server.read(user) == user
    assert signing_in(server, user, password) == "OK"
    assert signing_in(server, user, "not " + password) == "INVALID_CREDENTIALS"


def test_a_password_is_changed_by_the_one_that_came_along(server: RunningServer) -> None:
    """ChangePassword verifies as Authenticate does."""
    user = with_hash(server, CHEAP)

    assert outcome(server.credentials.ChangePassword, change(user, "not " + PASSWORD)) == "INVALID_CREDENTIALS"
    assert outcome(server.credentials.ChangePassword, change(user, PASSWORD)) == "OK"
    assert signing_in(server, user, NEW) == "OK"
    assert signing_in(server, user, PASSWORD) == "INVALID_CREDENTIALS"


def test_right_passwords_at_once_do_not_refuse_each_other(server: RunningServer) -> None:
    """All of them verify the old hash, and one after the other renews it."""
    user = with_hash(server, CHEAP)

    results = at_once(8, lambda _: server.authentication.Authenticate(by_id(user, PASSWORD)))

    assert outcomes(results) == {"OK": 8}
    assert stored(server, user).startswith("$2b$04$")


class TestSecrets:
    def test_a_hash_that_names_its_secret(self, server: RunningServer) -> None:
        """Devise's pepper, sealed: in no column is it to be read."""
        user = peppered(server)

        assert signing_in(server, user, PASSWORD + "x") == "INVALID_CREDENTIALS"
        assert signing_in(server, user, PASSWORD) == "OK"
        assert stored(server, user).startswith("$2b$04$")
        for row in rows_of(server.url, "import_schemes"):
            assert PEPPER["pepper"] not in bytes(row["parameters"])
            assert base64.b64encode(PEPPER["pepper"]) not in bytes(row["parameters"])

    def test_a_secret_of_another_kind_is_none(self, server: RunningServer) -> None:
        """It is refused at the import, and not at the first sign-in. A salt that looks like a secret's name is none."""
        pepper_id = stored(server, peppered(server)).split("$")[2].removeprefix("k=")
        digest = "A" * 43
        request = user_pb2.ImportUsersRequest()
        for number, text in enumerate(
            (
                f"$firescrypt$k={pepper_id},ln=10,r=8,p=1$c2FsdA==${digest}=",
                f"pbkdf2_sha256$1000$k=fedcba9876543210${digest}=",
            )
        ):
            name = f"{unique_name()}{number}"
            request.users.add(email=f"{name}@example.com", username=name, hashed_password=text)

        of_another_kind, of_none = server.users.ImportUsers(request).results

        assert [one.reason for one in of_another_kind.refusals] == ["HASH_UNSUPPORTED"]
        assert of_none.outcome == user_pb2.ImportUsersResponse.Result.OUTCOME_CREATED

    def test_only_such_a_user_costs_a_statement(self, server: RunningServer) -> None:
        """Users with bcrypt are looked up as before."""
        users = [new_user(server.users, password=PASSWORD), with_hash(server, CHEAP), peppered(server)]
        sent: list[str] = []

        def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            sent.append(statement)

        event.listen(server.database.engine, "before_cursor_execute", count)
        reads = []
        for user in users:
            sent.clear()
            assert signing_in(server, user, "wrong") == "INVALID_CREDENTIALS"
            reads.append(sum("import_schemes" in statement for statement in sent))
        event.remove(server.database.engine, "before_cursor_execute", count)

        assert reads == [0, 0, 1]

    def test_the_same_secret_again_has_the_same_id(self, private_url: URL) -> None:
        """An import that is repeated adds nothing; another secret is another one; nonsense is refused."""
        with running(private_url) as server:
            ids = [secret_of(server, "firebase", FIREBASE) for _ in range(3)]
            ids.append(secret_of(server, "pepper", PEPPER))
            assert len(set(ids)) == 2
            assert len(rows_of(private_url, "import_schemes")) == 2
            for kind, bad in (("pepper", {"pepper": b""}), ("pepper", FIREBASE), ("firebase", {"signer_key": b"x"})):
                with pytest.raises(ValueError, match="do not fit"):
                    secret_of(server, kind, bad)  # type: ignore[arg-type]  # of a loop
            with pytest.raises(ValueError, match="do not fit"):
                secret_of(server, "pepper", {"pepper": b"x" * 1025})

    def test_a_row_that_was_moved_or_damaged_is_not_believed(self, private_url: URL) -> None:
        """Its users get the answer of a damaged hash; all others sign in."""
        with running(private_url) as server:
            user = peppered(server)
            other = secret_of(server, "firebase", FIREBASE)
            run(
                private_url,
                "UPDATE import_schemes SET parameters = (SELECT parameters FROM import_schemes WHERE id = %s)",
                (other,),
            )
            assert signing_in(server, user, PASSWORD) == "INTERNAL"
            run(private_url, "DELETE FROM import_schemes")
            assert signing_in(server, user, PASSWORD) == "INTERNAL"
            assert signing_in(server, new_user(server.users, password=PASSWORD), PASSWORD) == "OK"

    def test_a_rotation_of_the_secret_keys(self, private_url: URL) -> None:
        """The first start with the new key in front encrypts anew; then the old one can go."""
        old = HashSecrets(settings_for(private_url, secret_keys=OLD_KEY).keys(), random_bytes)
        with running(private_url, secret_keys=OLD_KEY) as server:
            user = peppered(server, old)
        before = rows_of(private_url, "import_schemes")
        for keys in (f"{OLD_KEY},{NEW_KEY}", OLD_KEY):
            with running(private_url, secret_keys=keys):
                assert rows_of(private_url, "import_schemes") == before
        with running(private_url, secret_keys=f"{NEW_KEY},{OLD_KEY}"):
            assert rows_of(private_url, "import_schemes") != before
        with running(private_url, secret_keys=NEW_KEY) as server:
            assert signing_in(server, user, PASSWORD) == "OK"


def test_sign_ins_read_no_hash_of_another_product(private_url: URL) -> None:
    """The reference cost comes from the last entry of an index that holds bcrypt alone, whatever else is stored."""
    fill = (
        "INSERT INTO users (email, username, hashed_password) SELECT 'f' || n || '@example.com', 'f' || n, CASE n % 4"
        " WHEN 0 THEN '$argon2id$v=19$m=65536,t=3,p=4$' || md5(n::text) || '$' || md5(n::text)"
        " WHEN 1 THEN 'pbkdf2_sha256$1000000$salt$' || md5(n::text)"
        " WHEN 2 THEN '$6$salt$' || repeat(md5(n::text), 2)"
        " ELSE '$2b$99$' || repeat('.', 53) END FROM generate_series(1, 4000) AS n"
    )
    with running(private_url) as server:
        user = new_user(server.users, password=PASSWORD)
        run(private_url, fill)
        run(private_url, "ANALYZE users")
        plans: list[str] = []

        def explain(connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
            if "max(" in statement:
                with connection.connection.dbapi_connection.cursor() as cursor:  # type: ignore[attr-defined]
                    cursor.execute(f"EXPLAIN (ANALYZE) {statement}", parameters)
                    plans.append("\n".join(line for (line,) in cursor.fetchall()))

        event.listen(server.database.engine, "before_cursor_execute", explain)
        assert signing_in(server, user, "wrong") == "INVALID_CREDENTIALS"
        event.remove(server.database.engine, "before_cursor_execute", explain)

    [plan] = plans
    assert "Backward using ix_users_bcrypt_cost" in plan
    assert "Seq Scan" not in plan
    assert "Rows Removed" not in plan


def test_the_index_and_the_code_agree_on_what_bcrypt_is(private_url: URL) -> None:
    """The cost that PostgreSQL sees in a hash is the one that is verified; in anything else it sees none."""
    plain = "$2b$12$" + "A1/." * 5 + "ZO" + "x" * 31
    long = "$bcrypt-sha256$v=2,t=2b,r=12$" + "." * 21 + "u$" + "y" * 31
    texts = [
        plain,
        long,
        "$2a$04$" + plain[7:],
        "$2y$16$" + plain[7:],
        *(long.replace("12", cost) for cost in ("4", "06")),
    ]
    for text in (plain, long):
        for place, character in enumerate(text):
            changes = ("", "$", "x", "9", "=", "\n", character * 2)
            texts += [text[:place] + change + text[place + 1 :] for change in changes]
    texts += [plain + "\n", "x" + plain, plain + plain, long + plain, "", "$", "\u00b2" * 60]
    texts += [text for _, text in VECTORS.values()]
    seen = run(private_url, f"SELECT {HASH_COST} FROM unnest(%s) AS t (hashed_password)", (texts,))

    def cost_of(text: str) -> str | None:
        try:
            cost = parse(text).recipe.bcrypt_cost
        except HashError:
            return None
        return None if cost is None else f"{cost:02}"

    assert len(texts) > 1000
    assert [cost for (cost,) in seen] == [cost_of(text) for text in texts]


def test_the_report_knows_every_scheme(private_url: URL) -> None:
    """Each hash is counted under the name that the table gives it, by PostgreSQL; nothing is left over."""
    with running(private_url) as server:
        texts = {scheme: text for scheme, (_, text) in VECTORS.items()}
        texts["bcrypt_sha256"] = next(text for _, _, text in MADE if text.startswith("$bcrypt-sha256$v=2"))
        texts["peppered_bcrypt"] = sources.peppered("$2a$11$" + "." * 53, secret_id="0" * 16)
        for text in texts.values():
            with_hash(server, text)
        with server.database.scope() as session, reading(session):
            found = {count.scheme: count.users for count in count_hashes(session)}

    assert found.pop("bcrypt $2y$") == 1
    assert found == dict.fromkeys(texts.keys() - {"bcrypt"}, 1)
