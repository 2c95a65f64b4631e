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
from peft_bundles.kernels import centred, few_tokens
from peft_bundles.functional import bundle_forward

torch.manual_seed(0)
cases = itertools.product([(1, 1, 64, 8, 8), (2, 2, 72, 12, 5)], *[(True, False)] * 3)
for (B, T, d, H, nonlinear), middle, gated, own in [*cases, ((1, 1, 1100, 70, 0), True, True, True)]:
    # The interpreter cuts bfloat16 off where it should round: float16.
    new = lambda *size: torch.randn(*size, dtype=torch.float16)
    hidden, E, D = new(B, T, d) + 3, new(H, d), (new(H, d) / d**0.5).T
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
            x, copy = centred(hidden, given)
            assert torch.equal(x, hidden - mean) and torch.equal(copy, hidden) and copy is not hidden
    if gated:
        alpha[0] = 0
        assert torch.equal(few_tokens(hidden, residual, mean, D, E, nonlinear, alpha)[0], residual[0])
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
    monkeypatch.setattr(kernels, "centred", lambda h, mean: (h - mean, h))

    def plain(h, residual, mean, D, E, nonlinear, alpha, off=0.0):
        a = activate((h - mean).double() @ D.double(), nonlinear) * alpha.double()
        return (residual.double() + (1 + off) * a @ E.double()).half()

    monkeypatch.setattr(kernels, "few_tokens", plain)
    assert kernels._right(cpu)
    kernels._checked.pop(cpu)
    monkeypatch.setattr(kernels, "few_tokens", lambda *given: plain(*given, off=0.02))
    with pytest.warns(UserWarning, match="off by 2"):
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
