"""Does ZeRO-2 leave a weight alone that no gradient has reached? One JSON record, seconds on a CPU (needs deepspeed).

    DS_ACCELERATOR=cpu python benchmarks/deepspeed_zero2.py --output benchmarks/results/deepspeed_zero2.json

Two weights, AdamW without decay; two steps on a loss of the first, then two on a loss of the second. Stage 0 is plain
torch, as a yardstick. It does not, which is why `BundleTrainer` steps ZeRO's groups itself (trainer/zero.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor, which: str) -> torch.Tensor:
        return getattr(self, which)(x).square().mean()


def movements(engine: Any, model: Two, backward: Any, step: Any) -> list[dict[str, Any]]:
    """Each step's loss, and how far each weight moved."""
    found = []
    for which in ("first", "first", "second", "second"):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        backward(engine(torch.ones(2, 16), which))
        step()
        moved = {n.split(".")[0]: float((p.detach() - before[n]).norm()) for n, p in model.named_parameters()}
        found.append({"loss_of": which, "moved": moved})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29500")
    import deepspeed

    found = {}
    for stage in (0, 2):
        model = Two()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        if stage == 0:

            def plain(optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            found[str(stage)] = movements(model, model, lambda loss: loss.backward(), plain)
            continue
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        found[str(stage)] = movements(engine, engine.module, engine.backward, engine.step)
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        "device": os.environ.get("DS_ACCELERATOR", "default"),
        "stages": found,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
