"""Standard input, output and error of a command, whatever its caller has made of them."""

import io
import os
import sys


def prepare_streams() -> None:
    """Open /dev/null for each stream that the caller has closed, and let no character end the command.

    A closed one would be None in `sys`, and the next file or connection would get its number. Output that the encoding
    of the terminal does not have is escaped; input that it does not have becomes surrogates, see text.is_utf8.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003  the lowest free number is this
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  for good
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")
