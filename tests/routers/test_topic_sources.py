"""Three sources of topic vectors on texts whose topics are plain to see, with a small encoder of words."""

import sys

import numpy as np
import pytest
import torch

from peft_bundles.routers.topic_sources import LEXICON, fit_topics
from peft_bundles.taxonomy import TOPICS


WORDS = {
    "law": ["court", "judge", "statute", "licence", "clause"],
    "animals": ["bird", "beak", "feather", "fish", "beetle"],
}
OTHER = ["kitchen", "window", "garden", "table", "yellow"]


def made(count: int = 40, seed: int = 0):
    rng = np.random.default_rng(seed)
    kinds = [*WORDS.items(), (None, OTHER)]
    return [(" ".join(rng.choice(words, 6)), topic) for _ in range(count) for topic, words in kinds]


def embed(texts):
    """Word counts, at length 1."""
    vocabulary = [w for words in WORDS.values() for w in words] + OTHER
    counts = np.array([[text.split().count(w) for w in vocabulary] for text in texts], dtype=float)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.mark.parametrize("source", ["lexicon", "embedding", "clusters", "clusters of embeddings"])
def test_texts_of_one_topic_of_two_and_of_none(source):
    texts, labels = zip(*made())
    given = embed if "embedding" in source else None
    lexicon = {topic: " ".join(words) for topic, words in WORDS.items()}
    classify = fit_topics(source.split()[0], list(WORDS), texts, labels, embed=given, lexicon=lexicon, clusters=12)
    new, wanted = zip(*made(20, seed=1))
    tau = classify(new)
    assert tau.shape == (60, 2) and tau.dtype == torch.float32 and bool(((tau >= 0) & (tau <= 1)).all())
    for row, topic in zip(tau, wanted):
        assert [t for t, x in zip(WORDS, row) if x >= 0.5] == ([] if topic is None else [topic])
    both = classify(["court judge bird beak statute feather"])[0]
    if not source.startswith("clusters"):  # a text is mostly near one group, and gets its topic
        assert bool((both > 0.2).all())


def test_labels_may_be_several():
    texts = [f"{a} {b}" for a in WORDS["law"] for b in WORDS["animals"]] + WORDS["law"] * 5 + OTHER * 3
    labels = [["law", "animals"]] * 25 + ["law"] * 25 + [None] * 15
    tau = fit_topics("embedding", list(WORDS), texts, labels, embed=embed)(["court bird", "judge", "kitchen"])
    assert (tau >= 0.5).tolist() == [[True, True], [True, False], [False, False]]


def test_clusters_have_names_of_their_words():
    texts, labels = zip(*made())
    clusters = fit_topics("clusters", list(WORDS), texts, labels, clusters=3)
    groups = {
        tuple(sorted(set(name.split("-")) & set(words)))
        for name in clusters.names
        for words in (*WORDS.values(), OTHER)
    }
    assert sum(len(g) == 3 for g in groups) == 3  # each name is three words of one kind
    np.testing.assert_allclose(clusters.nearness(texts).sum(1), 1)


def test_the_lexicon_sees_no_topic_where_there_is_no_word():
    tau = fit_topics("lexicon", TOPICS)(["the court heard the plaintiff and the defendant", "", "upon the stairs"])
    assert tau[0].argmax() == TOPICS.index("law") and tau[0, 4] > 0.8
    assert not tau[1:].any()
    assert set(LEXICON) == set(TOPICS)


def test_a_group_for_every_text():
    """Every text is at the middle of its group: no spread to measure a distance by."""
    texts = ["bird beak feather", "bird fish beak", "court judge clause", "court clause statute judge"]
    tau = fit_topics("clusters", ["animals", "law"], texts, ["animals"] * 2 + ["law"] * 2, embed=embed, clusters=4)(
        texts
    )
    assert tau.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_topics("oracle", ["law"]), "source='oracle' is unknown; choose one of lexicon"),
        (lambda: fit_topics("lexicon", ["law", "cooking"]), r"no words for \['cooking'\]"),
        (lambda: fit_topics("embedding", ["law"], ["a"], ["art"], embed=embed), "label 'art' is not a topic"),
        (lambda: fit_topics("embedding", ["law"], ["a", "b"], ["law"], embed=embed), "2 texts have 1 labels"),
        (lambda: fit_topics("clusters", ["law", "art"], ["a"], ["law"]), r"no text is labelled \['art'\]"),
        (
            lambda: fit_topics("embedding", ["law"], ["a", "b"], ["law"] * 2, embed=embed),
            r"every text is labelled \['law'\]",
        ),
        (
            lambda: fit_topics("clusters", ["law"], ["a", "b"], ["law", None], clusters=3),
            "clusters=3 must be from 2 to 2",
        ),
        (
            lambda: fit_topics("clusters", ["law"], ["bird beak", "court judge"] * 3, ["law", None] * 3, clusters=4),
            r"clusters=4, but the texts form only 2 \(are some texts equal\?\); ask for fewer",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("source", ["embedding", "clusters"])
def test_without_scikit_learn_the_error_says_how_to_install_it(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # Python then finds no such module
    with pytest.raises(ImportError, match=r'sklearn is not installed; run: pip install "peft-bundles\[analysis\]"'):
        fit_topics(source, ["law"], ["a", "b"], ["law", None], embed=embed)
    assert fit_topics("lexicon", ["law"])(["court"]).tolist() == [[0.5]]
