"""The cells of removal.py: a variant, the rate of unlearning and a seed; and the workers that run them."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from studies import records, workers
from studies.quality.make_data import load
from studies.quality.methods import Built, build_bundles
from studies.quality.run import DOMAIN_LENGTH
from studies.removal.methods import kinds_of, lora, lora_weights, measure, relearn, teach, unlearn
from studies.rows import Rows, rows_of, tokens_of
from studies.training import final_states


WITHOUT_LORA = ("owners", "all", "never", "base")  # cells that do not begin with the LoRA that was taught everything


class Study:
    """What all cells of one process share."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        self.config, self.device = config, device
        self.tokenizer = AutoTokenizer.from_pretrained(config["model"])
        self.base: Any = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32).to(device).eval()
        self.base.requires_grad_(False)
        data = load(Path(config["data"]))
        self.pools = kinds_of(data, "train", config, self.tokenizer)
        tests = kinds_of(data, "test", config, self.tokenizer)
        self.tests = {f"facts/{kind}": rows_of(items, DOMAIN_LENGTH).to(device) for kind, items in tests.items()}
        for name, texts in data["domains"].items():
            items = [tokens_of(self.tokenizer, text) for text in texts[: config["text_rows"]]]
            self.tests[f"text/{name}"] = rows_of(items, DOMAIN_LENGTH).to(device)
        texts = [text for some in zip(*data["calibration"].values()) for text in some]
        self.calibration = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    @property
    def test(self) -> Rows:
        return self.tests[f"facts/{self.config['forget']}"]

    def measured(self, built: Built) -> dict[str, Any]:
        return measure(built, self.base, self.tests, self.config["forget"])

    def relearnt(self, model: Any, seed: int) -> dict[str, Any]:
        return relearn(model, self.pools[self.config["forget"]], self.test, self.config, seed)

    def lora_file(self, seed: int) -> Path:
        same = hashlib.md5(json.dumps(settings_of(self.config), sort_keys=True).encode()).hexdigest()[:8]
        return Path(self.config["scratch"]) / f"lora_{same}_{seed}.safetensors"

    def monolith(self, seed: int) -> Built:
        """The LoRA that was taught everything; trained once a seed, then read from `scratch`."""
        built, path = lora(self.base, seed), self.lora_file(seed)
        if path.exists():
            known = load_file(path, device=str(self.device))
            for name, parameter in built.model.named_parameters():
                if name in known:
                    parameter.data.copy_(known[name])
            return built
        teach(built, self.pools, self.config["rows"], self.config, seed)
        save_file(lora_weights(built), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)  # whoever waits for it finds all of it
        return built

    def cell(self, variant: str, rate: float, seed: int) -> dict[str, Any]:
        config, forget = self.config, self.config["forget"]
        if variant == "base":
            built = Built(self.base, lambda ids: final_states(self.base, ids), [])
            return {"after": self.measured(built), "relearn": self.relearnt(copy.deepcopy(self.base), seed)}
        if variant in ("owners", "all"):
            return self.bundles(variant, seed)
        if variant == "never":
            built = lora(self.base, seed)
            counts = {kind: n for kind, n in config["rows"].items() if kind != forget}
            teach(built, self.pools, counts, config, seed)
            record: dict[str, Any] = {"trainable": sum(p.numel() for p in built.parameters)}
        else:
            built = self.monolith(seed)
            record = {"trainable": sum(p.numel() for p in built.parameters), "before": self.measured(built)}
            if variant != "none":
                record["unlearn"] = unlearn(built, variant, rate, self.pools, self.test, config, seed)
        record["after"] = self.measured(built)
        record["relearn"] = self.relearnt(built.model.merge_and_unload(), seed)  # type: ignore[operator]
        return record

    def bundles(self, variant: str, seed: int) -> dict[str, Any]:
        """One bundle a kind, updated by its own rows only; in them only it is on ("owners"), or all are ("all")."""
        config, gone = self.config, f"b_{self.config['forget']}"
        kinds = [kind for kind, n in config["rows"].items() for _ in range(n)]
        longest = max(map(len, self.calibration))
        rows = torch.tensor([ids + [0] * (longest - len(ids)) for ids in self.calibration])
        built = build_bundles(
            {"routed": "1", "quiet": str(config["quiet"]), "tokens": str(config["calibration"]), "source": "texts"},
            self.base,
            {"texts": rows},
            self.tokenizer,
            seed,
            kinds,
        )
        model: Any = built.model
        own = {
            f"b_{kind}": torch.tensor([float(k == kind) for k in kinds], device=self.device) for kind in config["rows"]
        }
        with ExitStack() as stack:
            stack.enter_context(built.context)
            if variant == "owners":
                stack.enter_context(model.alphas(own))
            teach(built, self.pools, config["rows"], config, seed)
        record: dict[str, Any] = {"trainable": sum(p.numel() for p in built.parameters), "before": self.measured(built)}
        record["alone"] = {}
        for kind in config["rows"]:
            with model.alphas({name: float(name == f"b_{kind}") for name in own}):
                record["alone"][kind] = self.measured(built)["accuracy"]
        with model.alphas(dict.fromkeys(own, 0.0)), torch.no_grad():
            ids = self.test.ids[:50]
            record["off_is_base"] = bool(torch.equal(built.trunk(ids), final_states(self.base, ids)))
        model.set_alphas({gone: 0.0})
        record["after"] = self.measured(built)
        record["relearn"] = self.relearnt(model.get_base_model(), seed)
        return record


def cells_of(config: dict[str, Any]) -> list[tuple[str, float, int]]:
    """(variant, rate of unlearning, seed): a monolith first, since others wait for it, then seed by seed."""
    cells = [("none", 0.0, seed) for seed in config["seeds"]]
    for seed in config["seeds"]:
        cells += [(variant, 0.0, seed) for variant in ("owners", "all", "never", "base")]
        cells += [(method, rate, seed) for method, rates in config["unlearn"]["rates"].items() for rate in rates]
    return cells


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a record keeps: cells with other ones are other cells."""
    left_out = ("model", "data", "output", "scratch", "seeds", "workers", "worker", "seconds", "until", "command")
    kept = {name: value for name, value in config.items() if name not in left_out}
    return {**kept, "unlearn": {k: v for k, v in config["unlearn"].items() if k != "rates"}}


def done(config: dict[str, Any]) -> set[Hashable]:
    """The cells that the output has with these settings."""
    settings = settings_of(config)
    found = [r for r in records.read(Path(config["output"])) if "error" not in r and r["settings"] == settings]
    return {(r["variant"], r["rate"], r["seed"]) for r in found}


def work(config: dict[str, Any]) -> None:
    """One worker: takes every cell that nobody has claimed yet, and that has what it needs, until there are none."""
    torch.set_num_threads(1)
    device = workers.device_of(config["worker"])
    study, claims = Study(config, device), Path(config["scratch"]) / "claims"
    finished = done(config)
    waiting = [cell for cell in cells_of(config) if cell not in finished]
    while waiting and time.time() < config["until"]:
        for cell in waiting:
            failed = claims / f"failed|{cell[2]}"
            if cell[0] not in WITHOUT_LORA and not study.lora_file(cell[2]).exists() and not failed.exists():
                if not workers.claim(claims / f"lora|{cell[2]}"):
                    continue  # another worker trains it
                if not attempt(config, ("taught", 0.0, cell[2]), lambda: study.monolith(cell[2]) and {}):  # noqa: B023
                    failed.touch()
            waiting.remove(cell)
            impossible = cell[0] not in WITHOUT_LORA and failed.exists()
            if not impossible and workers.claim(claims / "|".join(map(str, cell))):
                attempt(config, cell, lambda: study.cell(*cell))  # noqa: B023
            break  # look again from the front: what a cell before this one needs may be there now
        else:
            time.sleep(0.5)


def attempt(config: dict[str, Any], cell: tuple[str, float, int], run: Callable[[], dict[str, Any]]) -> bool:
    """Append what `run` returns, if anything, or its error, to the output; True if there was no error."""
    begin, variant = time.perf_counter(), cell[0]
    record: dict[str, Any] = {"variant": variant, "rate": cell[1], "seed": cell[2], "settings": settings_of(config)}
    try:
        result = run()
    except Exception:
        result = {"error": traceback.format_exc()[-1500:]}
    record |= {**result, "seconds": round(time.perf_counter() - begin, 1), **records.made_by(config["command"])}
    if result:
        records.append(Path(config["output"]), record)
    told = result.get("error", "")[-400:] or result.get("after", {}).get("accuracy", "taught")
    print("|".join(map(str, cell)), f"{record['seconds']} s", told, flush=True)
    gc.collect()  # a step's closures, its graph and the model hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return "error" not in result
