"""Several processes that share the cells of a study: a cell belongs to the process that first makes its claim file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def claim(path: Path) -> bool:
    """Claim a cell; False where another process has it."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def clear(folder: Path) -> Path:
    """An empty folder for claims."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    return folder


def device_of(worker: int, cpu: bool = False) -> torch.device:
    """The device of a worker: the GPUs in turn, with TF32 products, or the CPU."""
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device(f"cuda:{worker % torch.cuda.device_count()}")
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    return device


def start(program: Sequence[str], count: int) -> int:
    """Run `python PROGRAM... --worker N` for every N below `count`, side by side; the largest exit status.

    `accelerate launch` may have started the caller: its process group is not the workers'.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    processes = [
        subprocess.Popen([sys.executable, *program, "--worker", str(n)], env={**kept, "OMP_NUM_THREADS": "1"})
        for n in range(count)
    ]
    return max(process.wait() for process in processes)
