"""The results of the measurements: a table of figures and notes below it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_HEAD = ("figure", "bar", "measured", "")


class MeasurementError(Exception):
    """A measurement failed."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the table."""

    label: str
    bar: str
    measured: str
    is_met: bool | None
    """None: not measured."""


@dataclass(slots=True)
class Findings:
    """The results of one measurement."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def at_most(self, label: str, value: float, bar: float, *, unit: str = "", digits: int = 2) -> None:
        """Add a figure that must not exceed its bar."""
        self._add(label, value, f"<= {bar:g}{unit}", unit, digits, is_met=value <= bar)

    def at_least(self, label: str, value: float, bar: float, *, unit: str = "", digits: int = 2) -> None:
        """Add a figure that must reach its bar."""
        self._add(label, value, f">= {bar:g}{unit}", unit, digits, is_met=value >= bar)

    def note(self, text: str) -> None:
        """Add a line below the table."""
        self.notes.append(text)

    def _add(self, label: str, value: float, bar: str, unit: str, digits: int, *, is_met: bool) -> None:
        self.figures.append(Figure(label, bar, f"{value:.{digits}f}{unit}", is_met))


def spread(values: Sequence[float], *, scale: float = 1, unit: str = "", digits: int = 0) -> str:
    """Format the median and the range of the values."""
    low, middle, high = (
        f"{value * scale:.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle}{unit} ({low}-{high})"


def format_table(figures: Sequence[Figure]) -> str:
    """Format the table, with aligned columns."""
    verdicts = {True: "met", False: "NOT MET", None: "not measured"}
    rows = [_HEAD, *((figure.label, figure.bar, figure.measured, verdicts[figure.is_met]) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
