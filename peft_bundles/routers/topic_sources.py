"""Topic vectors tau (N, K) of N texts and K topics, from one of three sources; see `fit_topics`.

"lexicon" counts words. "embedding" fits a logistic regression per topic on the vectors of a sentence encoder.
"clusters" finds groups of texts without labels. The last two need scikit-learn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from ..extras import require


SOURCES = ("lexicon", "embedding", "clusters")
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # on the Hub, Apache-2.0

Labels: TypeAlias = Sequence[str | Sequence[str] | None]  # for every text its topic, its topics, or None
Embed: TypeAlias = Callable[[Sequence[str]], np.ndarray]  # N texts -> (N, d), rows of length 1

# Topic -> words. Written by hand before any accuracy was measured.
LEXICON: dict[str, str] = {
    "animals": (
        "animal animals mammal mammals bird birds fish fishes insect insects reptile snake lizard frog dog cat "
        "horse cow sheep goat whale shark beetle moth butterfly spider crab mollusk shell species genus family "
        "fur feathers wings tail fins beak larva larvae nest prey predator habitat zoology breed eggs feed "
        "aquatic marine monkey bear wolf deer"
    ),
    "ml": (
        "model models training train trained tensor tensors gradient gradients loss optimizer layer layers neural "
        "network batch tokenizer tokens dataset classifier regression clustering kernel estimator estimators "
        "features feature hyperparameter logits embedding embeddings attention transformer transformers learning "
        "epoch inference predict samples weights dropout activation softmax lora adapter quantization checkpoint "
        "array ndarray n_samples n_features"
    ),
    "programming": (
        "program programs programming code compiler function functions method class object objects string "
        "variable variables module modules language python java unix file files directory pointer memory thread "
        "process exception argument arguments iterator loop syntax debug software operating algorithm interface "
        "protocol library byte bytes socket server command return returns raise stack hash bit bits data computer "
        "computing"
    ),
    "finance": (
        "money bank banks banking account accounts accounting loan loans interest stock stocks shares dividend "
        "dividends bond bonds investment investments investor tax taxes income expense expenses asset assets "
        "liability equity credit debit debt currency price prices market markets payment payments invoice capital "
        "fund funds broker trading commission ledger balance balances transaction transactions insurance mortgage "
        "pension profit budget"
    ),
    "law": (
        "law laws legal court courts judge jury lawsuit plaintiff defendant attorney lawyer statute license "
        "licensee licensor copyright liability warranty warranties contract agreement clause jurisdiction rights "
        "patent trademark damages hereby herein thereof pursuant provisions party parties crime criminal "
        "prosecution verdict appeal testimony tort writ trial contributor redistribution infringement indemnify"
    ),
    "medical": (
        "disease diseases patient patients medical medicine doctor physician surgery surgical symptom symptoms "
        "syndrome infection infections virus bacterial fever pain chronic acute injury fracture tumor cancer "
        "artery vein muscle nerve bone kidney liver heart lung blood skin therapy treatment drug drugs dose "
        "diagnosis clinical disorder disorders inflammation neoplasm hemorrhage pregnancy congenital tissue "
        "anatomy"
    ),
}


def fit_topics(
    source: str,
    topics: Sequence[str],
    texts: Sequence[str] = (),
    labels: Labels = (),
    *,
    embed: Embed | None = None,
    lexicon: Mapping[str, str] | None = None,
    clusters: int = 24,
    seed: int = 0,
) -> Callable[[Sequence[str]], Tensor]:
    """Fit a classifier of topics.

    Args:
        source: "lexicon" counts words and needs no texts; "embedding" learns from texts and labels; "clusters" groups
            the texts and reads the labels only to see which topics a group has.
        topics: names of the K topics, the columns of tau.
        texts: texts to learn from.
        labels: for every text a topic, a list of topics, or None for no topic.
        embed: sentence encoder, N texts -> (N, d) at length 1. None takes `sentence_encoder()` for "embedding" and
            words (TF-IDF, reduced) for "clusters".
        lexicon: topic -> words, separated by spaces. None takes `LEXICON`.
        clusters: number of groups.
        seed: seed of everything random.

    Returns:
        A function from N texts to their topic vectors tau, (N, K) float32 in [0, 1]; several topics may be large.

    Raises:
        ValueError: the source is unknown, a topic has no words or no text, a label is not a topic, or texts and labels
            differ in number.
        ImportError: "embedding" or "clusters" without scikit-learn.

    Example:
        >>> from peft_bundles.routers.topic_sources import fit_topics
        >>> classify = fit_topics("lexicon", ["law", "animals"])
        >>> classify(["The court heard the lawyer.", "A bird and a fish."]).round(decimals=2)
        tensor([[0.7500, 0.0000],
                [0.0000, 0.7500]])
    """
    topics = list(topics)
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown; choose one of {', '.join(SOURCES)}.")
    if source == "lexicon":
        return Lexicon(topics, LEXICON if lexicon is None else lexicon)
    require("sklearn", "analysis")
    table = label_table(topics, texts, labels)
    if source == "embedding":
        return Embedding(topics, texts, table, embed or sentence_encoder(), seed)
    return Clusters(topics, texts, table, embed, clusters, seed)


def label_table(topics: Sequence[str], texts: Sequence[str], labels: Labels) -> np.ndarray:
    """Labels as a table (N, K) of 0 and 1.

    Raises:
        ValueError: texts and labels differ in number, a label is not a topic, or a topic has no text.
    """
    if len(labels) != len(texts) or not texts:
        raise ValueError(f"{len(texts)} texts have {len(labels)} labels; give one per text (None for no topic).")
    table = np.zeros((len(texts), len(topics)))
    for row, label in zip(table, labels):
        for topic in () if label is None else (label,) if isinstance(label, str) else label:
            if topic not in topics:
                raise ValueError(f"label {topic!r} is not a topic; use {list(topics)}, or None for no topic.")
            row[list(topics).index(topic)] = 1
    if empty := [topic for topic, count in zip(topics, table.sum(0)) if not count]:
        raise ValueError(f"no text is labelled {empty}; label at least one text per topic, or leave the topic out.")
    return table


class Lexicon:
    """tau_k = (1 - 2^-h_k) h_k / max_j h_j, with h_k the words of topic k in a text.

    tau_k is 0 without such words and near 1 with many of one topic.

    Failure mode: common words have several senses, so it reports topics that a text does not have.
    """

    def __init__(self, topics: list[str], lexicon: Mapping[str, str]) -> None:
        if missing := [topic for topic in topics if not lexicon.get(topic, "").split()]:
            raise ValueError(f"lexicon has no words for {missing}; add some, such as {{{missing[0]!r}: 'word word'}}.")
        self.topics, self.words = topics, [set(lexicon[topic].split()) for topic in topics]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        hits = torch.zeros(len(texts), len(self.topics))
        for row, text in zip(hits, texts):
            counts = Counter(re.findall(r"[a-z_]+", text.lower()))
            for k, words in enumerate(self.words):
                row[k] = sum(counts[word] for word in words)
        return (1 - 0.5**hits) * hits / hits.amax(1, keepdim=True).clamp_min(1)


class Embedding:
    """One logistic regression per topic on sentence embeddings: K independent probabilities.

    Failure mode: trained on texts of one topic, it rarely gives two topics more than 0.5.
    """

    def __init__(self, topics: list[str], texts: Sequence[str], table: np.ndarray, embed: Embed, seed: int) -> None:
        if everywhere := [topic for topic, share in zip(topics, table.mean(0)) if share == 1]:
            raise ValueError(
                f"every text is labelled {everywhere}, so it cannot be told from anything; add other texts."
            )
        from sklearn.linear_model import LogisticRegression

        self.topics, self.embed = topics, embed
        states = embed(texts)
        self.heads = [LogisticRegression(C=10, max_iter=1000, random_state=seed).fit(states, y) for y in table.T]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        states = self.embed(texts)
        columns = [head.predict_proba(states)[:, 1] for head in self.heads]
        return torch.tensor(np.stack(columns, 1), dtype=torch.float32)


class Clusters:
    """K-means groups of texts; tau is the mean of the topics of the groups that a text is near.

    Failure mode: a text is mostly near one group, so it rarely gets two topics; groups follow style as much as topic.

    Attributes:
        names: of the groups, their three most typical words.
        shares: (groups, K), the share of a group's texts that have each topic.
    """

    def __init__(
        self, topics: list[str], texts: Sequence[str], table: np.ndarray, embed: Embed | None, count: int, seed: int
    ) -> None:
        if not 2 <= count <= len(texts):
            raise ValueError(f"clusters={count!r} must be from 2 to {len(texts)}, the number of texts.")
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer

        words = TfidfVectorizer(stop_words="english", sublinear_tf=True, min_df=2, token_pattern=r"[A-Za-z_]{3,}")
        counts = words.fit_transform(texts)
        if embed is None:
            size = min(100, counts.shape[1] - 1, len(texts) - 1)
            reduce = make_pipeline(TruncatedSVD(size, random_state=seed), Normalizer()).fit(counts)
            embed = cast(Embed, lambda new: reduce.transform(words.transform(new)))
        self.topics, self.embed = topics, embed
        states = embed(texts)
        self.means: Any = KMeans(count, n_init=4, random_state=seed).fit(states)
        group_of = self.means.labels_
        if (groups := len(np.unique(group_of))) < count:
            raise ValueError(
                f"clusters={count}, but the texts form only {groups} (are some texts equal?); ask for fewer."
            )
        vocabulary = words.get_feature_names_out()
        typical = [np.asarray(counts[group_of == c].mean(0)).ravel().argsort()[::-1][:3] for c in range(count)]
        self.names = ["-".join(vocabulary[i] for i in best) for best in typical]
        self.shares = np.stack([table[group_of == c].mean(0) for c in range(count)])
        # Distances are measured in units of the spread within groups.
        self.scale = max(
            float(np.square(self.means.transform(states).min(1)).mean()), 1e-12
        )  # the spread is 0 if every text is a group

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor(self.nearness(texts) @ self.shares, dtype=torch.float32).clamp(0, 1)

    def nearness(self, texts: Sequence[str]) -> np.ndarray:
        """softmax(-distance^2 / (spread within groups / 10)) of every text over the groups, (N, groups)."""
        distance = np.square(self.means.transform(self.embed(texts)))
        logits = -(distance - distance.min(1, keepdims=True)) / (0.1 * self.scale)
        return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def sentence_encoder(folder: str | Path = ENCODER, batch: int = 32, max_length: int = 128) -> Embed:
    """A sentence encoder as a function from N texts to vectors (N, d) of length 1: the mean last state over tokens.

    Args:
        folder: folder of a model (safetensors and tokenizer) or its id on the Hub. Default: all-MiniLM-L6-v2, d = 384.
        batch: texts in one forward.
        max_length: tokens kept of a text.

    Returns:
        A function that `fit_topics` takes as `embed`.

    Raises:
        OSError: there is no such folder, and the Hub has no such model or cannot be reached.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), batch):
            part = list(texts[start : start + batch])
            inputs = tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors.append(torch.nn.functional.normalize(mean, dim=1))
        return torch.cat(vectors).numpy()

    return embed
