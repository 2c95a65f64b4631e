"""Checkpoints of a run: complete or absent, and refused by a run with other settings.

Beside transformers' own files a checkpoint has

- `run.json`: the settings that must not differ when the run is resumed,
- `heads.safetensors`: value heads and other parameters of objectives,
- `trunk.safetensors`: a trunk that is trained, and its projectors,
- `objectives-<rank>.safetensors`, one for every process: rollouts and adaptive coefficients.

Nothing that is read back is executed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME

from ..config import BundleConfig
from ..objectives.base import Objective
from .trunk import TrunkProjection


STAGING = ".saving"  # transformers does not match this name when it looks for the last checkpoint
# Settings that runs of earlier versions did not save.
SINCE_0_3 = {"per_device_train_batch_size or rows", "gradient_accumulation_steps", "number of training rows"}
# Fields that saving and loading fill in, that PEFT compares with a tolerance, or that differ between machines.
NOT_COMPARED = {
    "weights_digest",
    "format_version",
    "basis_fingerprint",
    "base_fingerprint",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "keys",
}


def comparable(config: BundleConfig) -> dict[str, Any]:
    """The fields of a config that must be equal in a run and in the checkpoint that it resumes."""
    fields = {name: value for name, value in asdict(config).items() if name not in NOT_COMPARED}
    if fields["calibration"]:
        fields["calibration"].pop("outliers")  # a share of tokens; rounding may move it on another machine
    return fields


@contextmanager
def staged(run: Path, name: str, writes: bool) -> Iterator[Path]:
    """A folder to write a checkpoint into. It gets its name, in one rename, when the block ends without an error.

    A save that is killed therefore leaves the last complete checkpoint as it was.

    Args:
        run: the run's folder.
        name: of the checkpoint in it.
        writes: whether this process makes the folder and renames it. Processes wait for each other outside this.
    """
    folder = run / STAGING / name
    if writes:
        shutil.rmtree(run / STAGING, ignore_errors=True)  # left by a save that was killed
        folder.mkdir(parents=True)
    yield folder
    if writes:
        if (run / name).exists():
            (run / name).rename(run / STAGING / "old")
        folder.rename(run / name)
        shutil.rmtree(run / STAGING)


@dataclass
class RunState:
    """What a run adds to transformers' checkpoints.

    Args:
        settings: settings that must be equal on resuming: name (for errors) -> value.
        objectives: by name.
        trunk: the trunk, if it is trained; None if it is frozen.
        rank, processes: this process, and how many there are.
    """

    settings: Mapping[str, Any]
    objectives: Mapping[str, Objective]
    trunk: TrunkProjection | None
    rank: int
    processes: int

    def __post_init__(self) -> None:
        # As they come back from a file: tuples and sets as lists, so that a run equals its own checkpoint.
        self.settings = json.loads(json.dumps(self.settings, default=_plain))

    # ---- saving ----

    def save_weights(self, folder: Path) -> None:
        """Write settings, heads and trunk; called in one process."""
        (folder / "run.json").write_text(json.dumps(self.settings, indent=1))
        heads = {
            f"{name}.{key}": value.contiguous()
            for name, objective in self.objectives.items()
            if (head := objective.head()) is not None
            for key, value in head.state_dict().items()
        }
        if heads:
            save_file(heads, folder / "heads.safetensors")
        if self.trunk is not None:
            tensors = {f"weight.{name}": p.detach().contiguous() for name, p in self.trunk.parameters.items()}
            tensors |= {f"projector.{name}": p.contiguous() for name, p in self.trunk.state_dict().items()}
            save_file(tensors, folder / "trunk.safetensors")

    def save_objectives(self, folder: Path) -> None:
        """Write the state of this process's objectives; called in every process."""
        tensors, values = {}, {}
        for name, objective in self.objectives.items():
            for key, value in objective.state_dict().items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}.{key}"] = value.contiguous()
                else:
                    values[f"{name}.{key}"] = value
        save_file(tensors, self._objectives_file(folder), {"values": json.dumps(values)})

    def _objectives_file(self, folder: Path) -> Path:
        return folder / f"objectives-{self.rank}.safetensors"

    # ---- resuming ----

    def check(self, folder: Path) -> None:
        """Compare a checkpoint with this run, before anything is loaded.

        Raises:
            ValueError: another trainer saved it, or a run with other settings or another number of processes.
        """
        if not (folder / "run.json").is_file():
            raise ValueError(
                f"{folder} has no run.json, so BundleTrainer did not save it; give a checkpoint of a BundleTrainer."
            )
        saved = json.loads((folder / "run.json").read_text())
        if not isinstance(saved, dict):
            raise ValueError(f"{folder / 'run.json'} is damaged: it holds no settings.")
        for setting, value in self.settings.items():
            if saved.get(setting) != value and (setting in saved or setting not in SINCE_0_3):
                raise ValueError(
                    f"{folder} was saved by a run with another {setting}: {_difference(saved.get(setting), value)}. "
                    "Resume with the settings of that run, or start a new run in another output_dir."
                )
        count = len(list(folder.glob("objectives-*.safetensors")))
        if count != self.processes:
            raise ValueError(
                f"{folder} was saved by {count} process(es), but {self.processes} run now; resume with {count}."
            )

    def load_weights(self, folder: Path) -> None:
        """Load heads and trunk."""
        heads = load_file(folder / "heads.safetensors") if (folder / "heads.safetensors").is_file() else {}
        for name, objective in self.objectives.items():
            if (head := objective.head()) is not None:
                head.load_state_dict(_below(heads, f"{name}."))
        if self.trunk is None:
            return
        tensors = load_file(folder / "trunk.safetensors")
        weights = _below(tensors, "weight.")
        with torch.no_grad():
            for name, parameter in self.trunk.parameters.items():
                parameter.copy_(weights[name])
        step = json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"]
        self.trunk.load_state_dict(_below(tensors, "projector."), step)

    def load_objectives(self, folder: Path) -> None:
        """Load the state of this process's objectives."""
        file = self._objectives_file(folder)
        with safe_open(file, "pt") as opened:
            values = json.loads(opened.metadata()["values"])
        state = {**load_file(file), **values}
        for name, objective in self.objectives.items():
            objective.load_state_dict(_below(state, f"{name}."))


def _plain(value: Any) -> Any:
    """A value that JSON has no type for; a set is sorted, because its order differs between processes."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _below(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def _difference(saved: Any, current: Any, where: str = "") -> str:
    """The first place where two JSON values differ."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in [*current, *(k for k in saved if k not in current)]:
            if saved.get(key) != current.get(key):
                return _difference(saved.get(key), current.get(key), f"{where}.{key}" if where else str(key))
    return f"{where + ' ' if where else ''}was {saved!r}, is {current!r}"
