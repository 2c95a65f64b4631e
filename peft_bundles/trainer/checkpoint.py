"""Checkpoints of `BundleTrainer`: complete or not there at all, and refused where they belong to another run.

Beside transformers' own files a checkpoint has `run.json` (what must not differ on resuming), `heads.safetensors`
(value heads), `trunk.safetensors` (a trained trunk and its projectors) and, for every process, `objectives-<rank>`
(rollouts, coefficients). Nothing that is read back is executed.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints


if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer as _Base
else:
    _Base = object

STAGING = ".saving"  # not matched by transformers when it looks for the last checkpoint
# Filled in while saving and loading, compared by PEFT's loading with a tolerance, or different on another machine.
_NOT_COMPARED = {
    "weights_digest",
    "basis_fingerprint",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "peft_version",
}


class CheckpointMixin(_Base):
    """Saving and resuming for `BundleTrainer`."""

    _staging = False

    def _run_description(self: Any) -> dict[str, Any]:
        config = {k: v for k, v in asdict(self.bundle_config).items() if k not in _NOT_COMPARED}
        if config["calibration"]:  # a share that rounding may move on another machine
            config["calibration"].pop("outliers")
        described = {
            "bundle config": config,
            "objectives": {name: list(o.signals) for name, o in self.objectives.items()},
            "mixing": [self.args.mixing, self.args.mixing_weights],
            "forward table": self.forward.table,
            "topics": self.args.topics,
            "trunk": [self.args.trunk, self.args.trunk_ranks],
            "seed": self.args.seed,
        }
        return json.loads(json.dumps(described, default=str))

    # ---- saving ----

    def _get_output_dir(self: Any, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        """transformers' own into a folder beside, then one rename: what is named a checkpoint is complete."""
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / STAGING, ignore_errors=True)  # of a run that was killed
            (run / STAGING / name).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self._save_objectives(run / STAGING / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = self.state.best_global_step
            if best and ((run / f"{PREFIX_CHECKPOINT_DIR}-{best}").exists() or best == self.state.global_step):
                # transformers looked for it in the staging folder.
                self.state.best_model_checkpoint = str(run / f"{PREFIX_CHECKPOINT_DIR}-{best}")
                self.state.save_to_json(str(run / STAGING / name / TRAINER_STATE_NAME))
            if (run / name).exists():
                (run / name).rename(run / STAGING / "old")
            (run / STAGING / name).rename(run / name)
            shutil.rmtree(run / STAGING)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        (folder / "run.json").write_text(json.dumps(self._run_description(), indent=1))
        heads = {
            f"{name}.{key}": value.contiguous()
            for name, objective in self.objectives.items()
            if (head := objective.head()) is not None
            for key, value in head.state_dict().items()
        }
        if heads:
            save_file(heads, folder / "heads.safetensors")
        if self.args.trunk == "full":
            tensors = {f"weight.{name}": p.detach().contiguous() for name, p in self.trunk.parameters.items()}
            tensors |= {f"projector.{name}": p.contiguous() for name, p in self.trunk.state_dict().items()}
            save_file(tensors, folder / "trunk.safetensors")

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        with self.optimizer.optimizer.gathered() if self.zero_stage is not None else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)  # by all processes; one of them writes

    def _save_objectives(self: Any, folder: Path) -> None:
        tensors, values = {}, {}
        for name, objective in self.objectives.items():
            for key, value in objective.state_dict().items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}.{key}"] = value.contiguous()
                else:
                    values[f"{name}.{key}"] = value
        stem = f"objectives-{self.accelerator.process_index}"
        save_file(tensors, folder / f"{stem}.safetensors", {"values": json.dumps(values)})

    # ---- resuming ----

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        """transformers' own, after comparing the run; then heads, trunk and objectives.

        Raises:
            ValueError: the checkpoint is of a run with another config, objectives, tables or number of processes.
        """
        folder = Path(resume_from_checkpoint)
        if not (folder / "run.json").is_file():
            raise ValueError(f"{folder} is no checkpoint of a BundleTrainer: run.json is missing.")
        saved, mine = json.loads((folder / "run.json").read_text()), self._run_description()
        for what, value in mine.items():
            if saved.get(what) != value:
                raise ValueError(
                    f"{folder} was saved by a run with another {what}: {_difference(saved.get(what), value)}. Resume "
                    "with the settings it was made with, or start a new output_dir."
                )
        state = folder / f"objectives-{self.accelerator.process_index}.safetensors"
        count = len(list(folder.glob("objectives-*.safetensors")))
        if count != self.accelerator.num_processes:
            raise ValueError(
                f"{folder} was saved by {count} process(es), but {self.accelerator.num_processes} run now; resume "
                "with as many."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_extras(folder)
        tensors, values = load_file(state), _values(state)
        for name, objective in self.objectives.items():
            mark = f"{name}."
            found = {k.removeprefix(mark): v for k, v in {**tensors, **values}.items() if k.startswith(mark)}
            objective.load_state_dict(found)

    def _load_best_model(self: Any) -> None:
        super()._load_best_model()
        self._load_extras(Path(self.state.best_model_checkpoint))

    def _load_extras(self: Any, folder: Path) -> None:
        heads = load_file(folder / "heads.safetensors") if (folder / "heads.safetensors").is_file() else {}
        for name, objective in self.objectives.items():
            if (head := objective.head()) is not None:
                head.load_state_dict(
                    {k.removeprefix(f"{name}."): v for k, v in heads.items() if k.startswith(f"{name}.")}
                )
        if self.args.trunk != "full":
            return
        tensors = load_file(folder / "trunk.safetensors")
        with torch.no_grad():
            for name, parameter in self.trunk.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
        projectors = {k.removeprefix("projector."): v for k, v in tensors.items() if k.startswith("projector.")}
        step = json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"]
        self.trunk.load_state_dict(projectors, step)


def _values(file: Path) -> dict[str, Any]:
    """The plain values that were saved in a safetensors file's metadata."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["values"])


def _difference(saved: Any, mine: Any, where: str = "") -> str:
    """The first place where two JSON values differ."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        for key in [*mine, *(k for k in saved if k not in mine)]:
            if saved.get(key) != mine.get(key):
                return _difference(saved.get(key), mine.get(key), f"{where}.{key}" if where else str(key))
    return f"{where + ' ' if where else ''}was {saved!r}, is {mine!r}"
