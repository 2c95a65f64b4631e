"""Tables of numbers as data, and their cells: mean and standard deviation over seeds, intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from studies.measures.continual import Interval


class Table(NamedTuple):
    """A heading, the names of the columns, and rows of as many cells."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_tables(path: Path, made_from: str, tables: Sequence[Table]) -> None:
    """Write tables as markdown: numbers alone, `made_from` names the records and the command."""
    parts = [f"# Tables\n\n{made_from}", *(f"## {t.heading}\n\n{t.markdown()}" for t in tables if t.rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return fmean(values) if values else math.nan


def mean_sd(values: Sequence[float] | None, digits: int = 3, sign: bool = False) -> str:
    """Mean ± standard deviation over seeds, without NaN; a dash for nothing, the mean alone for one seed.

    Example:
        >>> mean_sd([1.0, 2.0]), mean_sd([0.5], 2, sign=True), mean_sd([])
        ('1.500 ± 0.707', '+0.50', '-')
    """
    kept = [value for value in values or [] if not math.isnan(value)]
    if not kept:
        return "-"
    plus = "+" if sign else ""
    spread = f" ± {round(stdev(kept), 9):.{digits}f}" if len(kept) > 1 else ""
    return f"{round(fmean(kept), 9) + 0.0:{plus}.{digits}f}{spread}"


def interval(value: Interval | None, digits: int = 2, sign: bool = True) -> str:
    """Estimate and its 95 % interval; a dash for nothing."""
    if value is None or math.isnan(value.estimate):
        return "-"
    plus = "+" if sign else ""
    low = "-∞" if math.isinf(value.low) else f"{value.low:{plus}.{digits}f}"
    return f"{value.estimate:{plus}.{digits}f} [{low}, {value.high:{plus}.{digits}f}]"
