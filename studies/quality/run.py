"""Learning against disturbance: SmolLM2-135M, one small training set, every method at its own best rate.

    python studies/quality/make_data.py --output data.json.gz
    python studies/quality/run.py --model DIR --data data.json.gz --sweep final --output results.jsonl --workers 6

A cell is (method, learning rate, seed): 300 steps of 48 examples, measured at steps 150 and 300. Cells are run side
by side by several processes a GPU (a step of so small a model is bound by kernel launches, so each is captured in a
CUDA graph), each appended to the output as it is done; cells that are there already are not run again.

Learn: exact match of greedy answers (by teacher forcing: greedy decoding gives the answer exactly when every token
of it is the argmax after the ones before) and the loss on plays. Disturb: rise of the loss, and KL to the base, on
domains that nobody trained or calibrated on; accuracy on facts the base knew.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_bundles.calibration import plain_samples
from studies.quality.make_data import PROMPT, load
from studies.quality.methods import Built, build


STEPS, LENGTH, WARMUP = 300, 64, 20
MEASURE_AT = (150,)  # and at the end
ROWS = {"biographies": 10, "codes": 10, "reasoning": 12, "gsm": 8, "plays": 8}  # of a batch of 48
OWN_HELD_OUT = 64  # rows of the base's own samples that nobody calibrates on
DOMAIN_LENGTH = 128
CHUNK = 25  # rows of a forward when measuring; several workers share a GPU
SWEEPS = Path(__file__).with_name("sweeps.json")


@dataclass
class Rows:
    """Padded token rows and the positions that count.

    ids: (N, T). where: (P,) flat positions in (N, T) whose next token counts. target: (P,). row: (P,). weight: (P,).
    """

    ids: Tensor
    where: Tensor
    target: Tensor
    row: Tensor
    weight: Tensor

    def to(self, device: Any) -> Rows:
        return Rows(*(t.to(device) for t in (self.ids, self.where, self.target, self.row, self.weight)))


Encoded = tuple[list[int], int]  # tokens, and the first that counts


def tokens_of(tokenizer: Any, example: Any) -> Encoded:
    """Example: a text (every token but the first counts), or (prompt, answer) (the answer counts)."""
    prompt, answer = ("", example) if isinstance(example, str) else example
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return before + tokenizer(answer, add_special_tokens=False)["input_ids"], max(len(before), 1)


def rows_of(examples: list[Encoded], length: int) -> Rows:
    """Every row has weight 1, shared by its tokens; texts are cut to the length."""
    length = min(length, max(len(tokens) for tokens, _ in examples))
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    where, target, row, weight = [], [], [], []
    for n, (tokens, first) in enumerate(examples):
        tokens = tokens[:length]
        ids[n, : len(tokens)] = torch.tensor(tokens)
        counted = range(first, len(tokens))
        for t in counted:
            where.append(n * length + t - 1)
            target.append(tokens[t])
            row.append(n)
            weight.append(1 / len(counted))
    return Rows(ids, *map(torch.tensor, (where, target, row, weight)))


# ---- data ----


def questions(tokenizer: Any, pairs: list[list[str]]) -> list[Encoded]:
    """Questions in chat format with their answers; those that do not fit are left out, in training and in tests."""
    encoded = [tokens_of(tokenizer, (PROMPT.format(question), answer + "<|im_end|>")) for question, answer in pairs]
    return [item for item in encoded if len(item[0]) <= LENGTH]


def training_batches(data: dict[str, Any], tokenizer: Any, steps: int, seed: int) -> Rows:
    """All batches stacked: ids (steps, 48, T), the rest (steps, P)."""
    rng, train = random.Random(seed), data["train"]
    pools = {kind: questions(tokenizer, train[kind]) for kind in ("biographies", "codes", "gsm")}
    pools["reasoning"] = questions(tokenizer, [pair for family in train["reasoning"].values() for pair in family])
    pools["plays"] = [tokens_of(tokenizer, text) for text in train["plays"]]
    queues: dict[str, list[Encoded]] = {kind: [] for kind in pools}

    def draw(kind: str) -> Encoded:
        if not queues[kind]:
            queues[kind] = rng.sample(pools[kind], len(pools[kind]))
        return queues[kind].pop()

    batches = [rows_of([draw(kind) for kind, n in ROWS.items() for _ in range(n)], LENGTH) for _ in range(steps)]
    most = max(len(b.where) for b in batches)  # one shape for all, so that one CUDA graph does
    padded = [[b.ids] + [F.pad(t, (0, most - len(t))) for t in (b.where, b.target, b.row, b.weight)] for b in batches]
    return Rows(*(torch.stack(parts) for parts in zip(*padded)))


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
            mine = (rows.row >= start) & (rows.row < start + CHUNK)
            ids, where = rows.ids[start : start + CHUNK], rows.where[mine] - start * length
            target = rows.target[mine]
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
                logits = logits_at(built, ids, where).float()
                if name.startswith(("domain", "own")):
                    states = base.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[where]
                    reference = base.lm_head(states).float().log_softmax(-1)
                    kl = kl + (reference.exp() * (reference - logits.log_softmax(-1))).sum()
            loss = loss + F.cross_entropy(logits, target, reduction="sum")
            right[rows.row[mine][logits.argmax(-1) != target]] = False
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
    """AdamW, linear warm-up and decay, gradient norm clipped at 1; measures at MEASURE_AT."""
    device = batches.ids.device
    rate = torch.zeros((), device=device)
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(built.parameters, lr=rate, weight_decay=built.decay, capturable=cuda, foreach=cuda)
    fixed = Rows(*(t[0].clone() for t in vars(batches).values()))
    losses = torch.zeros(2, device=device)

    def step() -> None:
        for parameter in built.parameters:
            parameter.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            logits = logits_at(built, fixed.ids, fixed.where)
            loss = (F.cross_entropy(logits.float(), fixed.target, reduction="none") * fixed.weight).sum() / len(
                fixed.ids
            )
            extra = built.extra() if built.extra else torch.zeros((), device=device)
        (loss + extra).backward()
        nn.utils.clip_grad_norm_(built.parameters, 1.0)
        optimizer.step()
        losses.copy_(torch.stack([loss.detach(), extra.detach().float()]))

    run = step
    if cuda and built.graph:
        with built.rows():
            run = capture(step, built, optimizer)
    record: dict[str, Any] = {"loss": []}
    begin = time.perf_counter()
    spent = 0.0
    for n in range(steps):
        rate.fill_(lr * min(1.0, (n + 1) / WARMUP) * max(0.0, (steps - n) / (steps - WARMUP) if n >= WARMUP else 1.0))
        for into, source in zip(vars(fixed).values(), vars(batches).values()):
            into.copy_(source[n])
        if built.progress is not None:
            built.progress.fill_(n / steps)
        with built.rows():
            run()
        if (n + 1) % 25 == 0:
            record["loss"].append([round(x, 4) for x in losses.tolist()])
            if not math.isfinite(record["loss"][-1][0]):
                record["diverged"] = n + 1
                break
        if n + 1 in MEASURE_AT or n + 1 == steps:
            pause = time.perf_counter()
            if built.progress is not None and n + 1 == steps:
                built.progress.fill_(1.0)
            record[str(n + 1)] = evaluate(built, base, sets)
            if built.tag is not None:
                record[str(n + 1)] |= tagged(built, base, sets)
            spent += time.perf_counter() - pause
    record["seconds"] = time.perf_counter() - begin - spent
    return record


def capture(step: Any, built: Built, optimizer: torch.optim.Optimizer) -> Any:
    """One step as a CUDA graph; the weights and the optimizer are as they were before the warm-up that it needs."""
    before = [p.detach().clone() for p in built.parameters]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    run = graph.replay
    try:
        with torch.cuda.graph(graph):
            step()
    except Exception as error:  # some method waits for the device somewhere
        print("no graph:", str(error)[:300], flush=True)
        torch.cuda.synchronize()
        run = step
    with torch.no_grad():
        for parameter, value in zip(built.parameters, before):
            parameter.copy_(value)
            for entry in optimizer.state[parameter].values():
                entry.zero_()
    return run


# ---- cells ----


def cells_of(sweeps: list[str]) -> list[tuple[str, float, int]]:
    """(method, learning rate, seed) of sweeps in sweeps.json."""
    cells, known = [], json.loads(SWEEPS.read_text())
    for block in (block for sweep in sweeps for block in known[sweep]):
        for method in block["methods"]:
            cells += [(method, lr, seed) for lr in block["lrs"] for seed in block["seeds"]]
    return list(dict.fromkeys(cells))


def done(output: Path) -> set[tuple[str, float, int]]:
    lines = output.read_text().splitlines() if output.exists() else []
    records = [json.loads(line) for line in lines]
    return {(r["method"], r["lr"], r["seed"]) for r in records if "error" not in r}


def work(args: argparse.Namespace) -> None:
    """One worker: takes every cell that nobody has claimed yet."""
    device = torch.device(f"cuda:{args.worker % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    data = load(args.data)
    calibration = {name: rows.to(device) for name, rows in load_file(args.calibration).items()}
    sets = {name: rows.to(device) for name, rows in evaluation_sets(data, tokenizer, calibration["own"]).items()}
    calibration["own"] = calibration["own"][:-OWN_HELD_OUT]
    batches: dict[int, Rows] = {}
    for method, lr, seed in cells_of(args.sweep):
        cell = f"{method}|{lr}|{seed}"
        try:
            os.close(os.open(args.claims / cell.replace("/", "_"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        if time.time() > args.until:
            return
        if seed not in batches:
            batches[seed] = training_batches(data, tokenizer, args.steps, seed).to(device)
        begin = time.perf_counter()
        record: dict[str, Any] = {"method": method, "lr": lr, "seed": seed}
        try:
            built = build(
                method, base, calibration, tokenizer, seed, [kind for kind, n in ROWS.items() for _ in range(n)]
            )
            record["trainable"] = sum(p.numel() for p in built.parameters)
            record["setup_seconds"] = time.perf_counter() - begin
            with built.context:
                record |= train(built, base, batches[seed], lr, args.steps, sets)
        except Exception:
            record["error"] = traceback.format_exc()[-1500:]
        built = None
        gc.collect()  # the step's closures, its graph and the model hold each other
        record["wall"] = time.perf_counter() - begin
        with open(args.output, "a") as file:
            file.write(json.dumps(record) + "\n")
        last = record.get(str(args.steps), {})
        learnt = [v for k, v in last.items() if k.startswith("learn")]
        print(cell, f"{record['wall']:.1f} s", record.get("error", "")[-300:], f"{sum(learnt):.2f}", flush=True)
        torch.cuda.empty_cache()


def prepare(args: argparse.Namespace) -> None:
    """Calibration rows of every source, and the base model's own measures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    data = load(args.data)
    rows = {}
    for name, texts in data["calibration"].items():
        ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"] + [0]]
        rows[name] = torch.tensor(ids[: len(ids) // DOMAIN_LENGTH * DOMAIN_LENGTH]).view(-1, DOMAIN_LENGTH)
    least = min(map(len, rows.values()))
    rows["mixture"] = torch.stack([r[:least] for r in rows.values()], 1).flatten(0, 1)
    torch.manual_seed(0)
    starts = {"endoftext": "<|endoftext|>", "user": "<|im_start|>user\n"}
    for name, start in starts.items():
        prompt = torch.tensor([tokenizer(start, add_special_tokens=False)["input_ids"]] * args.samples, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            rows[f"own_{name}"] = plain_samples(base, prompt, DOMAIN_LENGTH).cpu()
    rows["own"] = torch.stack([rows[f"own_{name}"] for name in starts], 1).flatten(0, 1)
    most = min(len(rows["own"]) - OWN_HELD_OUT, len(rows["mixture"]))
    rows["both"] = torch.stack([rows["own"][:most], rows["mixture"][:most]], 1).flatten(0, 1)
    save_file(rows, args.calibration)
    sets = {name: r.to(device) for name, r in evaluation_sets(data, tokenizer, rows["own"]).items()}
    built = Built(
        base, lambda ids: base.model(input_ids=ids, use_cache=False).last_hidden_state, list(base.parameters())
    )
    record = {"method": "base", "lr": 0.0, "seed": 0, "trainable": 0, str(args.steps): evaluate(built, base, sets)}
    record["environment"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python studies/quality/run.py", "--sweep", *args.sweep]),
        "data_md5": hashlib.md5(args.data.read_bytes()).hexdigest(),
    }
    with open(args.output, "a") as file:
        file.write(json.dumps(record) + "\n")
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
    if args.worker is not None:
        return work(args)
    until = time.time() + args.seconds
    args.claims.mkdir(parents=True, exist_ok=True)
    for claim in args.claims.iterdir():
        claim.unlink()
    for method, lr, seed in done(args.output):
        (args.claims / f"{method}|{lr}|{seed}".replace("/", "_")).touch()
    if not args.calibration.exists():
        prepare(args)
    command = [sys.executable, __file__, *sys.argv[1:], "--until", str(until), "--worker"]
    processes = [subprocess.Popen([*command, str(n)]) for n in range(args.workers)]
    sys.exit(max(p.wait() for p in processes))


if __name__ == "__main__":
    main()
