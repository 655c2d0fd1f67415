"""Several hosts in a database URL: three spellings, one meaning."""

import pytest
from sqlalchemy import create_engine

from service.base.database_url import described, hosts_of, is_local_database
from service.base.settings import psycopg2_url

SPELLINGS = [
    "postgresql://u:p@h1:5433,h2/db?sslmode=require",
    "postgres://u:p@/db?host=h1,h2&port=5433,5432&sslmode=require",
    "postgresql+psycopg2://u:p@/db?host=h1:5433&host=h2&sslmode=require",
]


def driver_arguments(text: str) -> dict[str, str]:
    _, arguments = create_engine(psycopg2_url(text)).dialect.create_connect_args(psycopg2_url(text))
    return dict(arguments)


@pytest.mark.parametrize("text", SPELLINGS)
def test_the_driver_is_given_all_of_them(text: str) -> None:
    """Libpq tries them in this order and takes the one that can be written to."""
    assert driver_arguments(text) == {
        "host": "h1,h2",
        "port": "5433,5432",
        "user": "u",
        "password": "p",
        "dbname": "db",
        "sslmode": "require",
        "target_session_attrs": "read-write",
    }


@pytest.mark.parametrize("text", [*SPELLINGS, "postgresql://u:p@h1/db?host=h2"])
def test_all_count_where_the_database_is(text: str) -> None:
    url = psycopg2_url(text)
    assert hosts_of(url) == ["h1", "h2"]
    assert not is_local_database(url)


def test_one_port_is_that_of_all() -> None:
    assert driver_arguments("postgresql:///db?host=h1,h2&port=5433")["port"] == "5433,5433"


def test_the_url_decides_which_server_is_wanted() -> None:
    """What the operator says is not overruled; and one host is taken as it is."""
    assert driver_arguments("postgresql://h1,h2/db?target_session_attrs=any")["target_session_attrs"] == "any"
    assert "target_session_attrs" not in driver_arguments("postgresql://u:p@h1:5433/db")


def test_ipv6() -> None:
    """The brackets are of the URL; the driver gets none."""
    assert driver_arguments("postgresql://u@[::1]:5433,[2001:db8::1]/db")["host"] == "::1,2001:db8::1"
    assert driver_arguments("postgresql://u@[::1]:5433,[2001:db8::1]/db")["port"] == "5433,5432"


@pytest.mark.parametrize("password", ["a,b", "a,b/c", "a%2Cb", "a:b,c:d"])
def test_a_password_with_commas(password: str) -> None:
    url = psycopg2_url(f"postgresql://u:{password}@h/db")
    assert (url.host, url.password) == ("h", password.replace("%2C", ","))


@pytest.mark.parametrize("hosts", ["h1,", ",", "h1:x,h2", "h1,h2:5:6"])
def test_what_cannot_be_read(hosts: str) -> None:
    """Nothing of it is in the text of the error."""
    with pytest.raises(ValueError, match="not a database URL") as caught:
        psycopg2_url(f"postgresql://u:hush@{hosts}/db")
    assert "hush" not in str(caught.value)


def test_for_people() -> None:
    assert described(psycopg2_url("postgresql://u:p@h1:5433,h2/db")) == "h1:5433 and h2:5432"
    assert described(psycopg2_url("postgresql:///db?host=h1,h2&port=5433")) == "h1:5433 and h2:5433"
    assert described(psycopg2_url("postgresql://h1/db")) == "h1, port 5432"
