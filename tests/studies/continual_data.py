"""A data file of continual.py for a tokenizer of characters: three tasks of short questions, made without a network."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any


TASKS = ("memory", "logic", "meta")


def data(train: int = 24, tested: int = 6) -> dict[str, Any]:
    rng = random.Random(0)

    def items(task: str, count: int, start: int) -> list[list[str]]:
        if task == "memory":
            return [[f"m{n}", rng.choice("abcd") + rng.choice("efgh"), "facts"] for n in range(start, start + count)]
        if task == "logic":
            return [[f"{n}+{n % 3}", str(n + n % 3), "sums"] for n in range(start, start + count)]
        return [[f"{n}={n + n % 2}?", ("Yes", "No")[n % 2], "equals"] for n in range(start, start + count)]

    found: dict[str, Any] = {
        split: {task: items(task, count, start) for task in TASKS}
        for split, count, start in (("train", train, 0), ("validation", tested, 500), ("test", tested, 700))
    }
    words = ["tree", "river", "stone", "cloud", "bird", "grass"]
    text = lambda: " ".join(rng.choices(words, k=40))  # noqa: E731
    found["domains"] = {name: [text() for _ in range(2)] for name in ("one", "two")}
    found["calibration"] = [text() for _ in range(12)]
    found["tags"] = {task: [task] * (tested - 1) + ["meta"] for task in TASKS}
    return found


def write(path: Path) -> Path:
    path.write_bytes(gzip.compress(json.dumps(data()).encode(), mtime=0))
    return path
