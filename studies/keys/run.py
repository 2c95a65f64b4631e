"""Keys against tags: a bundle a task, trained apart, all in one model, and gated by a tag, by keys or by chance.

    python -m studies.keys.run --model DIR --data data.json.gz --second confirm.json.gz --output results.jsonl

Cells: (set, place, seed, task) trains one bundle, makes its key and saves it; (set, place, seed, "all") composes all of
a set and measures every way of gating. Answers are generated freely (greedy, batched with left padding). Measured:
exact match of single questions, of facts in other words, of the second question of a conversation whose first one is
another task's; the share of answer tokens with the right bundle on; the rise of the loss on domains that nobody trained
on, and the share of their tokens with any bundle on; seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_bundles import BundleConfig, KeyRouter, Null, calibrate, compose, learn_keys, learn_null, save_bundle
from studies import records, workers
from studies.keys.tasks import END, Task, chat, tasks_of
from studies.quality.make_data import PROMPT, load
from studies.rows import Draws, Rows, batches_of, rows_of, tokens_of
from studies.training import Training, autocast, row_loss, warmup_decay


ROWS, WARMUP = 32, 20
RATES = {"block": 2e-3, "mlp": 4e-3}
QUIET = {"block": 20.0, "mlp": 10.0}
NEW_TOKENS = 16
Cell = tuple[str, str, int, str]  # set of tasks, place, seed, task or "all"


def runs(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    return [(which, place, seed) for seed in range(args.seeds) for which in args.sets for place in args.places]


def cells(args: argparse.Namespace, tasks: dict[str, dict[str, Task]]) -> list[Cell]:
    """Trainings first."""
    return [(*run, name) for run in runs(args) for name in tasks[run[0]]] + [(*run, "all") for run in runs(args)]


def config_of(place: str, names: list[str]) -> BundleConfig:
    """Bundles of the size of a twelfth of LoRA r16 on all linear layers."""
    bundles: dict[str, Any] = {}
    for name in names:
        of_place = {"sub_bases": ["main"], "rank": 0.75, "bottleneck": 189 // 12}
        bundles[f"b_{name}"] = (of_place if place == "block" else {"place": place, "rank": 3}) | {
            "signals": {"lm": 1.0}
        }
    return BundleConfig(
        bundles=bundles,
        sub_bases={"main": 0.75} if place == "block" else {},
        quiet=QUIET[place],
        task_type="CAUSAL_LM",
    )


def another_turn(tasks: dict[str, Task], task: int, rng: random.Random) -> tuple[str, str]:
    """A question of another task, answered, as the first turn of a conversation."""
    other = tasks[rng.choice([name for n, name in enumerate(tasks) if n != task])]
    question, answer = rng.choice(other.test)
    return question, answer


class Study:
    """One worker's model, data and folders."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, workers.device_of(args.worker or 0, args.cpu)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        first, second = load(args.data), load(args.second)
        self.tasks = {which: tasks_of(which, first, second, args.tests) for which in args.sets}
        self.domains = {**first["domains"], **{f"second {k}": texts for k, texts in second["domains"].items()}}
        self.calibration = [t for texts in zip(*first["calibration"].values()) for t in texts]

    def base(self) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32)
        return model.to(self.device).eval().requires_grad_(False)

    def folder(self, which: str, place: str, seed: int, name: str) -> Path:
        return self.args.scratch / f"{which}_{place}_{seed}_{name}"

    def failed(self, *cell: Any) -> bool:
        return (self.args.scratch / "claims" / f"failed {cell}").exists()

    # ---- one bundle ----

    def prepare(self) -> dict[str, Any]:
        """A calibrated adapter of all bundles for every place and seed, and the null, once for all cells."""
        seconds = {}
        base = self.base()
        for which, place, seed in runs(self.args):
            torch.manual_seed(seed)
            config = config_of(place, list(self.tasks[which]))
            config.basis_seed = seed
            model = get_peft_model(base, config)
            begin = time.perf_counter()
            calibrate(model, self.calibration, self.tokenizer, tokens=self.args.calibration_tokens, progress=False)
            seconds[f"calibrate {place}"] = time.perf_counter() - begin
            model.save_pretrained(self.folder(which, place, seed, "fresh"))
            if not (self.args.scratch / "null.safetensors").exists():
                begin = time.perf_counter()
                null = learn_null(
                    model,
                    self.calibration,
                    self.tokenizer,
                    tokens=self.args.null_tokens,
                    max_length=128,
                    progress=False,
                )
                null.save(self.args.scratch / "null.safetensors")
                seconds["null"] = time.perf_counter() - begin
            base = model.unload()
        return seconds

    def train(self, which: str, place: str, seed: int, name: str) -> dict[str, Any]:
        """Train a task's bundle alone, with the others off, make its key, and save it."""
        model: Any = PeftModel.from_pretrained(self.base(), self.folder(which, place, seed, "fresh"), is_trainable=True)
        calibrate(
            model,
            self.calibration,
            self.tokenizer,
            tokens=self.args.calibration_tokens,
            states_only=True,
            progress=False,
        )
        bundle = f"b_{name}"
        pairs = self.tasks[which][name].train
        pools = {name: [tokens_of(self.tokenizer, (PROMPT.format(q), a + END)) for q, a in pairs]}
        pools = {name: [item for item in pools[name] if len(item[0]) <= self.args.length]}
        batches = Draws(pools, {name: random.Random(seed)}).batches([name] * ROWS, self.args.steps, self.args.length)
        batches = batches.to(self.device)
        model.train()

        def gradients(batch: Any) -> Tensor:
            with autocast(self.device):
                states = model.base_model.model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
                logits = model.get_output_embeddings()(states.flatten(0, 1)[batch.where])
                loss = row_loss(logits, batch)
                total = loss + model.quiet_loss()
            total.backward()
            return loss.detach()

        off = {other: 0.0 for other in model.peft_config["default"].bundles if other != bundle}
        begin = time.perf_counter()
        with model.alphas(off), model.base_model._state.penalty.without_penalty():
            training = Training([model.bundle_parameters(bundle)], gradients, fixed=[batches.at(0)], clip=1.0)
            losses: list[float] = []
            training.run(
                batches_of(batches),
                lambda n: [RATES[place] * warmup_decay(n, self.args.steps, WARMUP)],
                lambda n, loss: losses.append(float(loss)) if n % 25 == 0 else None,
            )
        seconds = time.perf_counter() - begin
        model.eval()
        rows = [{"text": PROMPT.format(q) + a + END} for q, a in pairs[: self.args.key_rows]]
        begin = time.perf_counter()
        learn_keys(model, {bundle: rows}, self.tokenizer, progress=False)
        seconds_key = time.perf_counter() - begin
        save_bundle(model, bundle, self.folder(which, place, seed, name))
        return {"losses": losses, "seconds": seconds, "key_seconds": seconds_key, "captured": training.captured}

    # ---- all of them ----

    def measure(self, which: str, place: str, seed: int) -> dict[str, Any]:
        """Every way of gating the bundles."""
        tasks = self.tasks[which]
        names = list(tasks)
        base = self.base()
        losses = self.losses(base)
        model: Any = compose(base, [self.folder(which, place, seed, name) for name in names])
        model.set_null(Null.load(self.args.scratch / "null.safetensors"))
        bundles = [f"b_{name}" for name in names]
        asked = [(n, pair) for n, name in enumerate(names) for pair in tasks[name].test]
        other_words = [(n, pair) for n, name in enumerate(names) for pair in tasks[name].reworded]
        rng = random.Random(seed)
        turns = [another_turn(tasks, n, rng) for n, _ in asked]
        sets = {
            "one": ([chat([], q) for _, (q, _) in asked], asked),
            "reworded": ([chat([], q) for _, (q, _) in other_words], other_words),
            "second": ([chat([turn], q) for turn, (_, (q, _)) in zip(turns, asked)], asked),
        }
        record: dict[str, Any] = {"base": {"domains": losses}}
        wrong = {n: rng.choice([k for k in range(len(names)) if k != n]) for n in range(len(names))}
        for way in self.args.ways:
            begin, result = time.perf_counter(), {}
            for what, (prompts, pairs) in sets.items():
                owners = torch.tensor([n for n, _ in pairs], device=self.device)
                context = self._gating(model, way, bundles, owners, wrong, rng)
                keyed = way.startswith("keys")
                with context:
                    texts, gates = self.generate(model, prompts, keyed)
                right = [t.split(END)[0].strip() == answer.strip() for t, (_, (_, answer)) in zip(texts, pairs)]
                result[what] = {
                    name: sum(r for r, (n, _) in zip(right, pairs) if n == k) / max(sum(n == k for n, _ in pairs), 1)
                    for k, name in enumerate(names)
                    if any(n == k for n, _ in pairs)
                }
                if gates is not None:
                    of_owner = gates.gather(2, owners[:, None, None].expand(-1, gates.shape[1], 1))[..., 0]
                    result[f"right gates, {what}"] = {
                        name: float(of_owner[owners == k].mean())
                        for k, name in enumerate(names)
                        if bool((owners == k).any())
                    }
            if way not in ("tag", "wrong"):
                with self._gating(model, way, bundles, None, wrong, rng):
                    result["domains"] = self.losses(model)
                    if way.startswith("keys"):
                        result["spoke"] = self.spoke(model)
            result["seconds"] = time.perf_counter() - begin
            record[way] = result
        record["claims"] = {
            name: share for (_, name), share in KeyRouter().folded(model.base_model._state).claims.items()
        }
        return record

    def _gating(
        self,
        model: Any,
        way: str,
        bundles: list[str],
        owners: Tensor | None,
        wrong: dict[int, int],
        rng: random.Random,
    ) -> AbstractContextManager[Any]:
        """Alphas for rows of these owners, or the router."""
        if way == "keys":
            return model.router(KeyRouter())
        if way == "keys, means only":
            return model.router(KeyRouter(remembered=False))
        if way in ("all on", "uniform"):
            return model.alphas(dict.fromkeys(bundles, 1.0 if way == "all on" else 1 / len(bundles)))
        if way == "random":
            if owners is None:
                return model.alphas({b: float(n == rng.randrange(len(bundles))) for n, b in enumerate(bundles)})
            owners = torch.tensor([rng.randrange(len(bundles)) for _ in owners], device=self.device)
        elif way == "wrong":
            assert owners is not None
            owners = torch.tensor([wrong[int(n)] for n in owners], device=self.device)
        assert owners is not None
        return model.alphas({b: (owners == n).float() for n, b in enumerate(bundles)})

    def generate(self, model: Any, prompts: list[str], keyed: bool) -> tuple[list[str], Tensor | None]:
        """Greedy answers; with a router also the gates while they were written, (rows, new tokens, bundles)."""
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(self.device)
        options = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "eos_token_id": self.tokenizer(END)["input_ids"][0],
        }
        gates = None
        with autocast(self.device):
            result = model.generate(**batch, **options, pad_token_id=self.tokenizer.pad_token_id, return_gates=keyed)
        if keyed:
            result, gates = result
            new = result[:, batch["input_ids"].shape[1] :]
            first = batch["input_ids"].shape[1] - 1
            shown = new != self.tokenizer.pad_token_id
            gates = gates.values[:, first : first + new.shape[1]]
            gates = gates * shown[:, : gates.shape[1], None] / shown.float().mean(1)[:, None, None].clamp_min(1e-6)
        return self.tokenizer.batch_decode(result[:, batch["input_ids"].shape[1] :]), gates

    def rows_of_domain(self, texts: list[str]) -> Rows:
        some = texts[: self.args.domain_rows]
        return rows_of([tokens_of(self.tokenizer, text) for text in some], 128).to(self.device)

    @torch.no_grad()
    def losses(self, model: Any) -> dict[str, float]:
        """Mean token loss on every domain."""
        losses = {}
        for name, texts in self.domains.items():
            rows = self.rows_of_domain(texts)
            with autocast(self.device):
                logits = model(input_ids=rows.ids, use_cache=False).logits.flatten(0, 1)[rows.where]
            losses[name] = float(F.cross_entropy(logits.float(), rows.target))
        return losses

    def spoke(self, model: Any) -> dict[str, float]:
        """Share of the tokens of every domain with any bundle on."""
        shares = {}
        for name, texts in self.domains.items():
            rows = self.rows_of_domain(texts)
            with autocast(self.device):
                shares[name] = float(model.gates(rows.ids).values.amax(-1).mean())
        return shares


def work(args: argparse.Namespace) -> None:
    """One worker: takes every cell that nobody has claimed; measures once all bundles of its run are there."""
    torch.set_num_threads(1)
    study = Study(args)
    for cell in cells(args, study.tasks):
        if not workers.claim(args.scratch / "claims" / "|".join(map(str, cell))):
            continue
        which, place, seed, name = cell
        record: dict[str, Any] = {"set": which, "place": place, "seed": seed, "task": name}
        begin = time.perf_counter()
        try:
            if name == "all":
                while any(
                    not (study.folder(which, place, seed, n) / "adapter_config.json").exists()
                    for n in study.tasks[which]
                ):
                    if time.time() > args.until or any(study.failed(which, place, seed, n) for n in study.tasks[which]):
                        return
                    time.sleep(0.5)
                record |= study.measure(which, place, seed)
            else:
                record |= study.train(which, place, seed, name)
        except Exception:
            record["error"] = traceback.format_exc()[-1500:]
            (args.scratch / "claims" / f"failed {cell}").touch()
        record["wall"] = time.perf_counter() - begin
        records.append(args.output, record)
        print(cell, f"{record['wall']:.1f} s", record.get("error", "")[-400:], flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--second", type=Path, required=True, help="the confirming file of the quality study")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/keys"))
    parser.add_argument("--places", nargs="+", default=["block", "mlp"])
    parser.add_argument("--sets", nargs="+", default=["first", "second"], choices=["first", "second"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=64, help="tokens of a training row; longer ones are left out")
    parser.add_argument("--tests", type=int, default=50, help="questions asked of each task")
    parser.add_argument("--key-rows", type=int, default=512)
    parser.add_argument("--domain-rows", type=int, default=40)
    parser.add_argument("--calibration-tokens", type=int, default=20_000)
    parser.add_argument("--null-tokens", type=int, default=30_000)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--worker", type=int)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--seconds", type=float, default=3600.0, help="wait no longer for the bundles of a run")
    parser.add_argument("--until", type=float)
    args = parser.parse_args()
    if args.worker is not None:
        return work(args)
    workers.clear(args.scratch / "claims")
    until = time.time() + args.seconds
    study = Study(args)
    command = " ".join(["python -m studies.keys.run", *sys.argv[1:]])
    record = {"task": "prepare", "seconds": study.prepare(), **records.made_by(command, device=study.device)}
    records.append(args.output, record)
    print(json.dumps(record), flush=True)
    del study
    gc.collect()
    sys.exit(workers.start(["-m", "studies.keys.run", *sys.argv[1:], "--until", str(until)], args.workers))


WAYS = ["tag", "keys", "keys, means only", "random", "wrong", "all on", "uniform"]


if __name__ == "__main__":
    main()
