"""The kernels against plain PyTorch, in Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from models import attached, layers

from peft_bundles.core import kernels
from peft_bundles.core.functional import activate, activate_backward
from peft_bundles.core.kernels import fits


ROOT = Path(__file__).resolve().parents[2]

COMPARE = """
import itertools
import torch
from peft_bundles.core.kernels import FewTokens, _gathered, centred, units_backward
import peft_bundles.core.functional as functional
from peft_bundles.core.functional import Gate, activate, activate_backward, bundle_forward

torch.manual_seed(0)
cases = itertools.product([(1, 1, 64, 8, 8), (2, 2, 72, 12, 5)], *[(True, False)] * 3)
for (B, T, d, H, nonlinear), middle, gated, own in [*cases, ((1, 1, 1100, 70, 0), True, True, True)]:
    # The interpreter cuts bfloat16 off where it should round: float16.
    new = lambda *size: torch.randn(*size, dtype=torch.float16)
    hidden, E, D = new(B, T, d) + 3, new(d, H).T, (new(H, d) / d**0.5).T
    mean = new(d) + 3 if middle else None
    alpha = torch.rand(B, 1, H).half() if gated else None
    residual = hidden if own else new(B, T, d)
    if gated and not own:
        alpha = alpha[..., :1] + 0.5  # of a row, as adapter_names gives it
    found = FewTokens(hidden.shape, mean, D, E, nonlinear, alpha)(hidden, residual)
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
        assert torch.equal(FewTokens(hidden.shape, mean, D, E, nonlinear, alpha)(hidden, residual)[0], residual[0])

for n, many in ((5, 7), (600, 2000)):
    values, index = torch.randn(n), torch.randint(n, (many,), dtype=torch.int32)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(_gathered(values, index, dtype), values.to(dtype)[index.long()])
    assert torch.equal(_gathered(values.half(), index, torch.float32), values.half().float()[index.long()])

for B, T, H, nonlinear in ((1, 1, 8, 8), (2, 3, 12, 5), (3, 2, 70, 0)):
    s, da = new(B, T, H), new(B, T, H)
    row = torch.rand(B, 1, H)
    for gate in (None, row, row.half(), torch.rand(1, T, H).half(), torch.rand(B, T, 1).expand(B, T, H)):
        a, ds, gated = units_backward(s, da, gate, nonlinear)
        open = 1.0 if gate is None else gate.half().double()
        down = activate_backward(da.double().flatten(0, 1), s.double().flatten(0, 1), nonlinear).view(s.shape)
        for found, exact in ((a, activate(s.double(), nonlinear) * open), (ds, down), (gated, down * open)):
            assert found.dtype == torch.float16 and (found.double() - exact).norm() < 2e-3 * exact.norm()
        assert (gated is ds) == (gate is None)

# The operation's own backward, with the kernels and without.
def gradients(usable, gate, own):
    functional.usable = lambda *_: usable
    functional.centred = lambda hidden, mean: (hidden - mean, hidden.clone())
    given = [t.clone().requires_grad_() for t in (h, D, E)]
    y = bundle_forward(
        given[0], *given[1:], nonlinear=7, residual=None if own else h, mean=mean, gate=gate
    )
    return torch.autograd.grad(y, given, weights)

h, D, E, mean, weights = new(3, 4, 40), new(40, 24) / 6, new(24, 40), new(40), new(3, 4, 40)
some = torch.rand(3, 1, 24).half()
some[..., :8] = some[..., 16:] = 0
gates = [None, *map(Gate, (torch.rand(3, 1, 24).half(), torch.rand(1, 4, 24).half())), Gate(some, span=(8, 16))]
for gate, own in itertools.product(gates, (True, False)):
    for found, exact in zip(gradients(True, gate, own), gradients(False, gate, own)):
        assert torch.isfinite(exact).all() and (found - exact).norm() <= 2e-3 * exact.norm(), (gate is None, own)
"""


@pytest.mark.slow
def test_they_give_what_the_plain_operation_gives():
    """Where there is no Triton, plain PyTorch must be what is used."""
    if kernels.triton is None:
        assert sys.platform != "linux", "the extra `dev` brings Triton; install it to test the kernels"
        assert not kernels.usable(torch.zeros(1, 1, 8), torch.float16)
        return
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", COMPARE], cwd=ROOT, env=env, check=True)


class Built:
    """Takes the place of a kernel, and of what Triton makes of it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        def built(*given, **options):
            self.log.append((False, grid, options, given))
            return self

        return built

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *given):
        assert (function, metadata) == ("function", "metadata")
        assert launch_metadata is enter_hook is exit_hook is None
        self.log.append((True, (x, y, z), stream, given))


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)


def test_a_built_kernel_is_called_as_it_is_where_it_may_be(stream):
    log, x, whole = [], torch.zeros(8), torch.zeros(9)
    kernel = Built(log)
    for tensors, number in (
        ((x, x), 3),
        ((x, x), 3),
        ((x, x), 4),
        ((x.double(), x), 3),
        ((whole[1:], x), 3),
        ((x, x), 4),
    ):
        kernels._launch(kernel, (2, 1), tensors, number, 64, num_warps=1)
        assert log[-1][3][2:] == (number, 64)
    assert [as_built for as_built, *_ in log] == [False, True, False, False, False, True]
    assert log[0][1:3] == ((2, 1), {"num_warps": 1}) and log[0][3][0] is x
    assert log[1][1:] == ((2, 1, 1), 7, (x.data_ptr(), x.data_ptr(), 3, 64))
    for key in [k for k in kernels._built if k[0] is kernel]:
        kernels._built.pop(key)


def test_a_planned_step_calls_what_it_built(monkeypatch, stream):
    log = []
    monkeypatch.setattr(kernels, "_read", Built(log), raising=False)
    monkeypatch.setattr(kernels, "_write", Built(log), raising=False)
    few = kernels.FewTokens(torch.Size((2, 1, 8)), None, torch.zeros(8, 4), torch.zeros(4, 8), 4, None)
    h, apart = torch.zeros(2, 1, 8), torch.zeros(17)[1:].view(2, 1, 8)
    for hidden in (h, h, apart, h):
        few(hidden, hidden)
    assert [as_built for as_built, *_ in log] == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 2
    (*_, first), (*_, second), (*_, read), (*_, write) = log[:4]
    assert [len(given) for given in (first, second)] == [len(given) for given in (read, write)]
    assert first[4] is second[1] and first[5:] == read[5:] and second[4:] == write[4:]
    given = [t.data_ptr() for t in (h, *few.constants)]
    assert [*read[:4]] == given and read[4] == write[1] and write[0] == given[0] and write[2] == few.E.data_ptr()
    assert log[2][1:3] == ((2, 2, 1), 7) and log[3][1:3] == ((1, 2, 1), 7)


def test_where_they_cannot_be_built_they_are_not_used():
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match="Triton's kernels cannot be used here"):
        assert not kernels._right(cpu)  # they cannot run on a CPU
    assert kernels._checked.pop(cpu) is False


def test_kernels_that_are_wrong_are_not_used(monkeypatch):
    cpu = torch.device("cpu")

    def back(s, da, gate, nonlinear, off=0.0):
        down = activate_backward(da.double().flatten(0, 1), s.double().flatten(0, 1), nonlinear).view(s.shape)
        return activate(s.double(), nonlinear) * gate, (1 + off) * down, down * gate

    class Plain:
        off = 0.0

        def __init__(self, shape, mean, D, E, nonlinear, alpha):
            self.made_of = mean, D.double(), E.double(), nonlinear, alpha

        def __call__(self, h, residual):
            mean, D, E, nonlinear, alpha = self.made_of
            update = (activate((h - mean).double() @ D, nonlinear) * alpha.double()) @ E
            return residual.double() + (1 + self.off) * update

    class Wrong(Plain):
        off = 0.02

    monkeypatch.setattr(kernels, "centred", lambda h, mean: (h - mean, h))
    monkeypatch.setattr(kernels, "_gathered", kernels.gathered)
    monkeypatch.setattr(kernels, "units_backward", back)
    monkeypatch.setattr(kernels, "FewTokens", Plain)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert kernels._right(cpu)
        kernels._checked.pop(cpu)
    wrong = [("FewTokens", Wrong, "2"), ("units_backward", partial(back, off=0.02), "2")]
    wrong += [("centred", lambda h, mean: (h, h), "inf"), ("_gathered", lambda values, *_: 2 * values, "inf")]
    for name, replacement, by in wrong:
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match=f"off by {by}"):
            patch.setattr(kernels, name, replacement)
            assert not kernels._right(cpu)
        kernels._checked.pop(cpu)


def test_they_are_for_a_gpu_only():
    assert not fits(torch.zeros(1, 1, 8, dtype=torch.bfloat16), torch.bfloat16)


def test_they_get_contiguous_states(monkeypatch):
    """A block may output a part of something larger."""
    seen = []

    class Few:
        def __init__(self, *_):
            pass

        def __call__(self, hidden, residual):
            seen.append((hidden.is_contiguous(), residual.is_contiguous()))
            return residual

    monkeypatch.setattr("peft_bundles.core.inference.fits", lambda *_: True)
    monkeypatch.setattr("peft_bundles.core.inference.FewTokens", Few)
    model = attached()
    with torch.no_grad(), model.folded():
        layers(model)[0](torch.randn(2, 5, 64)[:, -1:])
    assert seen == [(True, True)]
