"""The texts of semantic.py: by topic, with the topic vectors that classifiers give them, and as rows of tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_bundles.taxonomy import TOPICS
from studies import records
from studies.data import load
from studies.data.encoder import encoder_folder
from studies.training import autocast


OTHERS = ("plays", "wiki", "news")  # texts of no topic


def read_texts(wanted: dict[str, int]) -> dict[str, Any]:
    """{"train", "test"}: topic -> texts, "other": of no topic; "tau": source -> topic -> vectors of the training texts.

    The classifiers' vectors need scikit-learn and a sentence encoder; with fit: 0 there are only those of the lexicon.
    """
    from peft_bundles.routers.topic_sources import fit_topics, sentence_encoder

    texts: dict[str, Any] = {"train": {}, "test": {}, "tau": {}}
    for topic in TOPICS:
        for split in ("train", "test"):
            texts[split][topic] = [row["text"] for row in load(topic, split)][: wanted[split]]
    for split, count in (("train", wanted["other"]), ("test", wanted["test"])):
        parts = [[row["text"] for row in load(name, split)][: -(-count // len(OTHERS))] for name in OTHERS]
        texts[split]["other"] = [text for part in parts for text in part]
    fit: list[tuple[str, str | None]] = [
        (text[:800], topic) for topic in TOPICS for text in texts["train"][topic][: wanted["fit"]]
    ]
    fit += [(text[:800], None) for text in texts["train"]["other"][: wanted["fit"]]] if wanted["fit"] else []
    for source in ("lexicon", "embedding", "clusters") if fit else ("lexicon",):
        print(f"topic vectors of the training texts: {source}")
        embed = sentence_encoder(encoder_folder()) if source == "embedding" else None
        classify = fit_topics(source, TOPICS, [text for text, _ in fit], [topic for _, topic in fit], embed=embed)
        texts["tau"][source] = {
            topic: [[round(x, 4) for x in row] for row in classify([t[:800] for t in texts["train"][topic]]).tolist()]
            for topic in TOPICS
        }
    return texts


def write_texts(texts: dict[str, Any], path: Path) -> None:
    records.write_bytes(path, gzip.compress(json.dumps(texts, ensure_ascii=False).encode(), mtime=0))


def load_texts(path: Path) -> dict[str, Any]:
    """What `write_texts` wrote."""
    return json.loads(gzip.decompress(path.read_bytes()))


def encoded(tokenizer: Any, texts: list[str], length: int) -> tuple[Tensor, list[int]]:
    """The texts that fill a row as ids (N, length), and their indices."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts]
    kept = [n for n, row in enumerate(rows) if len(row) == length]
    return torch.tensor([rows[n] for n in kept]), kept


def rows_of(setting: dict[str, Any], texts: dict[str, Any], tokenizer: Any) -> tuple[Any, dict[str, Tensor]]:
    """Training rows by topic, (ids, tau) each, and test rows by topic and "other".

    Raises:
        ValueError: a topic with fewer rows of that length than are tested; topic vectors that the file has not.
    """
    if setting["tau"] != "tags" and setting["tau"] not in texts["tau"]:
        raise ValueError(f"tau: {setting['tau']!r}: the texts have {sorted(texts['tau'])}; prepare them with fit > 0.")
    train, test = {}, {}
    for number, topic in enumerate(TOPICS[: setting["topics"]]):
        ids, kept = encoded(tokenizer, texts["train"][topic], setting["length"])
        tau = torch.zeros(len(ids), len(TOPICS))
        tau[:, number] = 1
        if setting["tau"] != "tags":
            tau = torch.tensor([texts["tau"][setting["tau"]][topic][n] for n in kept])
        train[topic] = ids, tau[:, : setting["topics"]]
    for topic in (*TOPICS[: setting["topics"]], "other"):
        ids, _ = encoded(tokenizer, texts["test"][topic], setting["length"])
        if len(ids) < setting["test_rows"]:
            raise ValueError(
                f"test_rows: {setting['test_rows']}, but only {len(ids)} test texts of {topic!r} have "
                f"{setting['length']} tokens; read more (texts: test), or shorten the rows."
            )
        test[topic] = ids[: setting["test_rows"]]
    return train, test


@torch.no_grad()
def own_samples(base: Any, tokenizer: Any, count: int, length: int) -> list[str]:
    """Texts that the base model samples from its first token on; once for all cells."""
    torch.manual_seed(0)
    start = torch.full((count, 1), tokenizer.bos_token_id or 0, device=base.device)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "pad_token_id": tokenizer.pad_token_id}
    with autocast(base.device):
        ids = base.generate(input_ids=start, attention_mask=torch.ones_like(start), **options)
    return [text for text in tokenizer.batch_decode(ids, skip_special_tokens=True) if text.strip()]
