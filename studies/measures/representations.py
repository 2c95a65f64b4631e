"""How far tasks lie apart in hidden states: probes, silhouette, CKA, pictures in two dimensions. Needs scikit-learn.

Features are arrays (N, D), a row an example; labels (N,) say which task it is of. Channels of a language model differ
in scale by orders of magnitude, so probes, silhouettes and pictures see them standardised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def linear_probe(features: Any, labels: Any, *, folds: int = 5, seed: int = 0) -> dict[str, float]:
    """{"accuracy", "sd", "chance"}: of logistic regression (scikit-learn's, L2, C = 1) on held-out folds, stratified.

    sd is over folds, chance the share of the largest class. Where the texts themselves tell the tasks apart accuracy is
    near 1 in any layer of any model and says little.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = _checked(features, labels)
    if (least := np.unique(y, return_counts=True)[1].min()) < folds:
        raise ValueError(f"the smallest class has {least} rows, too few for {folds} folds.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    scores = cross_val_score(probe, x, y, cv=StratifiedKFold(folds, shuffle=True, random_state=seed))
    chance = np.unique(y, return_counts=True)[1].max() / len(y)
    return {"accuracy": float(scores.mean()), "sd": float(scores.std(ddof=1)), "chance": float(chance)}


def silhouette(features: Any, labels: Any, *, components: int = 30) -> float:
    """Mean silhouette (Rousseeuw 1987; scikit-learn's, Euclidean) of the tasks as clusters, in [-1, 1]; 0: they mix.

    Distances of noise grow with every channel, so it is taken in the first `components` principal components (or as
    many as there are): spaces of different width compare.
    """
    from sklearn.metrics import silhouette_score

    x, y = _checked(features, labels)
    coordinates, _ = pca(x, min(components, *x.shape))
    return float(silhouette_score(coordinates, y))


def cka(x: Any, y: Any) -> float:
    """Linear CKA (Kornblith et al. 2019, eq. 3) of the SAME N examples in two spaces, (N, D) and (N, E), in [0, 1].

    1 where one is a rotation and scaling of the other; 0 where no channel of one correlates with any of the other.
    """
    a, b = _centred(x), _centred(y)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} rows: CKA compares representations of the same examples.")
    return _ratio(np.linalg.norm(a.T @ b) ** 2, np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))


def covariance_cka(x: Any, y: Any) -> float:
    """The same of two tasks in ONE space, (N, D) and (M, D), whose examples have no pairs: channels are what is paired.

    <Cov x, Cov y> / (|Cov x| |Cov y|), Frobenius: 1 where both tasks vary along the same directions as much, 0 where
    their directions are orthogonal. The tasks' means do not enter.
    """
    a, b = _centred(x), _centred(y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a.shape[1]} and {b.shape[1]} channels: tasks are compared in one space.")
    overlap = np.linalg.norm(a @ b.T) ** 2  # = <a'a, b'b>, without a matrix of D x D
    return _ratio(overlap, np.linalg.norm(a @ a.T) * np.linalg.norm(b @ b.T))


def pca(features: Any, dimensions: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (N, dimensions) on the first principal axes, and the share of variance of each, (dimensions,)."""
    x = _standardised(_centred(features))
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    if dimensions > len(s):
        raise ValueError(f"dimensions={dimensions}, but {x.shape} has only {len(s)}.")
    u *= np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])  # an axis has no sign of its own
    return u[:, :dimensions] * s[:dimensions], s[:dimensions] ** 2 / max(float((s**2).sum()), 1e-30)


def umap(features: Any, *, seed: int = 0) -> np.ndarray:
    """(N, 2): UMAP (McInnes et al. 2018, arXiv 1802.03426; umap-learn's) of the first 30 principal components.

    A picture only: distances between clusters, and their sizes, mean nothing in it. Needs the extra `studies`.
    """
    from umap import UMAP

    x = _centred(features)
    if len(x) < 4:
        raise ValueError(f"{len(x)} rows are too few for a picture; give at least 4.")
    coordinates, _ = pca(x, min(30, *x.shape))
    threads = torch.get_num_threads()
    try:
        return UMAP(n_neighbors=min(15, len(x) - 1), init="pca", random_state=seed, n_jobs=1).fit_transform(coordinates)
    finally:  # numba sets OpenMP's threads, which PyTorch goes by: with others a model rounds differently
        torch.set_num_threads(threads)


def _checked(features: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(features, dtype=float), np.asarray(labels)
    if x.ndim != 2 or y.shape != (len(x),):
        raise ValueError(f"features have shape {x.shape} and labels {y.shape}; give (N, D) and (N,).")
    if len(set(y.tolist())) < 2:
        raise ValueError("all rows are of one task; there is nothing to tell apart.")
    return x, y


def _centred(features: Any) -> np.ndarray:
    x = np.asarray(features, dtype=float)
    if x.ndim != 2 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"features of shape {x.shape} must be (N, D), at least one row, all finite.")
    return x - x.mean(0)


def _standardised(x: np.ndarray) -> np.ndarray:
    """Channels with mean 0 and deviation 1; a constant one becomes 0."""
    sd = x.std(0)
    return (x - x.mean(0)) / np.where(sd > 1e-12 * max(float(sd.max()), 1e-30), sd, np.inf)


def _ratio(above: Any, below: Any) -> float:
    return float(above / below) if below > 0 else float("nan")
