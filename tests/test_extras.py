"""What is not installed: one line with the pip command, and only where it is needed."""

import subprocess
import sys

import pytest

from peft_bundles.extras import require


# One process: importing torch takes longer than all of the checks.
WITHOUT_TRAIN = """
import importlib, sys
sys.modules.update(datasets=None, trl=None)
import peft_bundles, peft_bundles.routers.topics
for missing in ("datasets", "trl"):
    for package in ("peft_bundles.objectives", "peft_bundles.trainer"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            print(package, "|", error)
    sys.modules.pop(missing)
import peft_bundles.trainer
"""


def test_the_package_works_without_the_train_extra_and_its_parts_say_what_is_missing():
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TRAIN], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        f'{package} | {missing} is not installed; run: pip install "peft-bundles[train]"'
        for missing in ("datasets", "trl")
        for package in ("peft_bundles.objectives", "peft_bundles.trainer")
    ]


def test_a_module_that_is_installed_but_broken_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        require("half_installed", "train")
