"""Learning against disturbance: SmolLM2-135M, one small training set, every method at its own best rate.

    python -m studies.quality.make_data --output data.json.gz
    python -m studies.quality.run --model DIR --data data.json.gz --sweep final --output results.jsonl --workers 6

A cell is (method, learning rate, seed): 300 steps of 48 examples, measured at steps 150 and 300. Several processes a
GPU share the cells; each is appended to the output when it is done, and cells of the output are not run again.

Learn: exact match of greedy answers, by teacher forcing (greedy decoding gives the answer exactly when each of its
tokens is the argmax after the ones before), and the loss on plays. Disturb: rise of the loss, and KL to the base, on
domains that nobody trained or calibrated on; accuracy on facts the base knew.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import random
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_bundles.calibration import plain_samples
from studies import records, workers
from studies.quality.make_data import PROMPT, load
from studies.quality.methods import Built, build
from studies.rows import Draws, Encoded, Rows, batches_of, rows_of, tokens_of
from studies.training import Training, autocast, final_states, row_loss, warmup_decay


STEPS, LENGTH, WARMUP = 300, 64, 20
MEASURE_AT = (150,)  # and at the end
ROWS = {"biographies": 10, "codes": 10, "reasoning": 12, "gsm": 8, "plays": 8}  # of a batch of 48
KINDS = [kind for kind, count in ROWS.items() for _ in range(count)]  # what each row of a batch is
OWN_HELD_OUT = 64  # rows of the base's own samples that nobody calibrates on
DOMAIN_LENGTH = 128
CHUNK = 25  # rows of a forward when measuring; several workers share a GPU
SWEEPS = Path(__file__).with_name("sweeps.json")


# ---- data ----


def questions(tokenizer: Any, pairs: list[list[str]]) -> list[Encoded]:
    """Questions in chat format with their answers; those that do not fit are left out, in training and in tests."""
    encoded = [tokens_of(tokenizer, (PROMPT.format(question), answer + "<|im_end|>")) for question, answer in pairs]
    return [item for item in encoded if len(item[0]) <= LENGTH]


def training_batches(data: dict[str, Any], tokenizer: Any, steps: int, seed: int) -> Rows:
    """All batches stacked: ids (steps, 48, T), the rest (steps, P)."""
    train = data["train"]
    pools = {kind: questions(tokenizer, train[kind]) for kind in ("biographies", "codes", "gsm")}
    pools["reasoning"] = questions(tokenizer, [pair for family in train["reasoning"].values() for pair in family])
    pools["plays"] = [tokens_of(tokenizer, text) for text in train["plays"]]
    draws = Draws(pools, dict.fromkeys(pools, random.Random(seed)))
    return draws.batches(KINDS, steps, LENGTH)


def full_rows(texts: Iterable[str], tokenizer: Any) -> Tensor:
    """Rows of DOMAIN_LENGTH tokens, filled with the texts and an end after each; a shorter rest is dropped."""
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"] + [0]]
    return torch.tensor(ids[: len(ids) // DOMAIN_LENGTH * DOMAIN_LENGTH]).view(-1, DOMAIN_LENGTH)


def prompt_rows(data: dict[str, Any], tokenizer: Any) -> Tensor:
    """Rows filled with the training questions in chat format, without answers; as many of every kind."""
    train, rng = data["train"], random.Random(0)
    pools = {kind: train[kind] for kind in ("biographies", "codes", "gsm")}
    pools["reasoning"] = [pair for family in train["reasoning"].values() for pair in family]
    count = min(map(len, pools.values()))
    asked = [question for pairs in pools.values() for question, _ in rng.sample(pairs, count)]
    return full_rows((PROMPT.format(question) for question in rng.sample(asked, len(asked))), tokenizer)


def evaluation_sets(data: dict[str, Any], tokenizer: Any, own: Tensor) -> dict[str, Rows]:
    test, sets = data["test"], {}
    for kind in ("biographies", "codes", "gsm"):
        sets[f"learn/{kind}"] = rows_of(questions(tokenizer, test[kind]), LENGTH)
    for family, items in test["reasoning"].items():
        sets[f"learn/{family}"] = rows_of(questions(tokenizer, items), LENGTH)
    for kind, pairs in data["known"].items():
        sets[f"known/{kind}"] = rows_of([tokens_of(tokenizer, tuple(pair)) for pair in pairs], LENGTH)
    sets["text/plays"] = rows_of([tokens_of(tokenizer, text) for text in test["plays"]], LENGTH)
    for name, texts in data["domains"].items():
        sets[f"domain/{name}"] = rows_of([tokens_of(tokenizer, text) for text in texts], DOMAIN_LENGTH)
    sets["own/samples"] = rows_of([(row, 1) for row in own[-OWN_HELD_OUT:].tolist()], DOMAIN_LENGTH)
    return sets


@torch.no_grad()
def evaluate(built: Built, base: Any, sets: dict[str, Rows]) -> dict[str, float]:
    """Accuracy of "learn" and "known", mean token loss of "text" and "domain", KL(base || model) of "domain"."""
    found: dict[str, float] = {}
    for name, rows in sets.items():
        right = torch.ones(len(rows.ids), dtype=torch.bool, device=rows.ids.device)
        loss = kl = torch.zeros((), device=rows.ids.device)
        length = rows.ids.shape[1]
        for start in range(0, len(rows.ids), CHUNK):
            chunk = (rows.row >= start) & (rows.row < start + CHUNK)
            ids, where = rows.ids[start : start + CHUNK], rows.where[chunk] - start * length
            target = rows.target[chunk]
            with autocast(ids.device):
                logits = logits_at(built, ids, where).float()
                if name.startswith(("domain", "own")):
                    states = final_states(base, ids).flatten(0, 1)[where]
                    reference = base.lm_head(states).float().log_softmax(-1)
                    kl = kl + (reference.exp() * (reference - logits.log_softmax(-1))).sum()
            loss = loss + F.cross_entropy(logits, target, reduction="sum")
            right[rows.row[chunk][logits.argmax(-1) != target]] = False
        count = len(rows.where)
        if name.startswith(("learn", "known")):
            found[name] = right.float().mean().item()
        else:
            found[name] = loss.item() / count
        if name.startswith(("domain", "own")):
            found["kl/" + name.split("/")[1]] = kl.item() / count
    if next(iter(sets.values())).ids.is_cuda:
        torch.cuda.empty_cache()  # for the other workers
    return found


def tagged(built: Built, base: Any, sets: dict[str, Rows]) -> dict[str, float]:
    """With one bundle on: "tag/<set>", what is learnt with that of the set's own kind, and "<kind>/domain/<name>"."""
    found = {}
    domains = {name: rows for name, rows in sets.items() if name.startswith("domain")}
    for kind in ROWS:
        own = {n: rows for n, rows in sets.items() if n in (f"learn/{kind}", f"text/{kind}")}
        if kind == "reasoning":  # one bundle for all its families
            families = {n for n in sets if n.startswith("learn/") and n.split("/")[1] not in ROWS}
            own = {n: rows for n, rows in sets.items() if n in families}
        with built.tag(kind):  # type: ignore[misc]
            found |= {f"tag/{name}": value for name, value in evaluate(built, base, own).items()}
            found |= {f"{kind}/{name}": value for name, value in evaluate(built, base, domains).items()}
    return found


def logits_at(built: Built, ids: Tensor, where: Tensor) -> Tensor:
    model: Any = built.model
    head = model.get_output_embeddings()
    return head(built.trunk(ids).flatten(0, 1)[where])


# ---- training ----


def train(built: Built, base: Any, batches: Rows, lr: float, steps: int, sets: dict[str, Rows]) -> dict[str, Any]:
    """AdamW, linear warm-up and decay, gradient norm clipped at 1; measures at MEASURE_AT and at the end."""
    device = batches.ids.device
    record: dict[str, Any] = {"loss": []}
    measuring = 0.0  # seconds

    def gradients(batch: Rows) -> Tensor:
        with autocast(device):
            loss = row_loss(logits_at(built, batch.ids, batch.where), batch)
            extra = built.extra() if built.extra else torch.zeros((), device=device)
        (loss + extra).backward()
        return torch.stack([loss.detach(), extra.detach().float()])

    def after(done: int, losses: Tensor) -> bool:
        nonlocal measuring
        if done % 25 == 0:
            record["loss"].append([round(x, 4) for x in losses.tolist()])
            if not math.isfinite(record["loss"][-1][0]):
                record["diverged"] = done
                return True
        if built.progress is not None and done == steps:
            built.progress.fill_(1.0)
        if done in MEASURE_AT or done == steps:
            begin = time.perf_counter()
            record[str(done)] = evaluate(built, base, sets)
            if built.tag is not None:
                record[str(done)] |= tagged(built, base, sets)
            measuring += time.perf_counter() - begin
        if built.progress is not None:
            built.progress.fill_(done / steps)
        return False

    training = Training(
        [built.parameters],
        gradients,
        fixed=[batches.at(0)],
        decay=built.decay,
        clip=1.0,
        around=built.rows,
        graph=built.graph,
    )
    if built.progress is not None:
        built.progress.fill_(0.0)
    begin = time.perf_counter()
    training.run(batches_of(batches), lambda n: [lr * warmup_decay(n, steps, WARMUP)], after)
    record["seconds"] = time.perf_counter() - begin - measuring
    return record


# ---- cells ----


def cells_of(sweeps: list[str]) -> list[tuple[str, float, int]]:
    """(method, learning rate, seed) of sweeps in sweeps.json."""
    cells, known = [], json.loads(SWEEPS.read_text())
    for block in (block for sweep in sweeps for block in known[sweep]):
        for method in block["methods"]:
            cells += [(method, lr, seed) for lr in block["lrs"] for seed in block["seeds"]]
    return list(dict.fromkeys(cells))


def cell_of(record: dict[str, Any]) -> tuple[str, float, int]:
    return record["method"], record["lr"], record["seed"]


def claim_name(cell: tuple[str, float, int]) -> str:
    return "|".join(map(str, cell)).replace("/", "_")


def work(args: argparse.Namespace) -> None:
    """One worker: takes every cell that nobody has claimed yet."""
    torch.set_num_threads(1)
    device = workers.device_of(args.worker)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    data = load(args.data)
    calibration = {name: rows.to(device) for name, rows in load_file(args.calibration).items()}
    sets = {name: rows.to(device) for name, rows in evaluation_sets(data, tokenizer, calibration["own"]).items()}
    calibration["own"] = calibration["own"][:-OWN_HELD_OUT]
    batches: dict[int, Rows] = {}
    for cell in cells_of(args.sweep):
        if not workers.claim(args.claims / claim_name(cell)):
            continue
        if time.time() > args.until:
            return
        method, lr, seed = cell
        if seed not in batches:
            batches[seed] = training_batches(data, tokenizer, args.steps, seed).to(device)
        begin = time.perf_counter()
        record: dict[str, Any] = {"method": method, "lr": lr, "seed": seed}
        try:
            built = build(method, base, calibration, tokenizer, seed, KINDS)
            record["trainable"] = sum(p.numel() for p in built.parameters)
            record["setup_seconds"] = time.perf_counter() - begin
            with built.context:
                record |= train(built, base, batches[seed], lr, args.steps, sets)
        except Exception:
            record["error"] = traceback.format_exc()[-1500:]
        built = None
        gc.collect()  # the step's closures, its graph and the model hold each other
        record["wall"] = time.perf_counter() - begin
        records.append(args.output, record)
        last = record.get(str(args.steps), {})
        learnt = [v for k, v in last.items() if k.startswith("learn")]
        print(
            claim_name(cell),
            f"{record['wall']:.1f} s",
            record.get("error", "")[-300:],
            f"{sum(learnt):.2f}",
            flush=True,
        )
        torch.cuda.empty_cache()


def prepare(args: argparse.Namespace) -> None:
    """Calibration rows of every source, and the base model's own measures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    data = load(args.data)
    rows = {}
    for name, texts in data["calibration"].items():
        rows[name] = full_rows(texts, tokenizer)
    least = min(map(len, rows.values()))
    rows["mixture"] = torch.stack([r[:least] for r in rows.values()], 1).flatten(0, 1)
    torch.manual_seed(0)
    starts = {"endoftext": "<|endoftext|>", "user": "<|im_start|>user\n"}
    for name, start in starts.items():
        prompt = torch.tensor([tokenizer(start, add_special_tokens=False)["input_ids"]] * args.samples, device=device)
        with autocast(device):
            rows[f"own_{name}"] = plain_samples(base, prompt, DOMAIN_LENGTH).cpu()
    rows["own"] = torch.stack([rows[f"own_{name}"] for name in starts], 1).flatten(0, 1)
    most = min(len(rows["own"]) - OWN_HELD_OUT, len(rows["mixture"]))
    rows["both"] = torch.stack([rows["own"][:most], rows["mixture"][:most]], 1).flatten(0, 1)
    prompts = prompt_rows(data, tokenizer)
    most = min(len(prompts), len(rows["mixture"]))
    rows["chat"] = torch.stack([prompts[:most], rows["mixture"][:most]], 1).flatten(0, 1)
    save_file(rows, args.calibration)
    sets = {name: r.to(device) for name, r in evaluation_sets(data, tokenizer, rows["own"]).items()}
    built = Built(base, lambda ids: final_states(base, ids), list(base.parameters()))
    record = {"method": "base", "lr": 0.0, "seed": 0, "trainable": 0, str(args.steps): evaluate(built, base, sets)}
    record["environment"] = {
        **records.made_by(args.command, device=device),
        "data_md5": hashlib.md5(args.data.read_bytes()).hexdigest(),
    }
    records.append(args.output, record)
    print(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sweep", nargs="+", required=True, help="of sweeps.json, one after another")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--worker", type=int)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--samples", type=int, default=2048, help="rows of each kind of own samples")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no cell after so many seconds")
    parser.add_argument("--until", type=float)
    args = parser.parse_args()
    args.calibration = args.scratch / "calibration.safetensors"
    args.claims = args.scratch / f"claims_{'_'.join(args.sweep)}"
    args.command = " ".join(["python -m studies.quality.run", *sys.argv[1:]])
    if args.worker is not None:
        return work(args)
    until = time.time() + args.seconds
    workers.clear(args.claims)
    for cell in records.done(args.output, cell_of):
        (args.claims / claim_name(cell)).touch()
    if not args.calibration.exists():
        prepare(args)
    program = ["-m", "studies.quality.run", *sys.argv[1:], "--until", str(until)]
    sys.exit(workers.start(program, args.workers))


if __name__ == "__main__":
    main()
