"""Forgetting and transfer of matrices made by hand, intervals that cover, probes, CKA."""

import math

import numpy as np
import pytest
import torch

from peft_bundles.evaluation import AlphaSweep
from studies.measures import continual, representations
from studies.measures.continual import Run


pytestmark = pytest.mark.studies
# Three tasks, trained as 0, 1, 2; rows: before, after each phase.
TABLE = np.array([[0.0, 0.1, 0.2], [0.8, 0.1, 0.3], [0.5, 0.7, 0.3], [0.6, 0.4, 0.9]])
ORDER = [0, 1, 2]


def test_a_matrix_by_hand():
    assert continual.average_accuracy(TABLE) == pytest.approx((0.6 + 0.4 + 0.9) / 3)
    assert continual.backward_transfer(TABLE, ORDER) == pytest.approx(((0.6 - 0.8) + (0.4 - 0.7)) / 2)
    assert continual.forward_transfer(TABLE, ORDER) == pytest.approx(((0.1 - 0.1) + (0.3 - 0.2)) / 2)
    assert continual.forgetting_by_task(TABLE, ORDER) == pytest.approx({0: 0.2, 1: 0.3})
    assert continual.forgetting(TABLE, ORDER) == pytest.approx(0.25)
    matrix = continual.interference_matrix(TABLE)
    assert matrix.shape == (3, 3)
    assert np.allclose(TABLE[0] + matrix.sum(0), TABLE[-1])  # the phases add up to what came out


def test_the_order_says_who_was_trained_when():
    moved = TABLE[:, [2, 0, 1]]  # the same run with its columns in another order
    order = [1, 2, 0]
    for measure in (continual.backward_transfer, continual.forward_transfer, continual.forgetting):
        assert measure(moved, order) == pytest.approx(measure(TABLE, ORDER))


def test_forgetting_is_from_the_best_and_transfer_from_the_own_phase():
    gains = np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.7, 0.5, 0.0], [0.4, 0.5, 0.5]])
    assert continual.forgetting_by_task(gains, ORDER)[0] == pytest.approx(0.3)
    assert continual.backward_transfer(gains, ORDER) == pytest.approx(-0.05)  # of 0.5 and 0.5, not of 0.7


@pytest.mark.parametrize(
    ("scores", "order", "message"),
    [
        (TABLE, [0, 1], "columns a phase \\(3\\)"),
        (TABLE, [0, 1, 1], "none twice"),
        (TABLE, [0, 1, 3], "one of 3 columns"),
        (TABLE[:2], [0], r"at least 2 phase\(s\)"),
        (TABLE[0], ORDER, "give \\(phases"),
    ],
)
def test_bad_matrices(scores, order, message):
    with pytest.raises(ValueError, match=message):
        continual.forgetting(scores, order)


def runs(rng, keep, seeds, items=60, learnt=0.8):
    """Two tasks; a share `keep` of what the first knew is left after the second, by item."""
    made = {}
    for seed in range(seeds):
        known, kept = rng.random(items) < learnt, rng.random(items) < keep
        zero = np.zeros(items)
        made[seed] = Run(
            ["a", "b"],
            {"a": np.stack([zero, known, known & kept]), "b": np.stack([zero, zero, rng.random(items) < 0.5])},
        )
    return made


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth, covered, widths = 1 - 0.2 / 0.6, 0, []
    for n in range(60):
        rng = np.random.default_rng(n)
        found = continual.forgetting_reduction(runs(rng, 0.4, 5), runs(rng, 0.8, 5), draws=200, seed=n)
        assert found.low <= found.estimate <= found.high and found.runs == 5
        covered += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert covered >= 54  # of 60: 0.9, where the interval says 0.95
    assert np.mean(widths) < 0.4  # and it is not so wide as to cover anything


def test_a_condition_against_itself():
    some = runs(np.random.default_rng(0), 0.5, 3)
    assert continual.forgetting_reduction(some, some) == continual.Interval(0.0, 0.0, 0.0, 3)
    assert continual.score_difference(some, some, ["a", "b"]) == continual.Interval(0.0, 0.0, 0.0, 3)


def test_the_estimate_is_the_means_and_only_shared_runs_count():
    rng = np.random.default_rng(0)
    reference, other = runs(rng, 0.4, 4), runs(rng, 0.9, 3)

    def forgotten(found):
        return np.mean([(run.items["a"][1].mean() - run.items["a"][2].mean()) for run in found])

    found = continual.forgetting_reduction(reference, other)
    assert found.runs == 3
    assert found.estimate == pytest.approx(1 - forgotten(other.values()) / forgotten([reference[s] for s in other]))
    difference = continual.score_difference(reference, other, ["a"])
    expected = [np.mean([side[s].items["a"][-1].mean() for s in other]) for side in (reference, other)]
    assert difference.estimate == pytest.approx(expected[1] - expected[0])
    with pytest.raises(ValueError, match="no run in both"):
        continual.forgetting_reduction(reference, {"x": other[0]})


def test_nothing_forgotten_leaves_nothing_to_reduce():
    rng = np.random.default_rng(0)
    assert math.isnan(continual.forgetting_reduction(runs(rng, 1.0, 3), runs(rng, 0.5, 3)).estimate)


def test_means_alone_give_an_interval_from_runs():
    rng = np.random.default_rng(0)

    def means(found):
        return {
            seed: Run(run.order, {task: scores.mean(1, keepdims=True) for task, scores in run.items.items()})
            for seed, run in found.items()
        }

    reference, other = runs(rng, 0.4, 5), runs(rng, 0.8, 5)
    whole = continual.forgetting_reduction(reference, other)
    alone = continual.forgetting_reduction(means(reference), means(other))
    assert alone.estimate == pytest.approx(whole.estimate)
    assert alone.low < alone.estimate < alone.high


def test_other_test_items_do_not_compare():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"has \[50, 60\] test items"):
        continual.forgetting_reduction(runs(rng, 0.4, 2), runs(rng, 0.8, 2, items=50))


def test_what_an_alpha_moves():
    alphas = [0.0, 0.5, 1.0]
    scores = np.array([[0.1, 0.3, 0.3], [0.4, 0.3, 0.2], [0.9, 0.3, 0.4]])
    assert continual.sensitivity(alphas, scores) == pytest.approx([0.55, 0.0, 0.1])
    assert continual.cross_sensitivity(alphas, scores, 0) == pytest.approx(0.05 / 0.55)
    assert math.isnan(continual.cross_sensitivity(alphas, scores, 1))
    import torch

    sweep = AlphaSweep("b", alphas, {str(t): torch.tensor(scores[:, t : t + 1]) for t in range(3)}, 1)
    assert [sweep.effect(str(t)) for t in range(3)] == pytest.approx(continual.sensitivity(alphas, scores))
    with pytest.raises(ValueError, match="need 0 and another"):
        continual.sensitivity([0.5, 1.0], scores[1:])
    with pytest.raises(ValueError, match="own=3"):
        continual.cross_sensitivity(alphas, scores, 3)


# ---- representations ----


def clusters(gap, n=40, d=12, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(["facts", "logic", "meta"], n)
    centres = gap * rng.standard_normal((3, d))
    return rng.standard_normal((3 * n, d)) + centres.repeat(n, 0), labels


def test_probes_and_silhouettes_tell_clusters_apart_and_noise_not():
    apart, noise = clusters(4.0), clusters(0.0)
    found, nothing = representations.linear_probe(*apart), representations.linear_probe(*noise)
    assert found["accuracy"] > 0.99 and found["chance"] == pytest.approx(1 / 3)
    assert abs(nothing["accuracy"] - 1 / 3) < 0.15
    assert representations.silhouette(*apart) > 0.4 > 0.05 > representations.silhouette(*noise)


def test_cka_does_not_see_rotation_scale_and_shift():
    x, _ = clusters(1.0)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))
    assert representations.cka(x, x) == pytest.approx(1.0)
    assert representations.cka(x, 3 * x @ rotation + 7) == pytest.approx(1.0)
    assert representations.cka(x, np.random.default_rng(2).standard_normal((120, 12))) < 0.3


def test_cka_is_the_one_of_the_kernels():
    x, _ = clusters(1.0)
    y = np.tanh(x[:, :5])
    centring = np.eye(120) - 1 / 120
    k, m = (centring @ (z @ z.T) @ centring for z in (x, y))
    assert representations.cka(x, y) == pytest.approx((k * m).sum() / np.linalg.norm(k) / np.linalg.norm(m))


def test_covariances_of_tasks():
    rng = np.random.default_rng(0)
    left, right = np.zeros((50, 8)), np.zeros((30, 8))
    left[:, :4], right[:, 4:] = rng.standard_normal((50, 4)), rng.standard_normal((30, 4))
    assert representations.covariance_cka(left, left) == pytest.approx(1.0)
    assert representations.covariance_cka(left, 2 * left + 1) == pytest.approx(1.0)
    assert representations.covariance_cka(left, right) == pytest.approx(0.0)
    x, y = rng.standard_normal((50, 8)), rng.standard_normal((30, 8)) * np.arange(8)
    a, b = np.cov(x.T), np.cov(y.T)
    expected = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert representations.covariance_cka(x, y) == pytest.approx(expected)


def test_pictures():
    x, labels = clusters(4.0)
    coordinates, share = representations.pca(x)
    assert coordinates.shape == (120, 2) and 0 < share[1] <= share[0] and share.sum() <= 1
    assert np.allclose(
        coordinates, representations.pca(np.concatenate([x, np.ones((120, 1))], 1))[0]
    )  # a constant channel
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        picture = representations.umap(x)
        assert torch.get_num_threads() == 1, "numba sets its own"
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(picture, representations.umap(x))
    assert representations.silhouette(picture, labels) > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: representations.linear_probe(x, y[:-1]), "give \\(N, D\\) and \\(N,\\)"),
        (lambda x, y: representations.silhouette(x, ["a"] * len(x)), "nothing to tell apart"),
        (lambda x, y: representations.linear_probe(x[:80], [*y[:79], "rare"]), "has 1 rows, too few"),
        (lambda x, y: representations.cka(x, x[:-1]), "the same examples"),
        (lambda x, y: representations.covariance_cka(x, x[:, 1:]), "in one space"),
        (lambda x, y: representations.pca(x, 13), "has only 12"),
        (lambda x, y: representations.umap(x[:3]), "too few for a picture"),
        (lambda x, y: representations.cka(x * np.nan, x), "all finite"),
    ],
)
def test_bad_features(call, message):
    with pytest.raises(ValueError, match=message):
        call(*clusters(1.0))
