"""The parts of the heads' study: a signal's rows, its objective's loss, and what is measured on held-out rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_bundles.objectives import (
    Calibration,
    Confusion,
    Consistency,
    Contrastive,
    MetaCorrectness,
    Temporal,
    document_pairs,
)
from peft_bundles.objectives.calibration import ece
from peft_bundles.objectives.judged import mean_logprobs
from peft_bundles.objectives.tokens import at, masked_sum, pooled, token_entropy, token_logprobs
from studies.data.breaks import breaks
from studies.heads.bench import ROWS, Bench, Part, Parts, array, auc, auc_within, interval, mean
from studies.heads.make_data import Rows, derivations, documents, judged, own_pairs, people, solution_pairs


# ---- answers ----


def answers(bench: Bench) -> tuple[Rows, Rows]:
    return judged(bench.sample, bench.size(300), bench.size(150), bench.seed)


def of_logits(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return token_entropy(outputs.logits.float()), mean_logprobs(outputs, batch)


def of_origin(scores: np.ndarray, marks: np.ndarray, test: Rows, groups: np.ndarray) -> dict[str, Any]:
    """AUC of all answers, of the model's own, and of its own within a family of questions."""
    rows = test[: len(marks)]
    own = np.array([row["origin"] == "model" for row in rows])
    families = np.array([row["family"] for row in rows])
    return {
        "AUC": interval(auc(scores, marks), groups),
        "AUC, own answers": interval(auc(scores[own], marks[own]), groups[own]),
        "AUC, own answers within a family": interval(auc_within(scores[own], marks[own], families[own]), groups[own]),
        "own answers that are right": round(float(marks[own].mean()), 4),
    }


def confused(o: Confusion, parts: Parts, test: Rows, groups: np.ndarray) -> dict[str, Any]:
    scores = array([o.read(at(h, b["last"]))[:, 1] for h, _, b in parts])
    marks = array([b["correct"] for *_, b in parts])
    said, true, rows = [], [], []
    for i, (h, (entropy, _), b) in enumerate(parts):
        mask = b["completion_mask"][:, 1:] > 0
        said.append(o.read(h[:, :-1])[..., 0][mask])
        true.append(entropy[mask])
        rows.append(i * ROWS + mask.nonzero()[:, 0])
    guess, entropy, of = array(said), array(true), groups[array(rows).astype(int)]
    return {
        **of_origin(scores, marks, test, groups),
        "accuracy": interval(mean((scores > 0) == (marks > 0.5)), groups),
        "majority": round(float(max(marks.mean(), 1 - marks.mean())), 4),
        "entropy: R2": interval(lambda r: 1 - ((guess - entropy)[r] ** 2).mean() / entropy[r].var(), of),
    }


def calibrated(o: Calibration, parts: Parts, test: Rows, groups: np.ndarray) -> dict[str, Any]:
    """The constant is the share of right answers among the held-out rows themselves: the best there could be."""
    confidence = array([o.confidence(h, logprobs.float(), b)[0] for h, (_, logprobs), b in parts])
    before = array([logprobs.float().exp() for _, (_, logprobs), _ in parts])
    marks = array([b["correct"] for *_, b in parts])
    brier, constant = (confidence - marks) ** 2, (marks.mean() - marks) ** 2
    tensors = [torch.from_numpy(x) for x in (confidence, before, marks)]
    return {
        "brier": interval(mean(brier), groups),
        "brier before": interval(mean((before - marks) ** 2), groups),
        "brier of the constant share": interval(mean(constant), groups),
        "brier less the constant's": interval(mean(brier - constant), groups),
        "ece": interval(lambda r: float(ece(tensors[0][r], tensors[2][r])), groups),
        "ece before": interval(lambda r: float(ece(tensors[1][r], tensors[2][r])), groups),
    }


def single(o: MetaCorrectness, parts: Parts, test: Rows, groups: np.ndarray) -> dict[str, Any]:
    """By the head, and by the mean log-probability of the answer's tokens."""
    scores = array([o.scores(h, logprobs, b) for h, logprobs, b in parts])
    marks = array([b["correct"] for *_, b in parts])
    plain = array([per_token(logprobs, b) for _, logprobs, b in parts])
    return {**of_origin(scores, marks, test, groups), "by probability": of_origin(plain, marks, test, groups)}


def per_token(logprobs: Tensor, batch: dict[str, Any]) -> Tensor:
    """The mean of log p over the tokens of each completion, (B,)."""
    mask = batch["completion_mask"][:, 1:]
    return masked_sum(logprobs, mask) / mask.sum(1)


def sides(o: MetaCorrectness, parts: Parts, test: Rows, groups: np.ndarray) -> dict[str, Any]:
    """How often the right side is preferred: by the head, by its probability under the model, by its brevity."""
    gaps: dict[str, list[Tensor]] = {"accuracy": [], "the likelier side": [], "the shorter side": []}
    for h, logprobs, b in parts:
        kinds = (o.scores(h, logprobs, b), per_token(logprobs, b), -b["completion_mask"].sum(1).float())
        for name, score in zip(gaps, kinds):
            right, wrong = score.chunk(2)
            gaps[name].append((right > wrong).float() + 0.5 * (right == wrong).float())
    marks = {name: array(values) for name, values in gaps.items()}
    found: dict[str, Any] = {name: interval(mean(values), groups) for name, values in marks.items()}
    found["accuracy less the likelier side's"] = interval(mean(marks["accuracy"] - marks["the likelier side"]), groups)
    return found


class MeanOfTokens(MetaCorrectness):
    """s is the mean of what a head reads from every token of the reasoning: tried, and no better than the last one."""

    def scores(self, hidden: Tensor, logprobs: Tensor, batch: dict[str, Any]) -> Tensor:
        return pooled(self.read(hidden), batch["completion_mask"])[:, 0]


JUDGES: dict[str, Callable[[Rows], MetaCorrectness]] = {
    "last token": lambda rows: MetaCorrectness(rows, surprise=False),
    "mean of tokens": lambda rows: MeanOfTokens(rows, surprise=False),
    "with surprise": MetaCorrectness,
}


def judge(rows: Callable[[Bench], tuple[Rows, Rows]], kind: str, measure: Any = sides) -> Part:
    return Part(
        JUDGES[kind], rows, lambda o, p: o.compare(p[0], p[1], p[2])[0], measure,
        lambda outputs, batch: token_logprobs(outputs.logits, batch["input_ids"]),
    )  # fmt: skip


def worked(bench: Bench) -> tuple[Rows, Rows]:
    return derivations(bench.size(1600), bench.size(400), bench.seed)


def own(bench: Bench) -> tuple[Rows, Rows]:
    return own_pairs(bench.sample, bench.size(1000), bench.size(400), bench.seed)


def solved(bench: Bench) -> tuple[Rows, Rows]:
    found = solution_pairs(bench.data["solutions"], bench.size(700), bench.size(300), bench.seed)
    if len(found[1]) < ROWS:
        raise ValueError("the data has no marked solutions; prepare it with --gsm8k FOLDER, or leave this part out.")
    return found


# ---- statements ----


def contradicted(o: Consistency, parts: Parts, test: Rows, groups: np.ndarray) -> dict[str, Any]:
    reads = [b["read"] > 0 for *_, b in parts]
    scores = array([o.reader(h[r])[:, 0] for (h, *_), r in zip(parts, reads)])  # type: ignore[misc]
    marks = array([b["contradicts"][r] for (*_, b), r in zip(parts, reads)])
    of = groups[np.concatenate([i * ROWS + r.nonzero()[:, 0].cpu().numpy() for i, r in enumerate(reads)])]
    return {"AUC": interval(auc(scores, marks), of), "share that contradicts": round(float(marks.mean()), 4)}


def contradiction(o: Consistency, part: Any) -> Tensor:
    read = part[2]["read"] > 0
    return o.compare(part[0][read], part[2]["contradicts"][read])[0]["consistency"]


def statements(length: int) -> Callable[[Bench], tuple[Rows, Rows]]:
    def rows(bench: Bench) -> tuple[Rows, Rows]:
        seeds = (2 * bench.seed, 2 * bench.seed + 1)
        train, test = (
            breaks(people(bench.size(n), length, seed), seed=seed) for n, seed in zip((800, 300), seeds)
        )  # fmt: skip
        seen = {tuple(row["statements"]) for row in train}
        fresh = [row for row in test if tuple(row["statements"]) not in seen]
        return train, fresh

    return rows


# ---- documents ----


def contrasted(o: Contrastive, parts: Parts, test: Rows, groups: np.ndarray) -> dict[str, Any]:
    hits, chance = [], []
    for h, _, b in parts:
        anchors, positives = o.embed(h, b["attention_mask"]).chunk(2)
        allowed = o._negatives(b) | torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
        best = (anchors @ positives.T).masked_fill(~allowed, -2).argmax(1)
        hits.append(best == torch.arange(len(best), device=best.device))
        chance.append(1 / allowed.sum(1))
    return {"accuracy": interval(mean(array(hits)), groups), "chance": round(float(array(chance).mean()), 4)}


def pieces(bench: Bench) -> tuple[Rows, Rows]:
    parts = documents(bench.data["documents"], bench.seed)
    found = []
    for given, each, count in zip(parts, (8, 5), (640, 320)):
        rows = document_pairs({name: part[: 2 * each] for name, part in given.items()})
        random.Random(bench.seed).shuffle(rows)
        found.append(rows[: bench.size(count)])
    return found[0], found[1]


def followed(o: Temporal, parts: Parts, test: Rows, groups: np.ndarray) -> dict[str, Any]:
    """Next segment among those of 16 rows; and by the mean of the row's segments so far, without a head."""
    hits: dict[str, list[Tensor]] = {"accuracy": [], "by a row's own mean": []}
    for h, _, b in parts:
        z = o.read(h, b)
        goals = o.tracker(z)  # type: ignore[misc]
        so_far = z.cumsum(1) / torch.arange(1, z.shape[1] + 1, device=z.device)[None, :, None]
        for name, said in (("accuracy", o.tracker.expect(goals)), ("by a row's own mean", so_far)):  # type: ignore
            said, among = (torch.nn.functional.normalize(x, dim=-1) for x in (said[:, :-1], z))
            scores = said.flatten(0, 1) @ among.flatten(0, 1).T
            target = torch.arange(z.shape[0] * z.shape[1], device=z.device).view(z.shape[:2])[:, 1:].flatten()
            hits[name].append((scores.argmax(1) == target).view(len(z), -1).float().mean(1))
    found: dict[str, Any] = {name: interval(mean(array(values)), groups) for name, values in hits.items()}
    return {**found, "chance": round(1 / (ROWS * 4), 4)}


def segments(bench: Bench) -> tuple[Rows, Rows]:
    found = []
    for given, count in zip(documents(bench.data["documents"], bench.seed), (480, 240)):
        rows = [
            {"segments": part[i : i + 4], "document": name}
            for name, part in given.items()
            for i in range(0, min(len(part) - 3, 40), 4)
        ]
        random.Random(bench.seed).shuffle(rows)
        found.append(rows[: bench.size(count)])
    return found[0], found[1]


# Compared as heads alone only: of the pairs, the derivations say what training brings to either reading.
ALONE = (
    "single answers, last token",
    "derivations, mean of tokens",
    "own answers, last token",
    "solutions, last token",
)
PARTS: dict[str, Part] = {
    "confusion": Part(
        Confusion, answers, lambda o, p: o.compare(p[0], p[1][0].detach(), p[2])[0]["confusion"], confused, of_logits
    ),
    "calibration": Part(
        Calibration, answers, lambda o, p: o.compare(p[0], p[1][1].float(), p[2])[0]["calibration"], calibrated,
        of_logits,
    ),
    **{f"single answers, {kind}": judge(answers, kind, single) for kind in ("last token", "with surprise")},
    **{f"derivations, {kind}": judge(worked, kind) for kind in JUDGES},
    **{f"own answers, {kind}": judge(own, kind) for kind in ("last token", "with surprise")},
    **{f"solutions, {kind}": judge(solved, kind) for kind in ("last token", "with surprise")},
    "consistency, pairs": Part(Consistency, statements(1), contradiction, contradicted),
    "consistency, sequences": Part(Consistency, statements(4), contradiction, contradicted),
    "contrastive": Part(
        lambda given: Contrastive(given, max_length=40), pieces,
        lambda o, p: o.compare(o.embed(p[0], p[2]["attention_mask"]), p[2])[0]["contrastive"], contrasted,
        group="document", bare=True,
    ),
    "temporal": Part(
        Temporal, segments, lambda o, p: o.compare(o.read(p[0], p[2]), p[2]["segments"].any(-1))[0]["temporal"],
        followed, group="document", bare=True,
    ),
}  # fmt: skip
