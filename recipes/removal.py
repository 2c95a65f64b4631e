"""Removing a capability: setting a bundle's alpha to 0, against unlearning in a LoRA that was taught everything.

    python -m studies.quality.make_data --output data.json.gz                           # once, with a network
    python recipes/removal.py --data data.json.gz --workers 10 --seconds 150          # GPUs; repeat to continue

Three kinds of questions are taught at once; one of them, `forget`, is then removed. Bundles: one per kind, trained
either with only its own bundle on in a row ("owners") or with all on ("all"); then the forget kind's alpha is set to 0.
LoRA: gradient ascent on the forget set, the same with descent on the retain set, and steering of hidden states (after
RMU, Li et al. 2024). For comparison: the base model, and a LoRA that was never taught the forget set. Then a fresh LoRA
is trained on the removed facts, all or a part of them: how fast do they come back, and does what was not shown come
back too?

Several processes per GPU share the cells; each cell is appended to the output when it is done, and cells in the output
are not run again. `python -m studies.continual.report` makes the tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import transformers
import yaml

from studies import workers
from studies.data.smollm import model_folder
from studies.removal.run import work


def settings(argv: list[str] | None) -> dict[str, Any]:
    """The YAML with the command line over it.

    Raises:
        ValueError: `forget` is not taught, or it is the only kind taught.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--model", help="folder or Hub id of another Llama-like causal LM")
    parser.add_argument("--data", help="the file that studies.quality.make_data writes")
    parser.add_argument("--output", help="the file of cells")
    parser.add_argument("--scratch", help="folder for weights that cells share")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=3600.0, help="do not start a cell after this many seconds")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    flags = vars(parser.parse_args(argv))
    config = yaml.safe_load(flags.pop("config").read_text()) | {k: v for k, v in flags.items() if v is not None}
    if config["forget"] not in config["rows"] or len(config["rows"]) < 2:
        raise ValueError(f"forget: {config['forget']!r} must be one of rows, {[*config['rows']]}, and not all.")
    if config["data"] is None:
        raise ValueError("data: make the file with `python -m studies.quality.make_data` and give --data FILE.")
    config["model"] = config["model"] or str(model_folder())
    return config


def main(argv: list[str] | None = None) -> None:
    config, flags = settings(argv), sys.argv[1:] if argv is None else argv
    config["command"] = " ".join(["recipes/removal.py", *flags])
    if "worker" in config:
        return work(config)
    config["until"] = time.time() + config["seconds"]
    workers.clear(Path(config["scratch"]) / "claims")
    if config["workers"] == 1:
        return work(config | {"worker": 0})
    sys.exit(workers.start([__file__, *flags, "--until", str(config["until"])], config["workers"]))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
