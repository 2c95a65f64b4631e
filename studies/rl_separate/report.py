"""Numbers, tables and figures of rl_separate.py's runs.

    python -m studies.rl_separate.report     # writes tables.md beside this file, and recipes/results/rl_separate.svg

A run is the results.json that recipes/rl_separate.py leaves, named VARIANT_FORWARD_RATE_SEED.json; the same seed on
another device has the device's name behind it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from studies.tables import Table, mean_sd, write_tables


RESULTS = Path("recipes/results")  # in a checkout
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
Key = tuple[str, str, float]  # variant, bundles on in rows of text, learning rate
Run = dict[str, Any]


def read(folder: Path) -> dict[Key, list[Run]]:
    """The runs of a folder by their key."""
    runs = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        setting = run["settings"]
        runs[setting["variant"], setting["forward"], setting["training"]["learning_rate"]].append(run)
    return runs


def numbers(runs: list[Run], setting: str) -> list[str]:
    """A cell of every column under one setting of the alphas."""
    return [mean_sd([run["table"][setting][column] for run in runs]) for column in COLUMNS]


def tables(runs: dict[Key, list[Run]]) -> list[Table]:
    """A table of every label, setting by setting; and one of all rates that were tried, all on."""
    made = []
    for key, label in LABELS.items():
        if found := runs.get(key):
            rows = [[name, *numbers(found, name)] for name in SETTINGS if name in found[0]["table"]]
            made.append(Table(f"{label} ({len(found)} runs)", ["alphas", *COLUMNS.values()], rows))
    rates = [
        [f"{variant}, {forward}", f"{rate:g}", str(len(found)), *numbers(found, "all on")]
        for (variant, forward, rate), found in sorted(runs.items())
    ]
    return [*made, Table("Learning rates, all on", ["variant, forward", "rate", "runs", *COLUMNS.values()], rates)]


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Reward, KL, held-out LM loss and the loss of every signal over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = sorted({key for entry in history for key in entry if key.startswith("loss/")})
    held = list(dict.fromkeys(key for entry in history for key in entry if key.startswith("held_out/")))
    panels = {"reward": ["ppo/reward"], "KL to the base, nats a completion": ["ppo/kl_per_completion"]}
    panels |= {"held-out LM loss": held, "training loss": losses}
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels.items()):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axis.plot(*zip(*points), marker=".", label=key.split("/", 1)[1])
        axis.set(title=title, xlabel="step")
        if keys is losses:
            axis.set_yscale("symlog", linthresh=1e-3)  # from 4 for text to 1e-3 for PPO's
        if len(keys) > 1:
            axis.legend(fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    figure.savefig(path.with_suffix(".svg"))
    pyplot.close(figure)


def draw(runs: dict[Key, list[Run]], path: Path) -> None:
    """Every seed of `LABELS` over steps."""
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
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    runs = read(RESULTS / "rl_separate")
    made_from = f"`python -m studies.rl_separate.report` from `{RESULTS}/rl_separate/` (`recipes/rl_separate.py`)."
    write_tables(Path(__file__).with_name("tables.md"), made_from, tables(runs))
    draw(runs, RESULTS / "rl_separate.svg")
