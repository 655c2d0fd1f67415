"""Becomes another program that ends with its parent: ``postgres_child.py PARENT UID GID PROGRAM [ARG ..]``.

Owns the few steps between fork and exec: root's rights are dropped for good, and on Linux the kernel is told
to send SIGINT (to PostgreSQL: a fast shutdown) when the parent dies, however it dies. PARENT 0 asks for none.

A program and not a ``preexec_fn``: that one runs Python between fork and exec of a process that may have
threads, which can deadlock, and newer Pythons warn of it. It is run by its path under ``python -I -S``, so it
imports the standard library only, and all of it at the top: after the drop the library may lie out of reach.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def become(parent: int, uid: int, gid: int, command: list[str]) -> None:
    """Replaces this process; ends it with a message when that cannot be done, or the parent is gone."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # After the drop, because a change of user clears it; before the look at the parent, because one that died
    # earlier sends no signal any more.
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:
            sys.exit("the parent has ended")
    # Python ignores these two, and what is ignored stays so in the next program.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execv(command[0], command)  # noqa: S606  no shell is what is wanted
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    become(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
