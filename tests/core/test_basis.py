"""The basis: drawn, chosen, cut and compared."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bundles import BundleConfig, BundleSpec
from peft_bundles.core.basis import (
    FINGERPRINT_TOLERANCE,
    bundle_shapes,
    choose_basis,
    draw_basis,
    fingerprint,
    principal_angles,
    sub_basis_columns,
    support_overlap,
)


@pytest.mark.parametrize(("d", "rank"), [(64, 1), (64, 48), (64, 64), (576, 288)])
def test_a_drawn_basis_is_orthonormal_and_its_own_for_every_seed_and_layer(d, rank):
    u = draw_basis(d, rank, seed=3, layer=5)
    assert u.shape == (d, rank) and u.dtype == torch.float32
    torch.testing.assert_close(u.T @ u, torch.eye(rank), rtol=0, atol=2e-6)
    assert torch.equal(u, draw_basis(d, rank, seed=3, layer=5))
    for other in (draw_basis(d, rank, 4, 5), draw_basis(d, rank, 3, 6), draw_basis(d, rank, 5, 3)):
        assert abs(fingerprint(u) - fingerprint(other)) > FINGERPRINT_TOLERANCE


@pytest.mark.slow
def test_the_basis_does_not_depend_on_threads_global_seed_or_default_dtype():
    code = (
        "import sys, torch; from peft_bundles.core.basis import draw_basis, fingerprint;"
        "torch.set_num_threads(int(sys.argv[1])); torch.manual_seed(int(sys.argv[1]));"
        "torch.set_default_dtype(torch.float64 if sys.argv[1] == '2' else torch.float32);"
        "u = draw_basis(256, 100, 0, 1); print(u.dtype, round(fingerprint(u), 6), u[3, 4].item())"
    )
    runs = [subprocess.run([sys.executable, "-c", code, n], capture_output=True, text=True) for n in "12"]
    one, two = (run.stdout.split() for run in runs)
    assert one[0] == two[0] == "torch.float32"
    assert float(one[1]) == pytest.approx(float(two[1]), abs=1e-5)
    assert float(one[2]) == pytest.approx(float(two[2]), abs=1e-7)


def test_a_chosen_basis_spans_the_directions_of_high_or_low_variance():
    torch.manual_seed(0)
    frame = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q
    covariance = frame @ torch.diag(torch.logspace(0, -3, 32, dtype=torch.float64)) @ frame.T
    for init, wanted in (("pca", frame[:, :10]), ("null", frame[:, -10:])):
        u = choose_basis(covariance, 10, init, seed=0, layer=0)
        assert u.dtype == torch.float32
        torch.testing.assert_close(u.double() @ u.double().T, wanted @ wanted.T, rtol=0, atol=1e-5)
        assert torch.equal(u, choose_basis(covariance, 10, init, seed=0, layer=0))
        # columns are shuffled: no sub-basis gets all of the strong directions
        variances = (u.double().T @ covariance @ u.double()).diagonal()
        assert not torch.equal(variances.sort().values, variances)
        assert not torch.equal(variances.sort(descending=True).values, variances)


def test_rounding_keeps_a_fingerprint_and_another_basis_does_not():
    u = draw_basis(576, 288, 0, 0)
    noise = u + 3e-7 * torch.randn_like(u)
    assert abs(fingerprint(u) - fingerprint(noise)) < FINGERPRINT_TOLERANCE
    assert abs(fingerprint(u) - fingerprint(u[:, torch.randperm(288)])) > FINGERPRINT_TOLERANCE
    assert abs(fingerprint(u) - fingerprint(-u)) > FINGERPRINT_TOLERANCE


def test_sub_bases_are_disjoint_runs_in_order():
    columns = sub_basis_columns(BundleConfig(preset="taxonomy"), 576)
    assert list(columns) == ["mem", "logic", "abstraction", "temporal", "meta", "policy"]
    assert torch.equal(torch.cat(list(columns.values())), torch.arange(sum(map(len, columns.values()))))


@settings(max_examples=80, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(512, 4096), st.floats(0.02, 0.05))
def test_asked_for_overlap_is_met_within_one_percent(overlap, hidden_size, own):
    config = BundleConfig(
        sub_bases={"a": own, "b": own, "common": 1 - 2 * own - 0.01},
        bundles={n: BundleSpec(rank=2, sub_bases=[n[-1]], overlap=overlap) for n in ("b_a", "b_b")},
    )
    try:
        shapes = bundle_shapes(config, hidden_size)
    except ValueError as error:  # overlap near 1 needs more common columns than there are
        assert "common columns" in str(error) and overlap > 0.85
        return
    rounding = 0.5 / len(shapes["b_a"].support)  # half a column
    assert abs(float(support_overlap(shapes)[0, 1]) - overlap) <= max(0.01, rounding)


def test_principal_angles_are_those_of_the_projectors():
    torch.manual_seed(0)
    u = draw_basis(48, 24, 0, 0).double()
    left, right = torch.arange(0, 12), torch.arange(6, 20)
    w_j, w_k = torch.randn(3, 12), torch.randn(5, 14)
    p_j, p_k = u[:, left] @ w_j.double().T, u[:, right] @ w_k.double().T
    cosines = torch.linalg.svdvals(torch.linalg.qr(p_j).Q.T @ torch.linalg.qr(p_k).Q)
    angles = principal_angles(w_j, left, w_k, right)
    torch.testing.assert_close(angles, torch.arccos(cosines.clamp(-1, 1)), rtol=0, atol=1e-6)
    assert angles.shape == (3,) and torch.equal(angles, angles.sort().values)
    same = principal_angles(w_j, left, 2 * w_j.flip(0), left)
    torch.testing.assert_close(same, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    apart = principal_angles(w_j, left, w_k, torch.arange(12, 26))
    torch.testing.assert_close(apart, torch.full((3,), torch.pi / 2, dtype=torch.float64))
