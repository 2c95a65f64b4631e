"""The basis U (d x R) of a layer: how it is made, which columns each bundle uses, what two bundles have in common.

d is the hidden size and R the number of columns. The support of a bundle is the sorted tensor of its column numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import COMMON, BundleConfig
from ..specs import BLOCK, resolve_rank


SHARED = ("bundle_basis", "bundle_mean", "bundle_scale")  # keys of U, mu and sigma, which no bundle owns
ALIGN = 8  # products of bf16 matrices are three times slower if a side is not a multiple of 16 bytes


def align(size: int) -> int:
    """The next multiple of `ALIGN`."""
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True)
class BundleShape:
    """Sizes of a bundle behind a block, at one hidden size.

    Attributes:
        kind: "mlp", "linear", "diag" or "full".
        rank: r_k.
        hidden: b_k, the number of hidden units.
        support: column numbers of U.
        width: number of values that the adapter reads and writes: r_k with a projector, else the size of the support
            (d for "full").
    """

    kind: str
    rank: int
    hidden: int
    support: Tensor
    width: int


def sub_basis_columns(config: BundleConfig, hidden_size: int) -> dict[str, Tensor]:
    """Column numbers of each sub-basis: consecutive ranges, in the order of the config.

    Raises:
        ValueError: the sub-bases need more columns than `basis_rank` or than the hidden size.
    """
    assert config.sub_bases is not None
    ranks = {name: resolve_rank(sub_basis.rank, hidden_size) for name, sub_basis in config.sub_bases.items()}
    if (needed := sum(ranks.values())) > hidden_size:
        raise ValueError(f"sub_bases need {needed} columns but the hidden size is {hidden_size}; lower their ranks.")
    columns, start = {}, 0
    for name, rank in ranks.items():
        columns[name] = torch.arange(start, start + rank)
        start += rank
    if config.basis_rank is not None and start > basis_rank(config, hidden_size):
        raise ValueError(
            f"sub_bases need {start} columns but basis_rank={config.basis_rank!r} gives "
            f"{resolve_rank(config.basis_rank, hidden_size)}; raise it or lower their ranks."
        )
    return columns


def basis_rank(config: BundleConfig, hidden_size: int) -> int:
    """R: `config.basis_rank` if it is given, else what the sub-bases need, rounded up to a multiple of `ALIGN`."""
    assert config.sub_bases is not None
    if config.basis_rank is None:
        needed = sum(resolve_rank(s.rank, hidden_size) for s in config.sub_bases.values())
        return max(needed, min(hidden_size, align(needed)))
    rank = resolve_rank(config.basis_rank, hidden_size)
    if rank > hidden_size:
        raise ValueError(f"basis_rank={config.basis_rank!r} exceeds the hidden size {hidden_size}; lower it.")
    return rank


def bundle_shapes(config: BundleConfig, hidden_size: int) -> dict[str, BundleShape]:
    """The sizes of the bundles behind blocks at this hidden size, by name.

    The support is the columns of the bundle's sub-bases. With an overlap o, the first columns of the sub-basis "common"
    are added, as many as make up the share o of the whole support.

    Raises:
        ValueError: no support or an unknown one, a rank larger than it, or a common block too small for the overlap.
    """
    assert config.bundles is not None and config.sub_bases is not None
    columns = sub_basis_columns(config, hidden_size)
    shapes = {}
    for name, spec in config.bundles.items():
        if BLOCK not in config.places(name):
            continue
        config.check_bundle(name)
        kind = config.kind_of(name)
        bottleneck = spec.bottleneck if spec.bottleneck is not None else config.bottleneck
        if kind == "full":
            hidden = resolve_rank(bottleneck, hidden_size)
            shapes[name] = BundleShape(kind, hidden_size, hidden, torch.arange(0), hidden_size)
            continue
        support = torch.cat([columns[s] for s in spec.sub_bases])
        if spec.overlap:
            shared = round(spec.overlap / (1 - spec.overlap) * len(support))
            if shared > len(columns[COMMON]):
                raise ValueError(
                    f"bundle {name!r}: overlap={spec.overlap} asks for {shared} common columns besides its own "
                    f"{len(support)}, but sub-basis {COMMON!r} has {len(columns[COMMON])}; enlarge it."
                )
            support = torch.cat([support, columns[COMMON][:shared]])
        rank = resolve_rank(spec.rank, hidden_size)
        shares = [config.sub_bases[s].rank for s in spec.sub_bases]
        if isinstance(spec.rank, float) and not spec.overlap and spec.rank <= sum(shares) + 1e-9:
            # Each sub-basis is rounded down separately, so a rank that is rounded once may exceed them by a column or
            # two.
            rank = min(rank, len(support))
        if rank > len(support):
            raise ValueError(
                f"bundle {name!r}: rank={spec.rank!r} is {rank} columns at hidden size {hidden_size}, but its support "
                f"{spec.sub_bases} has {len(support)}; lower the rank or widen the support."
            )
        width = len(support) if config.projection == "none" else rank
        hidden = resolve_rank(bottleneck, rank) if kind in ("mlp", "linear") else width
        shapes[name] = BundleShape(kind, rank, hidden, support.sort().values, width)
    return shapes


def weight_shapes(config: BundleConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the trained weights of one layer by key, such as "bundle_down.<bundle>", in the order they are drawn.

    Only `projection="tied"` has "bundle_weight" (the projector W_k); a "diag" bundle has no "bundle_down".
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in bundle_shapes(config, hidden_size).items():
        if config.projection == "tied" and shape.kind != "full":
            shapes[f"bundle_weight.{name}"] = (shape.rank, len(shape.support))
        if shape.kind == "diag":
            shapes[f"bundle_up.{name}"] = (shape.width,)
        else:
            shapes[f"bundle_down.{name}"] = (shape.hidden, shape.width)
            shapes[f"bundle_up.{name}"] = (shape.width, shape.hidden)
    return shapes


def linear_shapes(config: BundleConfig, hidden_size: int) -> dict[str, tuple[int, float]]:
    """Rank and scale s of the bundles that sit at linear layers, by name."""
    assert config.bundles is not None
    shapes = {}
    for name, spec in config.bundles.items():
        if any(place != BLOCK for place in config.places(name)):
            rank = resolve_rank(spec.rank, hidden_size)
            lora_alpha = 2 * rank if spec.lora_alpha is None else spec.lora_alpha
            shapes[name] = rank, lora_alpha / (rank**0.5 if spec.use_rslora else rank)
    return shapes


def sizes_of_bundles(config: BundleConfig, hidden_size: int) -> dict[str, dict[str, Any]]:
    """For a table, of every bundle: place, kind, rank, hidden units of a layer, and the number of columns of U."""
    behind, at_linears = bundle_shapes(config, hidden_size), linear_shapes(config, hidden_size)
    rows = {}
    for name in config.bundles or ():
        kinds = [config.kind_of(name)] * (name in behind) + [config.kind_of(name, True)] * (name in at_linears)
        shape = behind.get(name)
        rank = at_linears[name][0] if shape is None else shape.rank
        rows[name] = {
            "place": "+".join(config.places(name)),
            "kind": "+".join(dict.fromkeys(kinds)),
            "rank": rank,
            "hidden": rank if shape is None else shape.hidden,
            "support": 0 if shape is None else len(shape.support),
        }
    return rows


def tensor_shapes(config: BundleConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors behind one block in a checkpoint: `weight_shapes`, and U, mu and sigma (`SHARED`)."""
    shared = {"bundle_basis": (hidden_size, basis_rank(config, hidden_size))}
    return {**dict.fromkeys(SHARED, (hidden_size,)), **shared, **weight_shapes(config, hidden_size)}


def draw_basis(hidden_size: int, rank: int, seed: int, layer: int) -> Tensor:
    """Random orthonormal U, shape (d, R), float32: the Q of a seeded Gaussian matrix, with R's diagonal positive.

    Drawn and orthogonalised in float64 on the CPU, so that machines agree to float32 rounding (LAPACK's QR in float32
    differs by 3e-7 between thread counts).
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    gaussian = torch.randn(hidden_size, rank, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    # LAPACK's result is column-major and a loaded basis row-major: matrix products would be rounded differently.
    return (q * r.diagonal().sign()).float().contiguous()


def choose_basis(covariance: Tensor, rank: int, init: str, seed: int, layer: int) -> Tensor:
    """U (d, R), float32: eigenvectors of the covariance (d, d) of the standardised stream.

    "pca" takes those of the R largest eigenvalues, "null" of the smallest. Columns are shuffled (seeded), so that every
    sub-basis gets the same mix of variances.
    """
    _, vectors = torch.linalg.eigh(covariance.double())  # ascending eigenvalues
    vectors = vectors[:, -rank:] if init == "pca" else vectors[:, :rank]
    # The sign of an eigenvector is arbitrary. Fix it, so that two machines agree.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    order = torch.randperm(rank, generator=generator).to(vectors.device)
    return (vectors * signs)[:, order].float().contiguous()


def fingerprint(basis: Tensor) -> float:
    """A number that tells bases apart, sum_ij cos(i) U_ij cos(j + 1/2); compare it within FINGERPRINT_TOLERANCE."""
    u = basis.detach().float()
    left = torch.cos(torch.arange(u.shape[0], dtype=torch.float64))
    right = torch.cos(torch.arange(u.shape[1], dtype=torch.float64) + 0.5)
    # No matrix product, which may run in TF32, and not all of U in float64, which takes five times as long.
    return float((left.to(u)[:, None] * u).sum(0).double().cpu() @ right)


FINGERPRINT_TOLERANCE = 1e-3  # float32 rounding of U moves it by about 1e-5; another seed by about sqrt(d R) / 2


def support_overlap(shapes: Mapping[str, BundleShape | None]) -> Tensor:
    """Share of common support, (M, M): |S_j and S_k| / min(|S_j|, |S_k|); 0 where a bundle has no support."""
    sets = [set() if shape is None else set(shape.support.tolist()) for shape in shapes.values()]
    share = [[len(a & b) / min(len(a), len(b)) if a and b else 0.0 for b in sets] for a in sets]
    return torch.tensor(share, dtype=torch.float64).reshape(len(sets), len(sets))


def principal_angles(weight_j: Tensor, support_j: Tensor, weight_k: Tensor, support_k: Tensor) -> Tensor:
    """Principal angles between span(P_j) and span(P_k), in radians, ascending; shape (min(r_j, r_k),), float64.

    P = W U^T with U orthonormal, so these are the angles between the row spaces of the two W, and U is not needed.
    Bjorck and Golub (1973): orthonormalise both, then arccos of the singular values of the product.
    """
    size = int(max(support_j.max(), support_k.max())) + 1

    def orthonormal(weight: Tensor, support: Tensor) -> Tensor:
        rows = weight.new_zeros(weight.shape[0], size, dtype=torch.float64)
        rows[:, support.to(weight.device)] = weight.detach().double()
        return torch.linalg.qr(rows.T).Q

    cosines = torch.linalg.svdvals(orthonormal(weight_j, support_j).T @ orthonormal(weight_k, support_k))
    return torch.arccos(cosines.clamp(-1.0, 1.0))
