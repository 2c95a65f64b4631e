"""What keeps the code base easy to find one's way in: no import circle, arrows downwards, small files, a lean wheel."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import peft_bundles


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peft_bundles"
# Folders and modules of the package from the ground up: a module imports what stands before it, or its own folder.
FLOORS = (
    ("extras", "registration", "taxonomy", "specs", "config"),
    ("core",),
    ("routing",),
    ("calibration", "reporting", "routers"),
    ("keys", "model"),
    ("objectives",),
    ("evaluation", "sharing", "trainer"),
    ("",),  # peft_bundles/__init__.py
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / line for line in listed.splitlines()]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere: in functions and under TYPE_CHECKING too."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            origin = ".".join(part for part in (base if node.level else "", node.module or "") if part)
            inside = {f"{origin}.{alias.name}" for alias in node.names}
            targets |= (inside & modules) or {origin}
    return (targets & modules) - {module_of(path)}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    paths = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    return {module: imports(path, set(paths)) for module, path in paths.items()}


def test_no_import_circle(graph):
    assert len(graph) > 50
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_a_circle_is_seen(graph):
    with pytest.raises(ValueError, match="cycle"):
        list(TopologicalSorter({**graph, "peft_bundles.config": {"peft_bundles.model"}}).static_order())


def test_arrows_point_downwards(graph):
    def floor(module: str) -> int:
        return FLOOR[module.removeprefix("peft_bundles").lstrip(".").split(".")[0]]

    upwards = [
        (module, target)
        for module, targets in graph.items()
        for target in targets
        if floor(target) > floor(module)
        or (
            floor(target) == floor(module)
            and module.split(".")[:2] != target.split(".")[:2]
            and len(module.split(".")) > 2
        )
    ]
    assert not upwards


def test_a_module_and_a_public_name_never_share_a_name():
    for info in [
        *pkgutil.walk_packages(peft_bundles.__path__, "peft_bundles."),
        pkgutil.ModuleInfo(None, "peft_bundles", True),
    ]:
        module = importlib.import_module(info.name)
        if not hasattr(module, "__path__"):
            continue
        for child in pkgutil.iter_modules(module.__path__):
            assert inspect.ismodule(getattr(module, child.name, sys)), f"{info.name}.{child.name} hides its module"


def test_no_file_is_two_ideas():
    long = {
        str(path.relative_to(ROOT)): n for path in tracked("*.py") if (n := len(path.read_text().splitlines())) > 500
    }
    assert not long


@pytest.mark.parametrize(
    "pattern, where",
    [
        (r"design\.md", "*.py"),
        (r"sys\.path(\.insert|\.append|\[)", "*.py"),
        (r"vars\((self\.)?(peft_)?config\)", "peft_bundles/*.py"),
        (r"torch\.load\(|pickle\.load|trust_remote_code=True", "peft_bundles/*.py"),
    ],
)
def test_what_the_code_does_without(pattern, where):
    allowed = {"tests/test_house.py", "studies/measures/code.py"}  # the last runs a program in a process of its own
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked(where)
        if str(path.relative_to(ROOT)) not in allowed
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not hits


def test_the_library_does_not_print():
    def prints(path: Path) -> list[int]:
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]

    assert not {str(path): lines for path in PACKAGE.rglob("*.py") if (lines := prints(path))}


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    library = tracked("peft_bundles/*", "peft_bundles_cli.py")
    assert sorted(names) == sorted(str(path.relative_to(ROOT)) for path in library)


# CPU seconds that importing the package takes once PyTorch, transformers and PEFT are loaded, and extras it loads.
IMPORT = """
import sys, time
import torch, transformers
from peft import PeftModel
start = time.process_time()
import peft_bundles
print(time.process_time() - start, *{"trl", "datasets", "typer", "sklearn", "matplotlib"} & sys.modules.keys())
"""


def test_importing_is_quick_and_loads_no_extra():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seconds = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", IMPORT], env=env, check=True, capture_output=True, text=True)
        first, *loaded = run.stdout.split()
        assert not loaded
        seconds.append(float(first))
    assert min(seconds) < 0.3
