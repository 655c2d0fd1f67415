"""The garbage collector of a server process."""

import gc


def freeze_startup_objects() -> None:
    """Exempt all objects that exist now (modules, wiring) from garbage collection, and turn it on.

    Until then it may be off: nothing that a start makes is garbage, and to look through it takes a fifth of the start.

    A full collection over them stops every thread, and happens about once a second under load. With it the measured p99
    of a health check was nearly six times as long.
    """
    gc.freeze()
    gc.enable()
