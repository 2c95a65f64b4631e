"""Records of runs: JSON with what made it (versions, device, date, command, commit), written whole or not at all."""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("torch", "transformers", "peft", "peft_bundles")
Record = dict[str, Any]


def made_by(command: str, *packages: str, device: Any = None) -> Record:
    """What a record says of its origin.

    Args:
        command: the program with its flags.
        packages: beside `PACKAGES`, whose versions matter.
        device: where it ran; by default the current GPU, or the CPU where there is none.

    Returns:
        {"command", "date" (UTC), "versions", "device", "commit" (None outside a checkout)}.

    Example:
        >>> sorted(made_by("python program.py", device="cpu"))
        ['command', 'commit', 'date', 'device', 'versions']
    """
    modules = {name: importlib.import_module(name) for name in (*PACKAGES, *packages)}
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: module.__version__ for name, module in modules.items()},
        "device": device_name(device),
        "commit": commit(),
    }


def device_name(device: Any = None) -> str:
    """The GPU's name, or the CPU with the number of threads."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


@functools.cache
def commit() -> str | None:
    """The checkout's commit; with "+" behind it where files were changed since."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def append(path: Path, record: Record) -> None:
    """Add a line to a file of records. It is one write, so lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())


def write(path: Path, record: Record) -> None:
    """Write a file with one record, through a temporary file: a failed run leaves the earlier one."""
    write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def read(path: Path) -> list[Record]:
    """The records of a file with one a line; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def done(path: Path, key: Callable[[Record], Hashable]) -> set[Hashable]:
    """The keys of the records without an error: what need not run again."""
    return {key(record) for record in read(path) if "error" not in record}
