"""Do the heads of the meta and representation signals generalise? Frozen SmolLM2-135M, a JSON record a part.

    for part in judged consistency texts rollouts; do
        python benchmarks/meta_heads.py $part --output benchmarks/results/meta_heads_$part.json
    done

Final states of the base model (fresh `taxonomy` bundles, so nothing is changed) are computed once; then each
objective's head is trained on them with the objective's own loss, and measured on held-out questions, people, or
documents. Beside the owners' subspace the same head on the whole state (d = 576) says what the subspace costs.
Intervals are 95%, bootstrapped over questions, sequences or documents, not rows. Needs reasoning-gym.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import trl
from peft import get_peft_model
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
import _data  # noqa: E402
from meta_heads_data import ask, derivations, documents, judged, people  # noqa: E402

from peft_bundles import BundleConfig  # noqa: E402
from peft_bundles.data import logic  # noqa: E402
from peft_bundles.data.breaks import breaks  # noqa: E402
from peft_bundles.objectives import (  # noqa: E402
    PPO,
    Calibration,
    Confusion,
    Consistency,
    Contrastive,
    Forward,
    MetaCorrectness,
    Objective,
    Temporal,
    document_pairs,
)
from peft_bundles.objectives.calibration import ece  # noqa: E402
from peft_bundles.objectives.heads import at  # noqa: E402
from peft_bundles.objectives.intrinsic import advantage_error  # noqa: E402
from peft_bundles.objectives.judged import mean_logprobs  # noqa: E402
from peft_bundles.objectives.tokens import token_entropy  # noqa: E402


ROWS = 16  # of a forward and of a batch


# ---- features ----


def features(forward: Forward, objective: Objective, extra: Callable[..., Any] | None) -> list[Any]:
    """(final states, what the loss needs of the logits, batch) of the frozen model, by batches; a rest is dropped."""
    found = []
    for start in range(0, len(objective.rows) // ROWS * ROWS, ROWS):
        batch = objective.collate([objective.rows[i] for i in range(start, start + ROWS)])
        outputs = forward.current("all", batch)
        found.append((outputs.hidden, None if extra is None else extra(outputs, batch), batch))
    return found


def fit(head: torch.nn.Module, loss: Callable[[Any], Tensor], parts: list[Any], epochs: int = 60) -> None:
    """AdamW on the head alone; the parts in a new order each epoch."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.1)
    rng = random.Random(0)
    for _ in range(epochs):
        for part in rng.sample(parts, len(parts)):
            optimizer.zero_grad()
            loss(part).backward()
            optimizer.step()


def interval(measure: Callable[[np.ndarray], float], groups: np.ndarray, draws: int = 500) -> dict[str, float]:
    """A measure of row numbers, with its 95% interval over resampled groups."""
    rng, by = np.random.default_rng(0), [np.flatnonzero(groups == g) for g in np.unique(groups)]
    values = []
    for _ in range(draws):
        value = measure(np.concatenate([by[i] for i in rng.integers(len(by), size=len(by))]))
        values.append(value)
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return {
        k: round(float(v), 4) for k, v in (("value", measure(np.arange(len(groups)))), ("low", low), ("high", high))
    }


def auc(scores: np.ndarray, marks: np.ndarray) -> Callable[[np.ndarray], float]:
    def measure(rows: np.ndarray) -> float:
        return roc_auc_score(marks[rows], scores[rows]) if 0 < marks[rows].sum() < len(rows) else np.nan

    return measure


def mean(values: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda rows: float(values[rows].mean())


def array(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).detach().float().numpy()


# ---- the signals ----


class Bench:
    """Features once a signal, then its head on the owners' subspace and on the whole state."""

    def __init__(self, model: Any, tokenizer: Any, scale: float) -> None:
        self.model, self.tokenizer, self.scale = model, tokenizer, scale
        self.forward = Forward(model, {"all": ()}, {"all": {}})
        with torch.device("meta"):  # a model without bundles: its signals' subspace is everything
            self.bare = AutoModelForCausalLM.from_config(model.config)
        self.results: dict[str, Any] = {}
        self.features: dict[str, list[Any]] = {}

    def size(self, count: int) -> int:
        return max(int(count * self.scale), 2 * ROWS)

    def run(
        self, name: str, make: Callable[[Any], Objective], train: list[dict], test: list[dict], extra: Any,
        loss: Callable[..., Tensor], measure: Callable[..., dict[str, Any]], group: str = "item",
        shared: str = "",
    ) -> None:  # fmt: skip
        """`shared` names features that several signals read; others are kept under the signal's own name."""
        shared = shared or name
        start = time.perf_counter()
        parts = self.features.get(shared)
        if parts is None:
            parts = []
            for rows in (train, test):
                objective = make(rows)
                objective.setup(self.tokenizer, self.model)
                assert len(objective.rows) == len(rows), "a row was left out"
                parts.append(features(self.forward, objective, extra))
            self.features[shared] = parts
        count = ROWS * len(parts[1])
        groups = np.array([row[group] for row in test[:count]])
        cells: dict[str, Any] = {"rows": len(train), "held_out": count, "groups": len(set(groups.tolist()))}
        for where, model in (("subspace", self.model), ("whole state", self.bare)):
            objective = make(train)
            objective.setup(self.tokenizer, model)
            head = objective.head()
            assert head is not None
            with torch.no_grad():
                before = measure(objective, parts[1], groups)
            fit(head, lambda part, o=objective: loss(o, part), parts[0])
            with torch.no_grad():
                cells[where] = measure(objective, parts[1], groups)
            if name in ("contrastive", "temporal"):
                cells[where]["untrained"] = before
        cells["seconds"] = round(time.perf_counter() - start)
        self.results[name] = cells
        print(name, json.dumps(cells), flush=True)


def of_logits(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return token_entropy(outputs.logits), mean_logprobs(outputs, batch)


def confusion(bench: Bench, train: list[dict], test: list[dict]) -> None:
    def measure(o: Confusion, parts: Any, groups: np.ndarray) -> dict[str, Any]:
        scores = array([o.read(at(h, b["last"]))[:, 1] for h, _, b in parts])
        marks = array([b["correct"] for *_, b in parts])
        said, true, rows = [], [], []
        for i, (h, (entropy, _), b) in enumerate(parts):
            mask = b["completion_mask"][:, 1:] > 0
            said.append(o.read(h[:, :-1])[..., 0][mask])
            true.append(entropy[mask])
            rows.append(i * ROWS + mask.nonzero()[:, 0])
        guess, entropy = array(said), array(true)
        found = {
            "correct: AUC": interval(auc(scores, marks), groups),
            "correct: accuracy": interval(mean((scores > 0) == (marks > 0.5)), groups),
            "correct: majority": round(float(max(marks.mean(), 1 - marks.mean())), 4),
            "entropy: R2": interval(
                lambda r: 1 - ((guess - entropy)[r] ** 2).mean() / entropy[r].var(),
                groups[array(rows).astype(int)],
                200,
            ),
        }
        own = np.array([row["origin"] == "model" for row in test[: len(marks)]])
        found["correct: AUC, the model's own answers"] = interval(auc(scores[own], marks[own]), groups[own])
        found["the model's own answers that are right"] = round(float(marks[own].mean()), 4)
        return found

    bench.run(
        "confusion", Confusion, train, test, of_logits, lambda o, p: o.compare(p[0], p[1][0], p[2])[0]["confusion"],
        measure, shared="T_meta",
    )  # fmt: skip


def calibration(bench: Bench, train: list[dict], test: list[dict]) -> None:
    share = sum(row["correct"] for row in train) / len(train)

    def measure(o: Calibration, parts: Any, groups: np.ndarray) -> dict[str, Any]:
        confidence = array([o.confidence(h, logprobs, b)[0] for h, (_, logprobs), b in parts])
        before = array([logprobs.exp() for _, (_, logprobs), _ in parts])
        marks = array([b["correct"] for *_, b in parts])
        brier, tensors = (confidence - marks) ** 2, [torch.from_numpy(x) for x in (confidence, before, marks)]
        return {
            "brier": interval(mean(brier), groups),
            "brier before": interval(mean((before - marks) ** 2), groups),
            "brier of the constant share": interval(mean((share - marks) ** 2), groups),
            "brier less the constant's": interval(mean(brier - (share - marks) ** 2), groups),
            "ece": interval(lambda r: float(ece(tensors[0][r], tensors[2][r])), groups),
            "ece before": interval(lambda r: float(ece(tensors[1][r], tensors[2][r])), groups),
        }

    bench.run(
        "calibration", Calibration, train, test, of_logits,
        lambda o, p: o.compare(p[0], p[1][1], p[2])[0]["calibration"], measure, shared="T_meta",
    )  # fmt: skip


def meta_correctness(bench: Bench, train: list[dict], test: list[dict]) -> None:
    def single(o: MetaCorrectness, parts: Any, groups: np.ndarray) -> dict[str, Any]:
        scores = array([o.read(at(h, b["last"]))[:, 0] for h, _, b in parts])
        return {"AUC": interval(auc(scores, array([b["correct"] for *_, b in parts])), groups)}

    def pairs(o: MetaCorrectness, parts: Any, groups: np.ndarray) -> dict[str, Any]:
        gaps = []
        for h, _, b in parts:
            right, wrong = o.read(at(h, b["last"]))[:, 0].chunk(2)
            gaps.append(right - wrong)
        return {"pair accuracy (chance 0.5)": interval(mean(array(gaps) > 0), groups)}

    loss = lambda o, part: o.compare(part[0], {"sides": 1, **part[2]})[0]  # noqa: E731
    bench.run("meta_correctness, T_meta", MetaCorrectness, train, test, of_logits, loss, single, shared="T_meta")
    both = derivations(bench.size(144), bench.size(96))
    bench.run("meta_correctness, A/B derivations", MetaCorrectness, *both, None, loss, pairs)


def consistency(bench: Bench) -> None:
    def measure(o: Consistency, parts: Any, groups: np.ndarray) -> dict[str, Any]:
        reads = [b["read"] > 0 for *_, b in parts]
        scores = array([o.reader(h[r])[:, 0] for (h, *_), r in zip(parts, reads)])  # type: ignore[misc]
        marks = array([b["contradicts"][r] for (*_, b), r in zip(parts, reads)])
        of = groups[np.concatenate([i * ROWS + r.nonzero()[:, 0].numpy() for i, r in enumerate(reads)])]
        return {"AUC": interval(auc(scores, marks), of), "share that contradicts": round(float(marks.mean()), 4)}

    def loss(o: Consistency, part: Any) -> Tensor:
        read = part[2]["read"] > 0
        return o.compare(part[0][read], part[2]["contradicts"][read])[0]["consistency"]

    for name, length in (("pairs", 1), ("sequences", 4)):
        train, test = (breaks(people(bench.size(n), length, seed=n), seed=n) for n in (128, 80))
        bench.run(f"consistency, {name}", Consistency, train, test, None, loss, measure)


def contrastive(bench: Bench, train: dict[str, list[str]], test: dict[str, list[str]]) -> None:
    def rows(given: dict[str, list[str]], each: int, count: int) -> list[dict]:
        found = document_pairs({name: pieces[: 2 * each] for name, pieces in given.items()})
        random.Random(0).shuffle(found)
        return found[: bench.size(count)]

    def measure(o: Contrastive, parts: Any, groups: np.ndarray) -> dict[str, Any]:
        hits, chance = [], []
        for h, _, b in parts:
            embeddings = o.embed(h, b["attention_mask"])
            anchors, positives = embeddings.chunk(2)
            allowed = o._negatives(b) | torch.eye(len(anchors), dtype=torch.bool)
            best = (anchors @ positives.T).masked_fill(~allowed, -2).argmax(1)
            hits.append(best == torch.arange(len(best)))
            chance.append(1 / allowed.sum(1))
        return {
            "accuracy": interval(mean(array(hits)), groups),
            "chance": round(float(array(chance).mean()), 4),
        }

    def loss(o: Contrastive, part: Any) -> Tensor:
        return o.compare(o.embed(part[0], part[2]["attention_mask"]), part[2])[0]["contrastive"]

    make = lambda given: Contrastive(given, max_length=40)  # noqa: E731
    bench.run("contrastive", make, rows(train, 8, 240), rows(test, 5, 144), None, loss, measure, "document")


def temporal(bench: Bench, train: dict[str, list[str]], test: dict[str, list[str]]) -> None:
    def rows(given: dict[str, list[str]], count: int) -> list[dict]:
        found = [
            {"segments": pieces[i : i + 4], "document": name}
            for name, pieces in given.items()
            for i in range(0, min(len(pieces) - 3, 16), 4)
        ]
        random.Random(0).shuffle(found)
        return found[: bench.size(count)]

    def measure(o: Temporal, parts: Any, groups: np.ndarray) -> dict[str, Any]:
        """Next segment among those of 16 rows; and by the mean of the row's segments so far, without a head."""
        hits: dict[str, list[Tensor]] = {"accuracy": [], "by a row's own mean": []}
        for h, _, b in parts:
            z = o.read(h, b)
            goals = o.tracker(z)  # type: ignore[misc]
            so_far = z.cumsum(1) / torch.arange(1, z.shape[1] + 1)[None, :, None]
            for name, said in (("accuracy", o.tracker.expect(goals)), ("by a row's own mean", so_far)):  # type: ignore
                said, among = (torch.nn.functional.normalize(x, dim=-1) for x in (said[:, :-1], z))
                scores = said.flatten(0, 1) @ among.flatten(0, 1).T
                target = torch.arange(z.shape[0] * z.shape[1]).view(z.shape[:2])[:, 1:].flatten()
                hits[name].append((scores.argmax(1) == target).view(len(z), -1).float().mean(1))
        found: dict[str, Any] = {name: interval(mean(array(values)), groups) for name, values in hits.items()}
        return {**found, "chance": round(1 / (ROWS * 4), 4)}

    bench.run(
        "temporal", Temporal, rows(train, 128), rows(test, 80), None,
        lambda o, part: o.compare(o.read(part[0], part[2]), part[2]["segments"].any(-1))[0]["temporal"], measure,
        "document",
    )  # fmt: skip


def rollouts(bench: Bench) -> None:
    """Advantage and curiosity on completions sampled for sums; held out: other sums."""

    def near(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        texts = [c[0]["content"] for c in completions]
        found = [re.findall(r"-?\d+", text) for text in texts]
        return [float(bool(n) and n[-1] == a) + 0.2 * (len(n) == 1) for n, a in zip(found, answer)]

    start, count = time.perf_counter(), [bench.size(n) for n in (64, 48)]
    rows = [[{"prompt": ask(r["question"]), "answer": r["answer"]} for r in part] for part in logic("products", *count)]
    objective = PPO(rows[0], near, advantages="grpo", num_generations=2, max_completion_length=12, kl_coef=0.0,
                    advantage_coef=1.0, curiosity_coef=1.0, name="all")  # fmt: skip
    objective.setup(bench.tokenizer, bench.model)
    parts: list[list[Any]] = [[], []]
    for which, given in enumerate((objective.rows, objective.prepare(datasets.Dataset.from_list(rows[1]), "eval"))):
        for i in range(0, len(given), 2 * ROWS):
            chunk = given[i : i + 2 * ROWS]
            batch = objective.rollout(bench.forward, chunk, ("bench", which, i), ROWS, reduce=False)
            hidden = bench.forward.current("all", batch).hidden
            groups = torch.arange(len(chunk)).repeat_interleave(2) + i
            parts[which].append((hidden, groups, batch))
    head, curiosity = objective.advantage_head, objective.curiosity
    assert head is not None and curiosity is not None

    def kept(part: Any) -> Tensor:
        return part[2]["completion_mask"][:, 1:] > 0

    fit(head, lambda p: advantage_error(head, p[0], p[2]["advantages"])[0][kept(p)].mean(), parts[0])
    fit(curiosity, lambda p: curiosity(p[0], p[2]["input_ids"], p[2]["next_states"])[kept(p)].mean(), parts[0])
    with torch.no_grad():
        groups = np.concatenate([p[1][kept(p).nonzero()[:, 0]].numpy() for p in parts[1]])
        said = array([advantage_error(head, p[0], p[2]["advantages"])[1][kept(p)] for p in parts[1]])
        true = array([p[2]["advantages"][kept(p)] for p in parts[1]])
        error = array([curiosity(p[0], p[2]["input_ids"], p[2]["next_states"])[kept(p)] for p in parts[1]])
        average = torch.cat([p[2]["next_states"][kept(p)] for p in parts[0]]).mean(0)
        plain = array([(p[2]["next_states"][kept(p)] - average).square().mean(-1) for p in parts[1]])
    common = {"rows": 2 * count[0], "held_out": 2 * count[1], "groups": count[1], "tokens": len(groups)}
    seconds = round(time.perf_counter() - start)
    bench.results["advantage"] = {**common, "subspace": {
        "correlation": interval(lambda r: float(np.corrcoef(said[r], true[r])[0, 1]), groups),
        "R2": interval(lambda r: 1 - float(((said - true)[r] ** 2).mean() / (true[r] ** 2).mean()), groups),
        "share of tokens with an advantage": round(float((true != 0).mean()), 4)}, "seconds": seconds}  # fmt: skip
    bench.results["curiosity"] = {**common, "subspace": {
        "error": interval(mean(error), groups), "error of the mean": interval(mean(plain), groups),
        "R2": interval(lambda r: 1 - float(error[r].mean() / plain[r].mean()), groups)},
        "seconds": seconds}  # fmt: skip
    for name in ("advantage", "curiosity"):
        print(name, json.dumps(bench.results[name]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="a part of the rows, to try it out")
    options = parser.parse_args()
    folder = _data.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    bench = Bench(
        get_peft_model(base, BundleConfig(preset="taxonomy", task_type="CAUSAL_LM")), tokenizer, options.scale
    )
    start = time.perf_counter()
    PARTS[options.part](bench)
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
        "device": "cpu",
        "model": "SmolLM2-135M-Instruct, fresh bundles of preset taxonomy (random basis, not calibrated)",
        "head": "linear (temporal: a GRU), AdamW 3e-3, weight decay 0.1, 60 epochs in batches of 16",
        "seconds": round(time.perf_counter() - start),
        "signals": bench.results,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")


def of_answers(bench: Bench) -> None:
    both = judged(bench.forward, bench.tokenizer, bench.size(80), bench.size(56))
    for signal in (confusion, calibration, meta_correctness):
        signal(bench, *both)


def of_texts(bench: Bench) -> None:
    both = documents()
    for signal in (contrastive, temporal):
        signal(bench, *both)


PARTS: dict[str, Callable[[Bench], None]] = {
    "judged": of_answers,
    "consistency": consistency,
    "texts": of_texts,
    "rollouts": rollouts,
}


if __name__ == "__main__":
    main()
