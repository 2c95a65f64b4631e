"""Writes recipes/results/rl_separate.md and its picture from the runs in recipes/results/rl_separate/.

    python studies/rl_separate/report.py

A run is the `results.json` that recipes/rl_separate.py leaves, named VARIANT_FORWARD_RATE_SEED.json; the same seed on
another device has the device's name behind it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = {
    "reward": "reward",
    "exact": "exact",
    "preference": "prefers",
    "chosen_likelier": "likelier",
    "plays_loss": "LM loss",
    "manual_loss": "other text",
}
MAIN = ("separate", "owners", 5e-4)
LABELS = {
    MAIN: "bundles, a signal each; rows of text see only their own",
    ("separate", "all", 5e-4): "bundles, a signal each; rows of text see all",
    ("shared_adapter", "all", 2.5e-4): "control: one adapter, at its best rate",
    ("unrouted", "all", 5e-4): "control: the same bundles, every loss trains all",
}
SETTINGS = ("all on", "RL off", "preference off", "all off")
COLORS = ("#d94a10", "#f0a878", "#1f5fa8", "#7d8491")
Key = tuple[str, str, float]


def read() -> dict[Key, list[dict[str, Any]]]:
    """(variant, forward, learning rate) -> runs."""
    runs = defaultdict(list)
    for path in sorted((RESULTS / "rl_separate").glob("*.json")):
        run = json.loads(path.read_text())
        given = run["settings"]
        runs[given["variant"], given["forward"], given["training"]["learning_rate"]].append(run)
    return runs


def cell(values: list[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def numbers(runs: list[dict[str, Any]], setting: str) -> str:
    return " | ".join(cell([run["table"][setting][column] for run in runs]) for column in COLUMNS)


def table(label: str, runs: list[dict[str, Any]]) -> str:
    kept = [setting for setting in SETTINGS if setting in runs[0]["table"]]
    head = f"| {label} | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 1)}"
    return "\n".join([head, *(f"| {setting} | {numbers(runs, setting)} |" for setting in kept)])


def page(runs: dict[Key, list[dict[str, Any]]]) -> str:
    first = runs[MAIN][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    every = [run for found in runs.values() for run in found]
    devices = "; ".join(sorted({f"{run['device']}, {run['date'][:10]}" for run in every}))
    most = max(len(found) for found in runs.values())
    rates = "\n".join(
        f"| {variant}, {forward} | {rate:g} | {len(found)} | {numbers(found, 'all on')} |"
        for (variant, forward, rate), found in sorted(runs.items())
    )

    def value(key: Key, setting: str, column: str) -> str:
        return cell([run["table"][setting][column] for run in runs[key]])

    offs = ", ".join(f"{run['table']['RL off']['reward']:.2f}" for run in runs[MAIN])
    shared, alone, unrouted = ("shared_adapter", "all", 2.5e-4), ("separate", "all", 5e-4), ("unrouted", "all", 5e-4)
    return f"""# rl_separate: what came out

`python studies/rl_separate/report.py` writes this page from the runs in [`rl_separate/`](rl_separate/), which have
their settings, versions, promises and whole histories. {first["steps"]} steps with rows of all three kinds each,
{first["trainable_parameters"]:,} trainable parameters everywhere; {devices}; {versions}.
Mean ± standard deviation over 3 seeds, in the first table over {most} runs: seeds 0 and 2 ran once more on the other
device. What the columns mean is in [README.md](../README.md).

{(chr(10) * 2).join(table(label, runs[key]) for key, label in LABELS.items())}

![Reward, KL and held-out LM loss over steps](rl_separate.svg)

## What it says

- PPO learns: right answers from {value(MAIN, "all off", "exact")} (the base) to {value(MAIN, "all on", "exact")}.
- **What RL taught can be switched off.** With RL's bundles off {value(MAIN, "RL off", "exact")} exact answers are left,
  and of preferences {value(MAIN, "RL off", "preference")} of {value(MAIN, "all on", "preference")}. Without routing
  nothing can be: there the same switch leaves {value(unrouted, "RL off", "exact")} exact answers.
- The reward then is {value(MAIN, "RL off", "reward")} (by run: {offs}), the base's {value(MAIN, "all off", "reward")}:
  what the bundles of text and preferences alone make of the prompts.
- **It has a price.** Trained while the others were off, the bundles of text do not know them: with all on the LM loss
  is {value(MAIN, "all on", "plays_loss")}, with RL's off {value(MAIN, "RL off", "plays_loss")}, and one shared adapter
  has {value(shared, "all on", "plays_loss")}. Trained while all were on it is {value(alone, "all on", "plays_loss")},
  as low as the shared adapter's, but then RL's cannot be switched off: {value(alone, "RL off", "plays_loss")}.
  That is the choice which the forward table makes.
- **Separation alone does not make the final model better** than one adapter at its best rate: reward
  {value(MAIN, "all on", "reward")} against {value(shared, "all on", "reward")}, preference accuracy
  {value(MAIN, "all on", "preference")} against {value(shared, "all on", "preference")} (b_preference has a fifth of
  the rate here). What it buys is the rows below "all on".

## Learning rates that were tried

All on. Controls have one rate for everything; bundles of their own have multipliers (`rl_separate.yaml`).

| variant, forward | rate | runs | {" | ".join(COLUMNS.values())} |
|{"---|" * (len(COLUMNS) + 3)}
{rates}
"""


def draw(runs: dict[Key, list[dict[str, Any]]]) -> None:
    from matplotlib import pyplot

    pyplot.switch_backend("svg")
    pyplot.rcParams.update({"svg.hashsalt": "peft_bundles", "font.size": 9})
    panels = {
        "ppo/reward": "reward of rollouts",
        "ppo/kl_per_completion": "KL to the base, nats a completion",
        "held_out/all on": "held-out LM loss, all on",
        "held_out/RL off": "held-out LM loss, RL's bundles off",
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (measure, title) in zip(axes.flat, panels.items()):
        for color, (key, label) in zip(COLORS, LABELS.items()):
            for number, run in enumerate(runs[key]):
                points = [(entry["step"], entry[measure]) for entry in run["history"] if measure in entry]
                if points:
                    axis.plot(*zip(*points), color=color, linewidth=1.1, label=None if number else label)
        axis.set(title=title, xlabel="step")
    axes[0, 1].set_yscale("log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(RESULTS / "rl_separate.svg", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    found = read()
    (RESULTS / "rl_separate.md").write_text(page(found), encoding="utf-8")
    draw(found)
