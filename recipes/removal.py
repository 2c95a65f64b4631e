"""Taking a capability out again: a bundle's alpha set to 0, against unlearning a LoRA that was taught everything.

    python studies/quality/make_data.py --output data.json.gz                           # once, with a network
    python recipes/removal.py --data data.json.gz --workers 10 --seconds 150          # GPUs; another call goes on

Three kinds of questions are taught at once; one of them, `forget`, is then removed. Bundles: one a kind, trained either
with only the own one on in a row ("owners") or with all on ("all"), and the forget kind's alpha set to 0. LoRA:
gradient ascent on the forget set, the same with descent on the retain set, and steering of hidden states (after RMU,
Li et al. 2024). Beside them the base, and a LoRA that was never taught the forget set. Then a fresh LoRA is trained on
the removed facts, all or a part of them: how fast do they come back, and does what was not shown come back too?

Cells are run side by side by several processes a GPU, each appended to the output as it is done; cells that are there
already are not run again. `studies/continual/report.py` makes the section of docs/study.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from studies.data import smollm as _data
from studies.quality.make_data import load
from studies.quality.methods import Built, _trunk, build_bundles
from studies.quality.run import DOMAIN_LENGTH, Rows, rows_of, tokens_of
from studies.removal.methods import kinds_of, lora, lora_weights, measure, relearn, teach, unlearn


WITHOUT_LORA = ("owners", "all", "never", "base")  # cells that do not begin with the LoRA that was taught everything


# ---- cells ----


class Study:
    """What all cells of one process share."""

    def __init__(self, given: dict[str, Any], device: torch.device) -> None:
        self.given, self.device = given, device
        self.tokenizer = AutoTokenizer.from_pretrained(given["model"])
        self.base: Any = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32).to(device).eval()
        self.base.requires_grad_(False)
        data = load(Path(given["data"]))
        self.pools = kinds_of(data, "train", given, self.tokenizer)
        tests = kinds_of(data, "test", given, self.tokenizer)
        self.tests = {f"facts/{kind}": rows_of(items, DOMAIN_LENGTH).to(device) for kind, items in tests.items()}
        for name, texts in data["domains"].items():
            items = [tokens_of(self.tokenizer, text) for text in texts[: given["text_rows"]]]
            self.tests[f"text/{name}"] = rows_of(items, DOMAIN_LENGTH).to(device)
        texts = [text for some in zip(*data["calibration"].values()) for text in some]
        self.calibration = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    @property
    def test(self) -> Rows:
        return self.tests[f"facts/{self.given['forget']}"]

    def measured(self, built: Built) -> dict[str, Any]:
        return measure(built, self.base, self.tests, self.given["forget"])

    def relearnt(self, model: Any, seed: int) -> dict[str, Any]:
        return relearn(model, self.pools[self.given["forget"]], self.test, self.given, seed)

    def lora_file(self, seed: int) -> Path:
        same = hashlib.md5(json.dumps(settings_of(self.given), sort_keys=True).encode()).hexdigest()[:8]
        return Path(self.given["scratch"]) / f"lora_{same}_{seed}.safetensors"

    def monolith(self, seed: int) -> Built:
        """The LoRA that was taught everything; trained once a seed, then read from `scratch`."""
        built, path = lora(self.base, seed), self.lora_file(seed)
        if path.exists():
            known = load_file(path, device=str(self.device))
            for name, parameter in built.model.named_parameters():
                if name in known:
                    parameter.data.copy_(known[name])
            return built
        teach(built, self.pools, self.given["rows"], self.given, seed)
        save_file(lora_weights(built), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)  # whoever waits for it finds all of it
        return built

    def cell(self, variant: str, rate: float, seed: int) -> dict[str, Any]:
        given, forget = self.given, self.given["forget"]
        if variant == "base":
            built = Built(self.base, lambda ids: _trunk(self.base, ids), [])
            return {"after": self.measured(built), "relearn": self.relearnt(copy.deepcopy(self.base), seed)}
        if variant in ("owners", "all"):
            return self.bundles(variant, seed)
        if variant == "never":
            built = lora(self.base, seed)
            counts = {kind: n for kind, n in given["rows"].items() if kind != forget}
            teach(built, self.pools, counts, given, seed)
            record: dict[str, Any] = {"trainable": sum(p.numel() for p in built.parameters)}
        else:
            built = self.monolith(seed)
            record = {"trainable": sum(p.numel() for p in built.parameters), "before": self.measured(built)}
            if variant != "none":
                record["unlearn"] = unlearn(built, variant, rate, self.pools, self.test, given, seed)
        record["after"] = self.measured(built)
        record["relearn"] = self.relearnt(built.model.merge_and_unload(), seed)  # type: ignore[operator]
        return record

    def bundles(self, variant: str, seed: int) -> dict[str, Any]:
        """One bundle a kind, updated by its own rows only; in them only it is on ("owners"), or all are ("all")."""
        given, gone = self.given, f"b_{self.given['forget']}"
        kinds = [kind for kind, n in given["rows"].items() for _ in range(n)]
        longest = max(map(len, self.calibration))
        rows = torch.tensor([ids + [0] * (longest - len(ids)) for ids in self.calibration])
        built = build_bundles(
            {"routed": "1", "quiet": str(given["quiet"]), "tokens": str(given["calibration"]), "source": "texts"},
            self.base,
            {"texts": rows},
            self.tokenizer,
            seed,
            kinds,
        )
        model: Any = built.model
        own = {
            f"b_{kind}": torch.tensor([float(k == kind) for k in kinds], device=self.device) for kind in given["rows"]
        }
        with ExitStack() as stack:
            stack.enter_context(built.context)
            if variant == "owners":
                stack.enter_context(model.alphas(own))
            teach(built, self.pools, given["rows"], given, seed)
        record: dict[str, Any] = {"trainable": sum(p.numel() for p in built.parameters), "before": self.measured(built)}
        record["alone"] = {}
        for kind in given["rows"]:
            with model.alphas({name: float(name == f"b_{kind}") for name in own}):
                record["alone"][kind] = self.measured(built)["accuracy"]
        with model.alphas(dict.fromkeys(own, 0.0)), torch.no_grad():
            ids = self.test.ids[:50]
            record["off_is_base"] = bool(torch.equal(built.trunk(ids), _trunk(self.base, ids)))
        model.set_alphas({gone: 0.0})
        record["after"] = self.measured(built)
        record["relearn"] = self.relearnt(model.get_base_model(), seed)
        return record


def cells_of(given: dict[str, Any]) -> list[tuple[str, float, int]]:
    """(variant, rate of unlearning, seed): a monolith first, since others wait for it, then seed by seed."""
    cells = [("none", 0.0, seed) for seed in given["seeds"]]
    for seed in given["seeds"]:
        cells += [(variant, 0.0, seed) for variant in ("owners", "all", "never", "base")]
        cells += [(method, rate, seed) for method, rates in given["unlearn"]["rates"].items() for rate in rates]
    return cells


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """What makes two cells of one variant, rate and seed the same."""
    left_out = ("model", "data", "output", "scratch", "seeds", "workers", "worker", "seconds", "until")
    found = {name: value for name, value in given.items() if name not in left_out}
    return {**found, "unlearn": {k: v for k, v in given["unlearn"].items() if k != "rates"}}


def done(given: dict[str, Any]) -> set[tuple[str, float, int]]:
    output = Path(given["output"])
    records = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    return {
        (r["variant"], r["rate"], r["seed"])
        for r in records
        if "error" not in r and r["settings"] == settings_of(given)
    }


def claimed(path: Path) -> bool:
    """Whether it is ours now: nobody had it before."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def work(given: dict[str, Any]) -> None:
    """One worker: takes every cell that nobody has claimed yet, and that has what it needs, until there are none."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{given['worker'] % torch.cuda.device_count()}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(1)
    study, claims = Study(given, device), Path(given["scratch"]) / "claims"
    waiting = [cell for cell in cells_of(given) if cell not in done(given)]
    while waiting and time.time() < given["until"]:
        for cell in waiting:
            failed = claims / f"failed|{cell[2]}"
            if cell[0] not in WITHOUT_LORA and not study.lora_file(cell[2]).exists() and not failed.exists():
                if not claimed(claims / f"lora|{cell[2]}"):
                    continue  # someone else trains it
                if not attempt(given, ("taught", 0.0, cell[2]), lambda: study.monolith(cell[2]) and {}):  # noqa: B023
                    failed.touch()
            waiting.remove(cell)
            impossible = cell[0] not in WITHOUT_LORA and failed.exists()
            if not impossible and claimed(claims / "|".join(map(str, cell))):
                attempt(given, cell, lambda: study.cell(*cell))  # noqa: B023
            break  # look again from the front: what a cell before this one needs may be there now
        else:
            time.sleep(0.5)


def attempt(given: dict[str, Any], cell: tuple[str, float, int], run: Callable[[], dict[str, Any]]) -> bool:
    """Append what `run` finds, if anything, or its error, as a line of the output; whether there was no error."""
    begin, variant = time.perf_counter(), cell[0]
    record: dict[str, Any] = {"variant": variant, "rate": cell[1], "seed": cell[2], "settings": settings_of(given)}
    try:
        found = run()
    except Exception:
        found = {"error": traceback.format_exc()[-1500:]}
    record |= found
    record["seconds"] = round(time.perf_counter() - begin, 1)
    record["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    record["date"] = datetime.date.today().isoformat()
    record["versions"] = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    if found:
        with open(given["output"], "a") as file:
            file.write(json.dumps(record) + "\n")
    said = found.get("error", "")[-400:] or found.get("after", {}).get("accuracy", "taught")
    print("|".join(map(str, cell)), f"{record['seconds']} s", said, flush=True)
    gc.collect()  # a step's closures, its graph and the model hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return "error" not in found


def settings(argv: list[str] | None) -> dict[str, Any]:
    """The YAML with the command line over it.

    Raises:
        ValueError: `forget` is not taught, or is all that is taught.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--model", help="folder or Hub id of another Llama-like causal LM")
    parser.add_argument("--data", help="the file that studies/quality/make_data.py writes")
    parser.add_argument("--output", help="the file of cells")
    parser.add_argument("--scratch", help="folder for weights that cells share")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no cell after so many seconds")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    flags = vars(parser.parse_args(argv))
    given = yaml.safe_load(flags.pop("config").read_text()) | {k: v for k, v in flags.items() if v is not None}
    if given["forget"] not in given["rows"] or len(given["rows"]) < 2:
        raise ValueError(f"forget: {given['forget']!r} must be one of rows, beside another: {[*given['rows']]}.")
    if given["data"] is None:
        raise ValueError("data: make the file with studies/quality/make_data.py and give --data FILE.")
    given["model"] = given["model"] or str(_data.model_folder())
    return given


def main(argv: list[str] | None = None) -> None:
    given = settings(argv)
    if "worker" in given:
        return work(given)
    given["until"] = time.time() + given["seconds"]
    claims = Path(given["scratch"]) / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    Path(given["output"]).parent.mkdir(parents=True, exist_ok=True)
    for claim in claims.iterdir():
        claim.unlink()
    if given["workers"] == 1:
        return work(given | {"worker": 0})
    own = [*(sys.argv[1:] if argv is None else argv), "--until", str(given["until"]), "--worker"]
    processes = [subprocess.Popen([sys.executable, __file__, *own, str(n)]) for n in range(given["workers"])]
    sys.exit(max(p.wait() for p in processes))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
