"""The six guarantees of gradient routing (docs/concepts.md), each with a test that fails if it breaks."""

import copy
import warnings

import pytest
import torch
from models import TINY, perturb
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_bundles import BundleConfig, BundleLayer, BundleSpec
from peft_bundles.core.functional import bundle_reference
from peft_bundles.core.walking import bundle_parameters


# The first three compute in float64 throughout; the others' own norms (and Mixtral's experts) work in float32.
ARCHITECTURES = ("gpt2", "opt", "gpt_neox", "llama", "mamba", "mixtral")
TOLERANCE = {arch: dict.fromkeys(("rtol", "atol"), 1e-10 if i < 3 else 1e-5) for i, arch in enumerate(ARCHITECTURES)}
EXACT = TOLERANCE["gpt2"]
NO_DROPOUT = {"gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), "opt": {"dropout": 0.0}}
SIGNALS = ("lm", "policy", "value", "entropy", "kl", "logic")


def config(placed=(), **changes) -> BundleConfig:
    """Owners, attenuated sides, two signals with one column (entropy, kl), supports that overlap; and `placed` ones."""
    return BundleConfig(
        task_type="CAUSAL_LM",
        sub_bases={"a": 16, "b": 16, "common": 12},
        bottleneck=0.5,
        bundles={
            "b_lm": BundleSpec(rank=8, sub_bases=["a"], signals={"lm": 1.0, "logic": 0.05}),
            "b_both": BundleSpec(rank=8, sub_bases=["a", "b"], signals={"lm": 1.0, "policy": 0.3, "logic": 1.0}),
            "b_policy": BundleSpec(rank=6, sub_bases=["b"], overlap=0.4, signals={"policy": 1.0}),
            "b_value": BundleSpec(rank=6, sub_bases=["b"], adapter="linear", signals={"value": 1.0}),
            "b_anchor": BundleSpec(rank=4, sub_bases=["b"], signals={"entropy": 1.0, "kl": 1.0, "value": 0.5}),
            **dict(placed),
        },
        **changes,
    )


def make(arch: str, dtype: torch.dtype = torch.float64, **changes):
    torch.manual_seed(0)
    base = TINY[arch](**NO_DROPOUT.get(arch, {}))
    if arch == "mixtral":
        base.set_experts_implementation("eager")  # the grouped kernel has no float64
    model = get_peft_model(base, config(**changes), autocast_adapter_dtype=False)
    perturb(model)
    return model.to(dtype).train()


def in_both_precisions(arch: str):
    """The same weights in float64 and bf16."""
    exact = make(arch)
    low = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict({k: v.double() for k, v in low.state_dict().items()})
    return exact, low


def batch(rows: int = 6, tokens: int = 7) -> torch.Tensor:
    return torch.randint(1, 100, (rows, tokens), generator=torch.Generator().manual_seed(7))


def loss_of(signal: str, logits: torch.Tensor) -> torch.Tensor:
    """A different smooth loss for every signal, a sum over rows so that rows can be split."""
    p = logits.softmax(-1)
    return {
        "lm": lambda: -logits.log_softmax(-1)[..., 3].mean((1, 2) if logits.dim() > 3 else 1),
        "policy": lambda: (p[..., 5] * 3).mean(1),
        "value": lambda: logits[..., 12].square().mean(1),
        "entropy": lambda: (p * p.clamp_min(1e-12).log()).sum(-1).mean(1),
        "kl": lambda: logits.square().mean((1, 2)),
        "logic": lambda: logits[..., 11].tanh().mean(1),
    }[signal]().sum()


def gradients(model) -> dict:
    """(bundle, i) -> gradient or None, and forget them."""
    found = {}
    for (_, name), parameters in bundle_parameters(model).items():
        for i, p in enumerate(parameters):
            found[name, i] = None if p.grad is None else p.grad.clone()
            p.grad = None
    return found


def plain_gradients(model, signal: str, rows=slice(None)) -> dict:
    """What autograd gives for this loss alone, through the plain reference of the operation."""

    def forward(layer: BundleLayer, hidden: torch.Tensor) -> torch.Tensor:
        alphas = hidden.new_ones(len(layer.packing("default").names))
        mean, scale = layer.bundle_mean["default"].to(hidden.dtype), layer.bundle_scale["default"].to(hidden.dtype)
        basis = layer.bundle_basis["default"].to(hidden.dtype)
        return bundle_reference(hidden, layer.bundle_weights("default"), basis, mean, scale, alphas)

    stacked, BundleLayer.forward = BundleLayer.forward, forward
    try:
        loss_of(signal, model(batch()).logits[rows]).backward()
    finally:
        BundleLayer.forward = stacked
    return gradients(model)


def weighted(model, grads: dict, signal: str) -> dict:
    column = model.peft_config["default"].column(signal)
    return {(n, i): g * column[n] if column[n] and g is not None else None for (n, i), g in grads.items()}


def added(*tables: dict) -> dict:
    total = {}
    for key in tables[0]:
        present = [t[key] for t in tables if t[key] is not None]
        total[key] = sum(present) if present else None
    return total


def assert_same(ours: dict, theirs: dict, **tolerance) -> None:
    for key, expected in theirs.items():
        if expected is None:
            assert ours[key] is None, f"{key} must have no gradient"
        else:
            assert ours[key] is not None, f"{key} must have a gradient"
            torch.testing.assert_close(ours[key], expected, msg=lambda m, k=key: f"{k}: {m}", **tolerance)
    assert any(g is not None and g.abs().max() > 1e-9 for g in theirs.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_1_off_owners_are_bitwise_unchanged_after_an_optimizer_step(arch):
    model = make(arch, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    loss_of("lm", model(batch()).logits).backward()  # momentum everywhere: a zero gradient would move everything
    optimizer.step()
    for signal in SIGNALS:
        optimizer.zero_grad()
        table = bundle_parameters(model)
        before = {key: [p.detach().clone() for p in parameters] for key, parameters in table.items()}
        with model.route(signal):
            loss_of(signal, model(batch()).logits).backward()
        model.finalize_grads()
        optimizer.step()
        column = model.peft_config["default"].column(signal)
        for (adapter, name), parameters in table.items():
            same = [torch.equal(p, b) for p, b in zip(parameters, before[adapter, name])]
            assert not any(same) if column[name] else all(same), (signal, name)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_2_routed_gradient_is_the_losss_own_times_its_weight(arch, signal):
    model = make(arch)
    with model.route(signal):
        loss_of(signal, model(batch()).logits).backward()
    model.finalize_grads()
    ours = gradients(model)
    assert_same(ours, weighted(model, plain_gradients(model, signal), signal), **TOLERANCE[arch])


@pytest.mark.parametrize("arch", ("gpt2", "opt", "gpt_neox"))
def test_2_in_bfloat16_to_its_rounding(arch):
    """The routed bf16 gradient is as close to float64 as the unrouted bf16 gradient is."""
    exact, low = in_both_precisions(arch)
    truth = weighted(exact, plain_gradients(exact, "lm"), "lm")
    with low.route("lm"):
        loss_of("lm", low(batch()).logits).backward()
    routed = gradients(low)
    loss_of("lm", low(batch()).logits).backward()
    unrouted = gradients(low)
    for key, expected in truth.items():
        if expected is None:
            assert routed[key] is None
        else:
            torch.testing.assert_close(routed[key], unrouted[key], rtol=2**-7, atol=1e-6)
            assert (routed[key].double() - expected).norm() <= 0.1 * expected.norm() + 1e-6


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_3_rows_with_different_signals_in_one_forward_and_one_backward(arch):
    model = make(arch)
    rows = ["lm", "policy", "lm", "value", "kl", "logic"]
    calls = []
    handle = model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    with model.route(rows):
        logits = model(batch()).logits
        sum(loss_of(s, logits[i : i + 1]) for i, s in enumerate(rows)).backward()
    model.finalize_grads()
    handle.remove()
    assert len(calls) == 1
    ours = gradients(model)
    own = [weighted(model, plain_gradients(model, s, slice(i, i + 1)), s) for i, s in enumerate(rows)]
    assert_same(ours, added(*own), **TOLERANCE[arch])


@pytest.mark.parametrize("arch", ("gpt2", "opt", "gpt_neox"))
def test_3_in_bfloat16_to_its_rounding(arch):
    """A mixed bf16 batch is as close to float64 as bf16 rows by themselves are."""
    exact, low = in_both_precisions(arch)
    rows = ["lm", "policy", "lm", "value", "kl", "logic"]
    truth = added(*(weighted(exact, plain_gradients(exact, s, slice(i, i + 1)), s) for i, s in enumerate(rows)))
    with low.route(rows):
        logits = low(batch()).logits
        sum(loss_of(s, logits[i : i + 1]) for i, s in enumerate(rows)).backward()
    low.finalize_grads()
    for key, ours in gradients(low).items():
        assert (ours.double() - truth[key]).norm() <= 0.1 * truth[key].norm() + 1e-6, key


@pytest.mark.parametrize("arch", ("gpt2", "opt", "gpt_neox"))
def test_3_activation_gradients_are_never_gated(arch):
    model = make(arch)
    embedding = model.get_input_embeddings().weight.requires_grad_()
    loss_of("lm", model(batch()).logits).backward()
    free, embedding.grad = embedding.grad, None
    with model.route(["policy", "lm", "value", "kl", "logic", "lm"]):
        loss_of("lm", model(batch()).logits).backward()
    torch.testing.assert_close(embedding.grad, free, **EXACT)


def count_passes(layer: BundleLayer, counter: list):
    def hook(block, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda g: counter.append(1))

    return layer.get_base_layer().register_forward_hook(hook)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_4_losses_on_the_same_rows(arch, announced):
    model = make(arch)
    signals = ("policy", "value", "entropy", "kl")  # entropy and kl have one column: three passes
    layer = next(m for m in model.modules() if isinstance(m, BundleLayer) and m.index == 1)
    passes = []
    handle = count_passes(layer, passes)
    if announced:
        with model.route(signals):
            logits = model(batch()).logits
    else:
        logits = model(batch()).logits
    handle.remove()
    model.routed_backward({s: loss_of(s, logits) for s in signals})
    model.finalize_grads()
    assert len(passes) == 3
    ours = gradients(model)
    own = [weighted(model, plain_gradients(model, s), s) for s in signals]
    assert_same(ours, added(*own), **TOLERANCE[arch])


@pytest.mark.parametrize("arch", ("gpt2", "opt", "gpt_neox"))
def test_4_mixed_rows_share_the_first_pass(arch):
    model = make(arch)
    rl = ("policy", "value", "kl")
    with model.route(["lm", "lm", "logic", rl, rl, rl]):
        logits = model(batch()).logits
    parts = {"lm": slice(0, 2), "logic": slice(2, 3), **dict.fromkeys(rl, slice(3, 6))}
    passes = []
    logits.register_hook(lambda g: passes.append(1))
    model.routed_backward({s: loss_of(s, logits[rows]) for s, rows in parts.items()})
    model.finalize_grads()
    assert len(passes) == 3
    ours = gradients(model)
    own = [weighted(model, plain_gradients(model, s, rows), s) for s, rows in parts.items()]
    assert_same(ours, added(*own), **EXACT)


@pytest.mark.parametrize("arch", ("gpt2", "opt", "gpt_neox"))
def test_4_only_the_rl_rows_graph_is_walked_again(arch):
    model = make(arch)
    rl = ("policy", "value", "kl")
    with model.route("lm"):
        text = model(batch()[:3]).logits
    with model.route(rl):
        rollout = model(batch()[3:]).logits
    walked = {"text": 0, "rollout": 0}
    text.register_hook(lambda g: walked.__setitem__("text", walked["text"] + 1))
    rollout.register_hook(lambda g: walked.__setitem__("rollout", walked["rollout"] + 1))
    loss_of("lm", text).backward()
    model.routed_backward({s: loss_of(s, rollout) for s in rl})
    model.finalize_grads()
    assert walked == {"text": 1, "rollout": 3}
    ours = gradients(model)
    own = [weighted(model, plain_gradients(model, "lm", slice(0, 3)), "lm")]
    own += [weighted(model, plain_gradients(model, s, slice(3, 6)), s) for s in rl]
    assert_same(ours, added(*own), **EXACT)


def test_4_parameters_of_no_bundle_get_the_sum_of_all_losses():
    model = make("gpt2")
    head = nn.Linear(100, 1, dtype=torch.float64)
    embedding = model.get_input_embeddings().weight.requires_grad_()
    losses = lambda logits: {"policy": loss_of("policy", logits), "value": head(logits).square().mean()}  # noqa: E731
    sum(losses(model(batch()).logits).values()).backward()
    expected = embedding.grad.clone(), head.weight.grad.clone()
    model.zero_grad(), head.zero_grad()
    model.routed_backward(losses(model(batch()).logits))
    torch.testing.assert_close((embedding.grad, head.weight.grad), expected, **EXACT)


@pytest.mark.parametrize("arch", ("gpt2", "gpt_neox", "llama"))
def test_5_packed_segments_with_block_diagonal_attention(arch):
    model = make(arch)
    ids = batch(2, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]])
    segment = torch.tensor([[0] * 3 + [1] * 5, [0] * 5 + [1] * 3])
    allowed = (segment[:, :, None] == segment[:, None, :]) & torch.ones(8, 8).tril().bool()
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min).double()[:, None]
    forward = lambda: model(ids, position_ids=positions, attention_mask=mask).logits  # noqa: E731
    spans = [("lm", 0, slice(0, 3)), ("policy", 0, slice(3, 8)), ("value", 1, slice(0, 5)), ("lm", 1, slice(5, 8))]
    piece = lambda logits, s, row, span: loss_of(s, logits[row : row + 1, span])  # noqa: E731

    with model.route([[("lm", 3), ("policy", 5)], [("value", 5), ("lm", 3)]], block_diagonal=True):
        logits = forward()
        sum(piece(logits, *span) for span in spans).backward()
    model.finalize_grads()
    packed = gradients(model)
    own = []
    for s, row, span in spans:
        piece(forward(), s, row, span).backward()
        own.append(weighted(model, gradients(model), s))
    assert_same(packed, added(*own), **TOLERANCE[arch])


def test_5_a_gate_per_token_on_ordinary_attention_says_that_it_is_a_heuristic():
    model = make("llama")
    rows = [[("lm", 3), ("policy", 4)]] * 6
    with pytest.warns(UserWarning, match="heuristic"), model.route(rows):
        model(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.route(rows, block_diagonal=True):
            model(batch())


@pytest.mark.parametrize("arch", ("gpt2", "llama", "mamba"))
def test_6_clipping_is_per_bundle(arch):
    model = make(arch)

    def clipped(scale: float) -> tuple[dict, dict]:
        with model.route(["lm", "value"] * 3):
            logits = model(batch()).logits
            (loss_of("lm", logits[0::2]) + scale * loss_of("value", logits[1::2])).backward()
        model.finalize_grads()
        norms = model.clip_bundle_grads(1e-3)
        return norms, gradients(model)

    (small, a), (large, b) = clipped(1.0), clipped(1e6)
    assert large["b_value"] > 1e5 * small["b_value"] and "b_policy" not in small
    for (name, i), gradient in a.items():
        if name == "b_lm":
            assert torch.equal(gradient, b[name, i])
    for name in ("b_lm", "b_value"):
        norm = torch.stack([g.norm() for (n, _), g in b.items() if n == name]).norm()
        torch.testing.assert_close(norm, torch.tensor(1e-3, dtype=norm.dtype), rtol=1e-2, atol=0)


@pytest.mark.parametrize("arch", ("gpt2", "opt", "gpt_neox"))
def test_gradient_checkpointing_keeps_the_routing_of_the_forward(arch):
    model = make(arch)
    rows = ["lm", "policy", "lm", "value", "kl", "logic"]

    def run() -> dict:
        with model.route(rows):
            logits = model(batch(), use_cache=False).logits
        with model.route("policy"), model.alphas(b_lm=0.0):  # another context is open when backward runs
            sum(loss_of(s, logits[i : i + 1]) for i, s in enumerate(rows)).backward()
        return gradients(model)

    plain = run()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(), plain, **EXACT)


def test_a_bundle_that_is_off_learns_nothing():
    model = make("llama")
    with model.route("lm"), model.alphas(b_lm=0.0):
        loss_of("lm", model(batch()).logits).backward()
    found = gradients(model)
    assert all(found[key] is None for key in found if key[0] == "b_lm")
    assert any(found[key] is not None for key in found if key[0] == "b_both")


def test_routing_beside_lora_on_the_inner_linears():
    torch.manual_seed(0)
    base = TINY["llama"]()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), base, "lora")
    model = get_peft_model(base, config())
    perturb(model)
    model = model.double()
    with model.route("policy"):
        loss_of("policy", model(batch()).logits).backward()
    model.finalize_grads()
    found = gradients(model)
    assert {n for (n, _), g in found.items() if g is not None} == {"b_policy", "b_both"}


def test_errors_say_what_to_do():
    model = make("llama")
    with pytest.raises(ValueError, match=r"signal\(s\) \['plicy'\].*'policy'"), model.route("plicy"):
        pass
    with pytest.raises(ValueError, match=r"route\(\[\]\)"), model.route([]):
        pass
    with pytest.raises(ValueError, match="2 rows, but the batch has 6"), model.route(["lm", "policy"]):
        model(batch())
    with pytest.raises(ValueError, match="4 tokens a row, but the batch has 7"):
        with model.route([[("lm", 4)]] * 6, block_diagonal=True):
            model(batch())
    with pytest.raises(ValueError, match="must have the same number"):
        with model.route([[("lm", 4)], [("lm", 3)]], block_diagonal=True):
            pass
    logits = model(batch()).logits
    with pytest.raises(ValueError, match="scalar"):
        model.routed_backward({"lm": logits})
    with pytest.raises(ValueError, match="no bundle"):
        model.routed_backward({"nobody": logits.sum()})
    with pytest.raises(ValueError, match="max_norm=0"):
        model.clip_bundle_grads(0)
    with pytest.raises(RuntimeError, match="reached none of its bundles"):
        with model.alphas(dict.fromkeys(model.peft_config["default"].bundles, 0.0)):
            model.get_input_embeddings().weight.requires_grad_()
            model.routed_backward({"lm": loss_of("lm", model(batch()).logits)})


def test_finalize_grads_finds_backwards_that_went_wrong():
    model = make("llama")
    with model.route("lm"):
        model(batch())
    with pytest.raises(RuntimeError, match="no gradient reached"):
        model.finalize_grads()
    with model.route(("policy", "value")):
        logits = model(batch()).logits
    loss_of("policy", logits).backward()  # not routed_backward: the gates are still unknown
    assert all(g is None or g.isnan().all() for g in gradients(model).values())
    with pytest.raises(RuntimeError, match="call routed_backward"):
        model.finalize_grads()
    with model.route(("policy", "value")):
        logits = model(batch()).logits
    with pytest.raises(ValueError, match=r"\['lm'\] comes from a forward whose rows have"):
        model.routed_backward({"lm": loss_of("lm", logits)})
