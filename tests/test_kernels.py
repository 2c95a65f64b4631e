"""The kernels against plain PyTorch, in Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import attached, layers

from peft_bundles import kernels
from peft_bundles.functional import activate
from peft_bundles.kernels import fits


ROOT = Path(__file__).resolve().parents[1]

COMPARE = """
import itertools
import torch
from peft_bundles.kernels import _gathered, added, centred, few_tokens
from peft_bundles.functional import bundle_forward

torch.manual_seed(0)
cases = itertools.product([(1, 1, 64, 8, 8), (2, 2, 72, 12, 5)], *[(True, False)] * 3)
for (B, T, d, H, nonlinear), middle, gated, own in [*cases, ((1, 1, 1100, 70, 0), True, True, True)]:
    # The interpreter cuts bfloat16 off where it should round: float16.
    new = lambda *size: torch.randn(*size, dtype=torch.float16)
    hidden, E, D = new(B, T, d) + 3, new(d, H).T, (new(H, d) / d**0.5).T
    mean = new(d) + 3 if middle else None
    alpha = torch.rand(B, 1, H).half() if gated else None
    residual = hidden if own else new(B, T, d)
    found = few_tokens(hidden, residual, mean, D, E, nonlinear, alpha)
    x = (hidden if mean is None else hidden - mean).double()
    exact = bundle_forward(
        x, D.double(), E.double(), nonlinear=nonlinear, residual=residual.double(),
        alpha=None if alpha is None else alpha.double(),
    )
    error = ((found.double() - exact).norm() / (exact - residual.double()).norm()).item()
    assert found.dtype == torch.float16 and error < 2e-3, (B, T, d, H, nonlinear, middle, gated, own, error)
    if mean is not None:
        for given in (mean, mean.float()):
            assert torch.equal(centred(hidden, given), hidden - mean)
    if gated:
        alpha[0] = 0
        assert torch.equal(few_tokens(hidden, residual, mean, D, E, nonlinear, alpha)[0], residual[0])

for n, many in ((5, 7), (600, 2000)):
    values, index = torch.randn(n), torch.randint(n, (many,), dtype=torch.int32)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(_gathered(values, index, dtype), values.to(dtype)[index.long()])
    assert torch.equal(_gathered(values.half(), index, torch.float32), values.half().float()[index.long()])

for B, T, d, H in ((1, 2, 64, 8), (2, 75, 200, 72), (3, 50, 130, 64)):  # whole tiles and parts of one
    base, left, right = new(B, T, d), new(B, T, H), new(H, d)
    for into in (right, right.T.contiguous().T):
        before = base.clone()
        exact, found = base.double() + left.double() @ into.double(), added(base, left, into)
        assert torch.equal(base, before) and found.shape == base.shape
        assert (found.double() - exact).norm() / (exact - base.double()).norm() < 2e-3, (B, T, d, H)
    off = left.clone()
    off[0] = 0
    assert torch.equal(added(base, off, right)[0], base[0])
"""


def test_they_give_what_the_plain_operation_gives():
    """Where there is no Triton (PyTorch for CPUs has none), plain PyTorch must be what is used."""
    if kernels.triton is None:
        assert not kernels.usable(torch.zeros(1, 1, 8), torch.float16)
        return
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", COMPARE], cwd=ROOT, env=env, check=True)


def test_where_they_cannot_be_built_they_are_not_used():
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match="Triton's kernels cannot be used here"):
        assert not kernels._right(cpu)  # they cannot run on a CPU
    assert kernels._checked.pop(cpu) is False


def test_kernels_that_are_wrong_are_not_used(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(kernels, "centred", lambda h, mean: h - mean)

    def summed(base, left, right):
        return (base.double() + left.double() @ right.double()).half()

    def plain(h, residual, mean, D, E, nonlinear, alpha, off=0.0):
        a = activate((h - mean).double() @ D.double(), nonlinear) * alpha.double()
        return (residual.double() + (1 + off) * a @ E.double()).half()

    monkeypatch.setattr(kernels, "few_tokens", plain)
    monkeypatch.setattr(kernels, "added", summed)
    monkeypatch.setattr(kernels, "_gathered", kernels.gathered)
    assert kernels._right(cpu)
    kernels._checked.pop(cpu)
    for name, wrong in (
        ("few_tokens", lambda *given: plain(*given, off=0.02)),
        ("added", lambda base, left, right: summed(base, 1.02 * left, right)),
    ):
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="off by 2"):
            patch.setattr(kernels, name, wrong)
            assert not kernels._right(cpu)
        kernels._checked.pop(cpu)


def test_they_are_for_a_gpu_only():
    assert not fits(torch.zeros(1, 1, 8, dtype=torch.bfloat16), torch.bfloat16)


def test_they_get_contiguous_states(monkeypatch):
    """A block may output a part of something larger."""
    seen = []

    def few(hidden, residual, *rest):
        seen.append((hidden.is_contiguous(), residual.is_contiguous()))
        return residual

    monkeypatch.setattr("peft_bundles.layer.fits", lambda *_: True)
    monkeypatch.setattr("peft_bundles.layer.few_tokens", few)
    model = attached()
    with torch.no_grad(), model.folded():
        layers(model)[0](torch.randn(2, 5, 64)[:, -1:])
    assert seen == [(True, True)]
