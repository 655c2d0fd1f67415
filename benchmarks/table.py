"""What a measurement yields, and how it is shown: one table, and notes under it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_HEAD = ("figure", "bar", "measured", "")


class MeasurementError(Exception):
    """Something that was to be measured did not work. The text says what."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    label: str
    bar: str
    measured: str
    is_met: bool | None
    """None: not measured."""


@dataclass(slots=True)
class Findings:
    """What one measurement found."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def at_most(self, label: str, value: float, bar: float, *, unit: str = "", digits: int = 2) -> None:
        """A figure that must not be higher than its bar."""
        self._add(label, value, f"<= {bar:g}{unit}", unit, digits, is_met=value <= bar)

    def at_least(self, label: str, value: float, bar: float, *, unit: str = "", digits: int = 2) -> None:
        """A figure that must not be lower than its bar."""
        self._add(label, value, f">= {bar:g}{unit}", unit, digits, is_met=value >= bar)

    def note(self, text: str) -> None:
        """A line under the table."""
        self.notes.append(text)

    def _add(self, label: str, value: float, bar: str, unit: str, digits: int, *, is_met: bool) -> None:
        self.figures.append(Figure(label, bar, f"{value:.{digits}f}{unit}", is_met))


def spread(values: Sequence[float], *, scale: float = 1, unit: str = "", digits: int = 0) -> str:
    """Median, and the range of all values."""
    low, middle, high = (
        f"{value * scale:.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle}{unit} ({low}-{high})"


def format_table(figures: Sequence[Figure]) -> str:
    """The table, in columns of equal width."""
    verdicts = {True: "met", False: "NOT MET", None: "not measured"}
    rows = [_HEAD, *((figure.label, figure.bar, figure.measured, verdicts[figure.is_met]) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
