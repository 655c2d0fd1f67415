"""Throughput of Authenticate compared with bare bcrypt."""

import threading
import time
from statistics import median

import bcrypt

from benchmarks.bench import Bench
from benchmarks.data import COST, PASSWORD, SIGN_IN_USER_ID
from benchmarks.load import load_generator, run_calls
from benchmarks.processes import SERVICE, running
from benchmarks.requests import authenticate
from benchmarks.rounds import ratio_per_round
from benchmarks.table import Findings, spread

_SETTINGS = {"BCRYPT_COST": str(COST), "GRPC_WORKERS": "0"}


def measure(bench: Bench) -> Findings:
    """Compare as many clients as cores, on a service with one worker per core, with bcrypt in as many threads, in
    alternating rounds.
    """
    cores, times = len(bench.cores.all), bench.sizes.sign_ins
    requests = [authenticate(SIGN_IN_USER_ID, PASSWORD)]
    signed_in, checked = [], []
    with (
        running(SERVICE, bench.database_url, bench.directory, settings=_SETTINGS) as server,
        load_generator(bench.cores.all) as load,
    ):
        load.run(run_calls, server.target, requests, in_flight=cores, calls_per_thread=1)
        for _ in range(bench.sizes.sign_in_rounds):
            took = load.run(run_calls, server.target, requests, in_flight=cores, calls_per_thread=times)
            signed_in.append(cores * times / took)
            checked.append(cores * times / load.run(_check_passwords, threads=cores, times=times))
    findings = Findings()
    findings.at_least("Authenticate/s / bare bcrypt.checkpw/s", median(signed_in) / median(checked), 0.95)
    findings.note(
        f"Authenticate {spread(signed_in, unit='/s', digits=1)}, checkpw {spread(checked, unit='/s', digits=1)}, cost "
        f"{COST}, {cores} callers, {len(server.workers)} workers, {cores} threads; ratio within one round "
        f"{ratio_per_round(signed_in, checked)}; {bench.sizes.sign_in_rounds} rounds of {cores * times}."
    )
    return findings


def _check_passwords(*, threads: int, times: int) -> float:
    """Check the right password `times` times on each thread. Returns seconds."""
    stored = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(COST))
    barrier = threading.Barrier(threads + 1)

    def work() -> None:
        barrier.wait()
        for _ in range(times):
            bcrypt.checkpw(PASSWORD.encode(), stored)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for thread in workers:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in workers:
        thread.join()
    return time.perf_counter() - started
