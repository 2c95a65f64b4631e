"""The stacked operation against the plain reference, and its own backward against autograd's."""

import pytest
import torch
from torch import Tensor

from peft_bundles.config import BundleConfig, BundleSpec
from peft_bundles.core.basis import bundle_shapes, draw_basis
from peft_bundles.core.functional import BundleWeights, Gate, bundle_forward, bundle_reference
from peft_bundles.core.packing import Packing
from peft_bundles.routing.graph import walk


D = 24
KINDS = ("mlp", "linear", "diag", "full")


def make(kinds: tuple[str, ...], projection: str, dtype: torch.dtype = torch.float64):
    """Random weights for one bundle per kind: packing, tables by name, the same for the reference, basis."""
    torch.manual_seed(0)
    config = BundleConfig(
        sub_bases={"a": 6, "b": 5, "common": 4},
        bundles={
            f"b_{i}_{kind}": BundleSpec(
                rank=4, sub_bases=["a" if i % 2 else "b"], overlap=0.4, adapter=kind, bottleneck=3
            )
            for i, kind in enumerate(kinds)
        },
        projection=projection,
    )
    shapes = bundle_shapes(config, D)
    packing = Packing(shapes, 15, projection != "none")
    tables: dict[str, dict[str, Tensor]] = {"weight": {}, "down": {}, "up": {}}

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, requires_grad=True)

    for name, s in shapes.items():
        if s.kind != "full" and projection != "none":
            tables["weight"][name] = leaf(s.rank, len(s.support))
        if s.kind in ("mlp", "linear", "full"):
            tables["down"][name], tables["up"][name] = leaf(s.hidden, s.width), leaf(s.width, s.hidden)
        if s.kind == "diag":
            tables["up"][name] = leaf(s.width)
    reference = [BundleWeights(s.kind, s.support, *(tables[t].get(n) for t in tables)) for n, s in shapes.items()]
    return packing, tables, reference, draw_basis(D, 15, seed=0, layer=0).to(dtype)


def stacked(packing, tables, basis, hidden, mean, scale, alphas, **options):
    D_, E = packing.fold(*tables.values(), basis, scale)
    alpha = alphas[..., packing.owner]
    return bundle_forward(hidden, D_, E, nonlinear=packing.nonlinear, mean=mean, alpha=alpha, **options)


@pytest.mark.parametrize("projection", ["none", "tied"])
@pytest.mark.parametrize(
    "kinds", [*[(k,) for k in KINDS], KINDS, KINDS[::-1], ("linear", "full")], ids=lambda k: "+".join(k)
)
def test_stacked_equals_reference_in_value_and_gradient(kinds, projection):
    packing, tables, reference, basis = make(kinds, projection)
    hidden = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    alphas = torch.rand(2, 5, len(kinds), dtype=torch.float64, requires_grad=True)
    mean, scale = torch.randn(D, dtype=torch.float64), torch.rand(D, dtype=torch.float64) + 0.5
    leaves = [hidden, alphas, *(t for table in tables.values() for t in table.values())]
    weights = torch.randn(2, 5, D, dtype=torch.float64)

    fused = stacked(packing, tables, basis, hidden, mean, scale, alphas)
    plain = bundle_reference(hidden, reference, basis, mean, scale, alphas)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-10)
    ours = torch.autograd.grad((fused * weights).sum(), leaves)
    theirs = torch.autograd.grad((plain * weights).sum(), leaves)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha_shape", [None, (1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("own_residual", [True, False])
@pytest.mark.parametrize("nonlinear", [0, 2, 4])
def test_gradcheck(alpha_shape, own_residual, nonlinear):
    torch.manual_seed(1)
    new = lambda *size: torch.randn(*size, dtype=torch.float64, requires_grad=True)  # noqa: E731
    hidden, D_, E, mean = new(2, 3, 6), new(6, 4), new(4, 6), torch.randn(6, dtype=torch.float64)
    residual = None if own_residual else new(2, 3, 6)
    alpha = None if alpha_shape is None else new(*alpha_shape, 4)
    mask = (torch.rand(2, 3, 4) > 0.3).double() / 0.7

    def run(hidden, D_, E, alpha, residual):
        return bundle_forward(hidden, D_, E, nonlinear=nonlinear, mean=mean, alpha=alpha, mask=mask, residual=residual)

    assert torch.autograd.gradcheck(run, (hidden, D_, E, alpha, residual))


def test_gate_weighs_rows_in_weight_gradients_and_nothing_else():
    torch.manual_seed(2)
    hidden = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    D_, E = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (5, 6)))
    gate = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64).view(3, 1, 1).expand(3, 1, 5)
    target = torch.randn(3, 4, 6, dtype=torch.float64)
    gated = bundle_forward(hidden, D_, E, nonlinear=5, gate=Gate(gate))
    free = bundle_forward(hidden, D_, E, nonlinear=5)
    assert torch.equal(gated, free)
    grads = torch.autograd.grad((gated * target).sum(), (hidden, D_, E))
    row = [torch.autograd.grad((free[b] * target[b]).sum(), (hidden, D_, E), retain_graph=True) for b in range(3)]
    torch.testing.assert_close(grads[0], sum(r[0] for r in row), rtol=1e-12, atol=1e-12)
    for i in (1, 2):
        torch.testing.assert_close(grads[i], row[0][i] + 0.3 * row[2][i], rtol=1e-10, atol=1e-10)


def test_gate_is_read_when_backward_runs():
    """`routed_backward` rewrites gates between passes over one graph."""
    hidden = torch.randn(2, 1, 6, dtype=torch.float64)
    D_, E = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (3, 6)))
    gate = torch.full((2, 1, 3), float("nan"), dtype=torch.float64)
    loss = bundle_forward(hidden, D_, E, nonlinear=3, gate=Gate(gate)).square().sum()
    assert torch.autograd.grad(loss, E, retain_graph=True)[0].isnan().all()
    gate.data.zero_()
    assert not torch.autograd.grad(loss, E, retain_graph=True)[0].any()
    gate.data.fill_(1.0)
    free = torch.autograd.grad(bundle_forward(hidden, D_, E, nonlinear=3).square().sum(), E)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, E)[0], free)


def test_units_outside_of_a_gates_span_get_a_gradient_of_0():
    """What `Route.choose` says of a gate saves their part of the weight gradients, and changes no gradient."""
    packing, tables, _, basis = make(("mlp", "linear", "diag", "mlp", "linear"), "none")
    hidden = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    found = []
    for chosen in ([0], [1], [1, 4], [3, 2], []):
        live = torch.tensor([k in chosen for k in range(5)])
        gate = Gate(torch.rand(2, 1, 5, dtype=torch.float64).masked_fill_(~live, 0.0)[..., packing.owner])
        for spanned in (False, True):
            if spanned:
                gate.span = first, last = packing.span(live)
                assert bool((packing.owner[:first, None] != torch.tensor(chosen)).all())
                assert bool((packing.owner[last : -packing.padding, None] != torch.tensor(chosen)).all())
            D_, E = packing.fold(*tables.values(), basis, None)
            out = bundle_forward(hidden, D_, E, nonlinear=packing.nonlinear, gate=gate)
            found.append(torch.autograd.grad(out.square().sum(), (hidden, D_, E)))
        torch.testing.assert_close(found[-1], found[-2])
    assert packing.span(torch.tensor([True] + 4 * [False]))[1] < len(packing.owner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_float64_result_to_its_rounding(dtype):
    packing, tables, reference, basis = make(("mlp", "linear"), "tied", torch.float32)
    hidden = torch.randn(4, 8, D).to(dtype)
    mean, scale = torch.randn(D), torch.rand(D) + 0.5
    alphas = torch.rand(4, 1, 2)
    got = stacked(packing, tables, basis, hidden, mean, scale, alphas)
    assert got.dtype == dtype
    double = [
        BundleWeights(b.kind, b.support, *(None if t is None else t.double() for t in (b.weight, b.down, b.up)))
        for b in reference
    ]
    exact = bundle_reference(hidden.double(), double, basis.double(), mean.double(), scale.double(), alphas.double())
    error = (got.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_autocast_runs_in_its_dtype_and_keeps_the_residual():
    packing, tables, _, basis = make(("mlp",), "none", torch.float32)
    hidden = torch.randn(2, 3, D, requires_grad=True)
    mean, scale, alphas = torch.zeros(D), torch.ones(D), torch.ones(1, 1, 1)
    exact = stacked(packing, tables, basis, hidden, mean, scale, alphas)
    with torch.autocast("cpu", torch.bfloat16):
        got = stacked(packing, tables, basis, hidden, mean, scale, alphas)
        zero = stacked(packing, tables, basis, hidden, mean, scale, torch.zeros(1, 1, 1))
    assert got.dtype == torch.float32 and torch.equal(zero, hidden)
    assert 0 < (got - exact).norm() / exact.norm() < 0.02
    got.square().sum().backward()
    assert hidden.grad.dtype == torch.float32 and tables["up"]["b_0_mlp"].grad.dtype == torch.float32


def test_bundles_that_are_not_live_get_no_gradient():
    packing, tables, _, basis = make(("mlp", "linear", "diag"), "none")
    hidden = torch.randn(2, 3, D, dtype=torch.float64)
    D_, E = packing.fold(*tables.values(), basis, None, live=["b_1_linear"])
    bundle_forward(hidden, D_, E, nonlinear=packing.nonlinear).sum().backward()
    for table in tables.values():
        for name, weight in table.items():
            assert (weight.grad is not None) == (name == "b_1_linear")


def test_the_constant_factor_is_on_what_is_written_only():
    packing, tables, _, basis = make(("mlp", "linear", "diag", "full"), "none")
    D1, E1 = packing.fold(*tables.values(), basis, None)
    D3, E3 = packing.fold(*tables.values(), basis, None, 3.0)
    assert torch.equal(D3, D1)
    torch.testing.assert_close(E3, 3.0 * E1, rtol=1e-12, atol=1e-12)
    up = list(tables["up"].values())
    for once, thrice in zip(torch.autograd.grad(E1.sum(), up), torch.autograd.grad(E3.sum(), up)):
        torch.testing.assert_close(thrice, 3.0 * once, rtol=1e-12, atol=1e-12)


def test_a_walk_finds_of_each_loss_what_it_reaches():
    """Also where graphs share parts in several places, and one loss reaches less of them than another."""
    a, b, c, d = (torch.ones(2, requires_grad=True) for _ in range(4))
    low, side = (a * b).exp(), c.sin()
    high = low * side
    losses = [high.sum(), low.sum(), (high * d + low).sum(), side.sum(), d.sum(), (side + d).sum() + high.mean()]
    found = [{id(leaf) for leaf in reach.leaves.values()} for reach in walk(losses)]
    wanted = [{a, b, c}, {a, b}, {a, b, c, d}, {c}, {d}, {a, b, c, d}]
    assert found == [{id(leaf) for leaf in leaves} for leaves in wanted]
