"""Task families: T_lm (text), T_mem (facts), T_logic (checkable questions), T_meta (answers to judge)."""

from .families import SOURCES, Source, load
from .logic import FAMILIES, gsm8k, gsm8k_solutions, logic
from .meta import corrupt, judgements
from .split import Row, check_leaks


__all__ = [
    "FAMILIES",
    "SOURCES",
    "Row",
    "Source",
    "check_leaks",
    "corrupt",
    "gsm8k",
    "gsm8k_solutions",
    "judgements",
    "load",
    "logic",
]
