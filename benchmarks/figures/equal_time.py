"""Timing side channels: whether the duration of a call reveals the state of an account (user enumeration)."""

import random
from base64 import b64encode
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import pbkdf2_hmac
from math import sqrt
from statistics import median, quantiles

from benchmarks.accounts import Account, add_accounts
from benchmarks.bench import Bench
from benchmarks.data import PASSWORD, WRONG_PASSWORD, database
from benchmarks.load import Request
from benchmarks.outcomes import sequential_outcomes
from benchmarks.processes import SERVICE, running
from benchmarks.requests import authenticate_by_identifier, start_password_reset
from benchmarks.table import Findings, MeasurementError
from service.core.passwords import hash_password

_COST = 8
_REDUCED_COST = 7
"""Low, so that bcrypt hides less of the other differences. Not lower: a dummy hash that makes up for a lower cost has a
fixed start-up time, which is 1 in 200 of a hash of cost 6."""
_WARM_UP_CALLS = 30
"""Per class."""
_OVER_LONG_BYTES = 5000
_BAR = 0.05
_MILLI = 1e3
_MICRO = 1e6


@dataclass(frozen=True, slots=True)
class _UserClass:
    """A class of users and the request made for each."""

    account: Account | None
    """A template without the name. None: the user does not exist."""
    request: Callable[[str], Request]
    """From the name."""


@dataclass(frozen=True, slots=True)
class _Method:
    """A method whose response and duration must be the same for all classes."""

    name: str
    expected: str
    """Code and reason."""
    classes: Mapping[str, _UserClass]
    """By name. The first is the reference."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call with a name of its own."""

    class_name: str
    request: Request


def measure(bench: Bench) -> Findings:
    """Measure each method on a database and a server of its own, with one client, one call at a time."""
    findings = Findings()
    for method in (_authenticate(), _start_password_reset()):
        _add_figure(findings, method, _durations(bench, method))
    return findings


def _authenticate() -> _Method:
    usual, cheaper = (hash_password(PASSWORD, cost) for cost in (_COST, _REDUCED_COST))
    foreign = f"pbkdf2_sha256$1000$salt${b64encode(pbkdf2_hmac('sha256', PASSWORD.encode(), b'salt', 1000)).decode()}"
    known = Account("", usual)

    def sign_in_with(password: str) -> Callable[[str], Request]:
        return lambda name: authenticate_by_identifier(name, password)

    return _Method(
        "Authenticate",
        "UNAUTHENTICATED INVALID_CREDENTIALS",
        {
            "wrong password": _UserClass(known, sign_in_with(WRONG_PASSWORD)),
            "unknown": _UserClass(None, sign_in_with(WRONG_PASSWORD)),
            "no password": _UserClass(replace(known, hashed_password=None), sign_in_with(WRONG_PASSWORD)),
            "deleted": _UserClass(replace(known, is_deleted=True), sign_in_with(WRONG_PASSWORD)),
            "inactive": _UserClass(replace(known, is_active=False), sign_in_with(WRONG_PASSWORD)),
            "empty password": _UserClass(known, sign_in_with("")),
            "over-long password": _UserClass(known, sign_in_with("w" * _OVER_LONG_BYTES)),
            "hash of lower cost": _UserClass(replace(known, hashed_password=cheaper), sign_in_with(WRONG_PASSWORD)),
            "hash of another product": _UserClass(
                replace(known, hashed_password=foreign), sign_in_with(WRONG_PASSWORD)
            ),
        },
    )


def _start_password_reset() -> _Method:
    known = Account("", None)
    return _Method(
        "StartPasswordReset",
        "OK",
        {
            "known": _UserClass(known, start_password_reset),
            "unknown": _UserClass(None, start_password_reset),
            "deleted": _UserClass(replace(known, is_deleted=True), start_password_reset),
            "inactive": _UserClass(replace(known, is_active=False), start_password_reset),
        },
    )


def _durations(bench: Bench, method: _Method) -> dict[str, list[float]]:
    """The seconds of each call, by class. Raises MeasurementError for an unexpected outcome."""
    rng = random.Random(method.name)
    warm_up, warm_up_accounts = _generate_calls(method, _WARM_UP_CALLS, rng)
    calls, accounts = _generate_calls(method, bench.sizes.timed_calls, rng)
    accounts += warm_up_accounts
    rng.shuffle(accounts)  # the position of a row must not depend on its class
    with database(bench.database_server, "equal_time", bench.directory, users=0) as url:
        add_accounts(url, accounts)
        with running(
            SERVICE, url, bench.directory, settings={"BCRYPT_COST": str(_COST)}, cores=bench.cores.server
        ) as server:
            requests = [call.request for call in warm_up + calls]
            outcomes = bench.load_generator.run(sequential_outcomes, server.target, requests)
    durations: dict[str, list[float]] = {name: [] for name in method.classes}
    for number, (call, outcome) in enumerate(zip(warm_up + calls, outcomes, strict=True)):
        if outcome.name != method.expected:
            raise MeasurementError(f"{method.name}, {call.class_name}: {outcome.name} instead of {method.expected}")
        if number >= len(warm_up):
            durations[call.class_name].append(outcome.seconds)
    return durations


def _generate_calls(method: _Method, times: int, rng: random.Random) -> tuple[list[_Call], list[Account]]:
    """Generate `times` calls of each class, in random order, and the users for them. All names have one length."""
    calls, accounts = [], []
    for class_name, user_class in method.classes.items():
        for _ in range(times):
            name = f"{rng.getrandbits(48):012x}"
            calls.append(_Call(class_name, user_class.request(name)))
            if user_class.account is not None:
                accounts.append(replace(user_class.account, username=name))
    rng.shuffle(calls)
    return calls, accounts


def _add_figure(findings: Findings, method: _Method, durations: dict[str, list[float]]) -> None:
    (name, reference), *others = durations.items()
    aucs = {other: _auc(reference, latencies) for other, latencies in others}
    worst = max(aucs, key=lambda other: abs(aucs[other] - 0.5))
    findings.at_most(
        f"{method.name}: |AUC - 0.5| of durations, the worst ({worst})", abs(aucs[worst] - 0.5), _BAR, digits=3
    )
    low, middle, high = quantiles(reference, n=4)
    differences = "; ".join(
        f"{other} {aucs[other]:.3f} ({(median(latencies) - middle) * _MICRO:+.0f} µs)" for other, latencies in others
    )
    calls = len(reference)
    findings.note(
        f"{method.name}, AUC against {name} (median {middle * _MILLI:.3f} ms, interquartile range "
        f"{(high - low) * _MICRO:.0f} µs), and the difference of medians: "
        f"{differences}. {calls:,} calls of each class, each with another name; standard deviation of "
        f"the AUC by chance {sqrt((2 * calls + 1) / (12 * calls * calls)):.3f}."
    )


def _auc(reference: Sequence[float], others: Sequence[float]) -> float:
    """The probability that a call of `others` takes longer than one of `reference`; ties count half.

    The area under the ROC curve of a classifier by duration, from the Mann-Whitney U statistic. 0.5: no information.
    """
    ordered = sorted(reference)
    rank_sum = sum(bisect_left(ordered, latency) + bisect_right(ordered, latency) for latency in others)
    return rank_sum / 2 / (len(ordered) * len(others))
