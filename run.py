#!/usr/bin/env python3
"""Set up and run: `python3 run.py demo` (the main job), `test` (lint, types, tests), `peft` or `compat`.

`peft` runs PEFT's own tests with bundles, and `compat` the tests with other releases of the companions.

Needs Python >= 3.10 with pip and venv, and nothing else: it makes its own virtual environment in `.venv`, and installs
the versions of `constraints.txt`. Torch goes first: left to another package's requirement, pip would take the newest.
Anything after the command is handed on: `python3 run.py demo --steps 20`, `python3 run.py test -k alphas`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts" if os.name == "nt" else "bin") / "python"
EXTRAS = {"demo": "demo", **dict.fromkeys(("test", "peft", "compat"), "dev,app,demo,docs,studies")}
SCRIPTS = {"demo": "examples/quickstart.py", "peft": ".ci/peft_suite.py", "compat": ".ci/compat.py"}


def run(*command: str, **env: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run([str(PYTHON), "-m", *command], cwd=ROOT, env={**os.environ, **env}, check=True)


def install(extras: str) -> None:
    """Make the environment once; pip finds it complete in a few seconds on later runs."""
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    constraints = (ROOT / "constraints.txt").read_text().split()
    torch = next(line for line in constraints if line.startswith("torch=="))
    quiet = ("pip", "install", "--quiet", "--disable-pip-version-check")
    run(*quiet, torch)
    # compat: the whole checkout is importable, so that recipes and examples find `studies`, which is not in the wheel.
    run(*quiet, "-c", "constraints.txt", "-e", f".[{extras}]", "--config-settings", "editable_mode=compat")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in EXTRAS:
        sys.exit(f"usage: {Path(sys.argv[0]).name} {{{'|'.join(EXTRAS)}}} [options]")
    task, options = sys.argv[1], sys.argv[2:]
    install(EXTRAS[task])
    try:
        if task in SCRIPTS:
            subprocess.run([str(PYTHON), SCRIPTS[task], *options], cwd=ROOT, check=True)
            return
        run("ruff", "check", ".")
        run("ruff", "format", "--check", ".")
        run("mypy")
        # One thread a worker: two processes with two threads each fight over two cores.
        run("pytest", "-q", "-n", str(min(os.cpu_count() or 1, 8)), *options, OMP_NUM_THREADS="1")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
