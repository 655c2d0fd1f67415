"""Latency of deep list pages compared with the first page: by filter, by order, and with most users deleted."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median

from google.protobuf.timestamp_pb2 import Timestamp

from benchmarks.bench import Bench
from benchmarks.data import COMPANY_AGE_YEARS, NAME_PREFIX, NOW, database, delete_users
from benchmarks.load import Request, first_and_deep_page, interleaved_latencies
from benchmarks.processes import SERVICE, Server, running
from benchmarks.requests import list_users
from benchmarks.table import Findings
from personae.v1 import user_pb2

_PAGE_SIZE = 100
_DEEP_PAGE = 1000
_SLOW_SECONDS = 0.020
_SLOW_ORDER_ROUNDS = 5
_MILLI = 1e3
_Filter = user_pb2.ListUsersRequest.Filter


def _time(value: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(value)
    return message


_MIDDLE = _time(NOW - timedelta(days=365 * COMPANY_AGE_YEARS / 2))
_YESTERDAY = _time(NOW - timedelta(days=1))
_LISTS: dict[str, user_pb2.ListUsersRequest] = {
    "no filter": user_pb2.ListUsersRequest(),
    "is_active true": user_pb2.ListUsersRequest(filter=_Filter(is_active=True)),
    "is_active false": user_pb2.ListUsersRequest(filter=_Filter(is_active=False)),
    "is_superuser true": user_pb2.ListUsersRequest(filter=_Filter(is_superuser=True)),
    "is_superuser false": user_pb2.ListUsersRequest(filter=_Filter(is_superuser=False)),
    "has_second_factor true": user_pb2.ListUsersRequest(filter=_Filter(has_second_factor=True)),
    "has_second_factor false": user_pb2.ListUsersRequest(filter=_Filter(has_second_factor=False)),
    "created_after the middle": user_pb2.ListUsersRequest(filter=_Filter(created_after=_MIDDLE)),
    "created_before the middle": user_pb2.ListUsersRequest(filter=_Filter(created_before=_MIDDLE)),
    "updated_after the middle": user_pb2.ListUsersRequest(filter=_Filter(updated_after=_MIDDLE)),
    "updated_after yesterday": user_pb2.ListUsersRequest(filter=_Filter(updated_after=_YESTERDAY)),
    "email_prefix": user_pb2.ListUsersRequest(filter=_Filter(email_prefix=NAME_PREFIX)),
    "username_prefix": user_pb2.ListUsersRequest(filter=_Filter(username_prefix=NAME_PREFIX)),
    "show_deleted": user_pb2.ListUsersRequest(show_deleted=True),
}
_RARE_FILTERS: dict[str, user_pb2.ListUsersRequest.Filter] = {
    "is_superuser true": _Filter(is_superuser=True),
    "is_active false": _Filter(is_active=False),
    "created_after yesterday": _Filter(created_after=_YESTERDAY),
    "updated_after yesterday": _Filter(updated_after=_YESTERDAY),
}
_DELETED = 0.9
"""The share of users that is soft-deleted, the oldest first."""
_ORDERS = ("created_at desc", "created_at", "id", "id desc", "updated_at", "updated_at desc", "email", "username")
_LISTS |= {f"by {order}": user_pb2.ListUsersRequest(order_by=order) for order in _ORDERS}


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Latencies of the first page of a list and of a deep one, in seconds."""

    name: str
    page: int
    first: float
    deep: float

    @property
    def ratio(self) -> float:
        return self.deep / self.first

    def __str__(self) -> str:
        page = "" if self.page == _DEEP_PAGE else f" (page {self.page}, the last full one)"
        times = f"{self.first * _MILLI:.2f} -> {self.deep * _MILLI:.2f} ms"
        return f"{self.name}{page}: {times}, {self.ratio:.2f}"


def measure(bench: Bench) -> Findings:
    """Page through each list to a deep page; then measure first and deep pages in interleaved rounds."""
    users = bench.sizes.many_users
    with (
        database(bench.database_server, "many", bench.directory, users=users) as url,
        running(SERVICE, url, bench.directory, cores=bench.cores.server) as server,
    ):
        compared = _compared(bench, server)
        slow = _slow_orders(bench, server)
        delete_users(url, round(users * _DELETED))
        compared += _compared(bench, server, suffix=f", {_DELETED:.0%} deleted")
    findings = Findings()
    worst = max(compared, key=lambda comparison: comparison.ratio)
    findings.at_most(
        f"ListUsers at {users:,} users: page {_DEEP_PAGE} / page 1, the worst ({worst.name})", worst.ratio, 1.2
    )
    for comparison in compared:
        findings.note(f"ListUsers, {comparison}")
    findings.note(
        f"ListUsers with a rare filter, page 1 of {_PAGE_SIZE} in every order, slower than {_SLOW_SECONDS * _MILLI:g} "
        f"ms: {'; '.join(slow) or 'none'}."
    )
    return findings


def _compared(bench: Bench, server: Server, suffix: str = "") -> list[_Comparison]:
    requests: list[Request] = []
    pages: dict[str, int] = {}
    for name, message in _LISTS.items():
        sized = _copy(message, page_size=_PAGE_SIZE)
        first_and_deep = bench.load_generator.run(
            first_and_deep_page, server.target, sized.SerializeToString(), pages=_DEEP_PAGE
        )
        if len(first_and_deep) < 2:
            continue  # --quick has too few superusers for a second full page
        pages[name + suffix] = first_and_deep[1].number
        requests += [list_users(_copy(sized, page_token=page.token), page.ids) for page in first_and_deep]
    latencies = [
        median(all_)
        for all_ in bench.load_generator.run(interleaved_latencies, server.target, requests, rounds=bench.sizes.repeats)
    ]
    return [
        _Comparison(name, page, first, deep)
        for (name, page), first, deep in zip(pages.items(), latencies[::2], latencies[1::2], strict=True)
    ]


def _slow_orders(bench: Bench, server: Server) -> list[str]:
    slow = []
    for name, filter_ in _RARE_FILTERS.items():
        requests = [
            list_users(user_pb2.ListUsersRequest(page_size=_PAGE_SIZE, filter=filter_, order_by=order))
            for order in _ORDERS
        ]
        for order, latencies in zip(
            _ORDERS,
            bench.load_generator.run(interleaved_latencies, server.target, requests, rounds=_SLOW_ORDER_ROUNDS),
            strict=True,
        ):
            if median(latencies) > _SLOW_SECONDS:
                slow.append(f"{name} by {order} {median(latencies) * _MILLI:.0f} ms")
    return slow


def _copy(message: user_pb2.ListUsersRequest, *, page_size: int = 0, page_token: str = "") -> user_pb2.ListUsersRequest:
    copy = user_pb2.ListUsersRequest()
    copy.CopyFrom(message)
    copy.page_size = page_size or message.page_size
    copy.page_token = page_token
    return copy
