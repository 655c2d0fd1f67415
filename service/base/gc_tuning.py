"""The garbage collector of a process that serves."""

import gc


def spare_what_stays() -> None:
    """Have it leave alone what was made up to now, modules and all that is wired, which stays until the end.

    To go through all of that takes 60 ms, in which no thread does anything, and would be done about once a second under
    load: measured as the p99 of a health check, 70 ms with and 12 ms without.
    """
    gc.collect()
    gc.freeze()
