"""Six topic bundles on real text: how much each one helps its own topic, and the others.

    python recipes/semantic.py --prepare topics.json.gz                      # once, with a network
    python recipes/semantic.py --data topics.json.gz --model FOLDER          # a GPU; --resume continues
    python recipes/semantic.py --smoke                                       # two CPU cores

Every cell of the sweep in semantic.yaml trains fresh bundles and appends one line to cells.jsonl: the held-out loss of
every topic with each bundle alone, with all and with none. What the tables mean is in README.md.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
import yaml
from rich import print
from rich.table import Table

from peft_bundles.routers.topics import TopicRouting
from peft_bundles.taxonomy import TOPICS
from studies import records
from studies.data.smollm import model_folder
from studies.semantic.cells import run_cell
from studies.semantic.report import draw, spread, sweeps
from studies.semantic.texts import load_texts, own_samples, read_texts, write_texts


FIXED = (  # what makes two cells the same
    *("seed", "topics", "overlap", "size", "rank", "signal_rank", "mask", "gate_forward", "tau"),
    *("steps", "rows", "length", "learning_rate", "warmup", "max_grad_norm", "calibration", "test_rows", "model"),
)


# ---- settings ----


def settings(argv: list[str] | None) -> dict[str, Any]:
    """The YAML with the command line over it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--model", help="folder or Hub id of another causal LM")
    parser.add_argument("--data", help="a file that --prepare has written")
    parser.add_argument("--prepare", help="write the texts to this file and stop", metavar="FILE")
    parser.add_argument("--output", help="folder for cells.jsonl and the plots")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to use instead of the sweep's")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the sweep's settings, from 0")
    parser.add_argument("--smoke", action="store_true", help="two small cells on the CPU")
    parser.add_argument("--resume", action="store_true", help="skip the cells that cells.jsonl already has")
    flags = vars(parser.parse_args(argv))
    config = yaml.safe_load(flags.pop("config").read_text())
    smoke = config.pop("smoke")
    if flags["smoke"]:
        config |= smoke
    sweep = config["sweep"]
    if (seeds := flags.pop("seeds")) is not None:
        sweep["seeds"] = seeds
    if (only := flags.pop("only")) is not None:
        if not all(0 <= n < len(sweep["cells"]) for n in only):
            raise ValueError(f"--only {only}: the sweep has {len(sweep['cells'])} settings, from 0.")
        sweep["cells"] = [sweep["cells"][n] for n in only]
    config |= {"prepare": None, **{name: value for name, value in flags.items() if value is not None}}
    for cell in sweep["cells"]:
        if unknown := sorted(set(cell) - set(FIXED[:-1])):  # the model is loaded once
            raise ValueError(f"sweep cell {cell} names {unknown}; a cell replaces some of {', '.join(FIXED[:-1])}.")
    return config


# ---- results ----


def show(record: dict[str, Any]) -> None:
    """The matrix of one cell: the loss without topic bundles, and how each one, or all, change it."""
    matrix, cell = record["matrix"], record["cell"]
    topics = [topic for topic in matrix if topic != "other"]
    title = ", ".join(f"{k}={v}" for k, v in cell.items()) or "default"
    names = [topic[:6] for topic in topics]  # it has to fit 80 columns
    drawn = Table("loss", "base", "none", *names, "all", padding=(0, 0), title=f"{title}, seed {record['seed']}")
    for topic, row in matrix.items():
        differences = [f"{row[c] - row['none']:+.3f}" for c in (*topics, "all")]
        drawn.add_row(topic[:6], f"{row['base']:.3f}", f"{row['none']:.3f}", *differences)
    print(drawn)


def show_sweeps(cells: list[dict[str, Any]], folder: Path) -> None:
    """Tables and plots of every knob that has more than one value."""
    for knob, values in sweeps(cells).items():
        drawn = Table(knob, *next(iter(values.values())), title=f"change of held-out loss against none, by {knob}")
        for value, row in values.items():
            drawn.add_row(str(value), *(f"{fmean(runs):+.3f} ± {spread(runs):.3f}" for runs in row.values()))
        print(drawn)
    draw(cells, folder)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    config = settings(argv)
    if config["prepare"] is not None:
        write_texts(read_texts(config["texts"]), Path(config["prepare"]))
        print(f"wrote {config['prepare']}")
        return []
    output = Path(config["output"])
    command = " ".join(["recipes/semantic.py", *(sys.argv[1:] if argv is None else argv)])
    cells_file = output / "cells.jsonl"
    cells = records.read(cells_file)
    if cells and not config["resume"]:
        raise ValueError(f"{cells_file} has {len(cells)} cells; give --resume, or another --output.")
    sweep = [(cell, seed) for cell in config["sweep"]["cells"] for seed in config["sweep"]["seeds"]]
    planned = [(cell, seed, {k: ({**config, **cell, "seed": seed})[k] for k in FIXED}) for cell, seed in sweep]
    for _, _, setting in planned:  # check all settings before running any
        TopicRouting(["any"], setting["mask"])
        if not 2 <= setting["topics"] <= len(TOPICS):
            raise ValueError(f"topics: {setting['topics']!r} must be from 2 to {len(TOPICS)}.")
    missing = [plan for plan in planned if plan[2] not in [record["settings"] for record in cells]]
    if missing:
        source = config["model"] or str(model_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        device = "cuda" if torch.cuda.is_available() and not config["smoke"] else "cpu"
        base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).eval()
        base.requires_grad_(False)
        texts = load_texts(Path(config["data"])) if config["data"] else read_texts(config["texts"])
        own = own_samples(base, tokenizer, config["calibration"]["own"], config["calibration"]["max_length"])
    for number, (cell, seed, setting) in enumerate(missing):
        record = {"cell": cell, "seed": seed, **run_cell({**config, **setting}, base, tokenizer, texts, own)}
        record |= {"settings": setting, **records.made_by(command, device=device)}
        records.append(cells_file, record)
        cells.append(record)
        show(record)
        print(f"cell {number + 1} of {len(missing)}: {record['seconds']:.0f} s")
    selected = [record for record in cells if record["settings"] in [plan[2] for plan in planned]]
    if not missing:
        show(selected[0])
    show_sweeps(selected, output)
    print(f"recorded in {cells_file}")
    return selected


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers for it
    main()
