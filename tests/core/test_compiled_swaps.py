"""A compiled model whose bundles and alphas change: nothing compiles again, and every call is of one whole set."""

from __future__ import annotations

import threading

import pytest
import torch
from models import TINY, attached, batch, generated, layers, logits, perturb, two_adapters
from torch._dynamo.utils import counters
from transformers import LogitsProcessorList

import peft_bundles


NAMES = ["b_mlp", "b_linear", "b_diag"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The bundles of one model, and of a second in the same basis: `again_b_mlp` has twice the hidden units."""
    root = tmp_path_factory.mktemp("bundles")
    one, other = attached(), perturb(attached(bottleneck=1.0), seed=4)
    for name in NAMES:
        peft_bundles.save_bundle(one, name, root / name)
        peft_bundles.save_bundle(other, name, root / f"again_{name}")
    peft_bundles.save_bundle(attached(basis_seed=7, basis_init="random"), "b_diag", root / "elsewhere")
    return root


@pytest.fixture
def composed(folders):
    """Two models of the same bundles: one to compile, one that stays as it is."""
    torch._dynamo.reset()
    counters.clear()
    yield [peft_bundles.compose(TINY["llama"](), [folders / "b_mlp", folders / "b_linear"]) for _ in range(2)]
    torch._dynamo.reset()


def compile_blocks(model, fullgraph=True):
    for layer in layers(model):
        layer.get_base_layer().compile(backend="eager", fullgraph=fullgraph)
    return model


def compile_base(model):
    model.get_base_model().compile(backend="eager", fullgraph=True)
    return model


def compile_whole(model):  # not to be seen from inside: the first call shows it
    return torch.compile(model, backend="eager")


def graphs():
    assert not counters["graph_break"] or all("graph_break()" in reason for reason in counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def same(run, plain, **kwargs):
    """Both models on one batch; returns the number of graphs there are by then."""
    a, b = (logits(model, batch(2, 6), use_cache=False, **kwargs) for model in (run, plain))
    assert torch.allclose(a, b, atol=1e-5)
    return graphs()


@pytest.mark.parametrize("compiled", [compile_blocks, compile_base, compile_whole])
def test_another_set_or_another_alpha_compiles_nothing(folders, composed, compiled):
    model, plain = composed
    run = compiled(model)
    same(run, plain)
    before = same(run, plain, alphas={"b_mlp": 0.9})
    assert before
    for change in (
        lambda m: peft_bundles.load_bundle(m, folders / "again_b_linear", "b_linear", replace=True),
        lambda m: peft_bundles.load_bundle(m, folders / "again_b_mlp", "b_mlp", replace=True),  # another size
        lambda m: peft_bundles.load_bundle(m, folders / "b_diag"),
        lambda m: peft_bundles.remove_bundle(m, "b_mlp"),
        lambda m: m.set_alphas({"b_diag": 0.3}),
        lambda m: m.set_alphas({"b_diag": 0.0}),
        lambda m: m.set_alphas({"b_diag": [0.5, 2.0]}, per="layer"),
    ):
        old = logits(plain, batch(2, 6))
        for each in (model, plain):
            change(each)
        assert not torch.allclose(logits(plain, batch(2, 6)), old, atol=1e-4)
        assert same(run, plain) == before
        assert same(run, plain, alphas={"b_linear": float(old.flatten()[0])}) == before
    assert len(model.base_model._state.configs) == 1


def test_what_does_compile_again_does_so_once(folders, composed):
    """Alphas by row, a norm budget, a second basis, everything off: other programs, each compiled when it comes."""
    model, plain = composed
    run = compile_blocks(model)
    count = same(run, plain)
    for first, second in (
        (
            {"b_mlp": torch.tensor([0.0, 1.5])},
            {"b_mlp": torch.tensor([0.3, 0.2]), "b_linear": torch.tensor([0.1, 1.0])},
        ),
        ({"b_mlp": torch.rand(2, 6)}, {"b_linear": torch.rand(2, 6)}),
        (dict.fromkeys(NAMES[:2], 0.0), dict.fromkeys(NAMES[:2], 0.0)),
    ):
        new = same(run, plain, alphas=first)
        assert count < new == same(run, plain, alphas=second)
        count = new
    for tau in (0.05, 0.02):
        for each in (model, plain):
            peft_bundles.set_norm_budget(each, tau)
        new = same(run, plain)
    assert new == count + 1
    for each in (model, plain):
        peft_bundles.set_norm_budget(each, None)
        peft_bundles.load_bundle(each, folders / "elsewhere", "b_elsewhere")
    assert same(run, plain) == new + 1
    for each in (model, plain):
        peft_bundles.load_bundle(each, folders / "b_diag")
    assert same(run, plain) == new + 1


def test_another_list_of_a_call_compiles_nothing(composed):
    """Lists of Python numbers, as in the README: their values are no constants of the program."""
    model, plain = composed
    run, found = compile_whole(model), []
    same(run, plain)
    for values in ([0.1, 1.5], [0.2, 1.0], [0.0, 0.5], [0.7, 0.3]):
        a, b = (logits(m, batch(2, 6), use_cache=False, alphas={"b_mlp": values}) for m in (run, plain))
        assert torch.allclose(a, b, atol=1e-5)
        found.append((counters["stats"]["unique_graphs"], counters["frames"]["total"]))
    assert len(set(found)) == 1
    assert not any("item()" in reason for reason in counters["graph_break"])


def test_alphas_for_another_number_of_rows(composed):
    run = compile_blocks(composed[0], fullgraph=False)
    same(run, composed[1], alphas={"b_mlp": [0.1, 0.2]})
    for wrong in ([0.1, 0.2, 0.3], torch.ones(2, 5)):
        with pytest.raises(ValueError, match=r"are for \d rows .* but the batch has 2"):
            logits(run, batch(2, 6), alphas={"b_mlp": wrong})


def test_mixed_batches_and_autocast(composed):
    model, plain = two_adapters(), two_adapters()
    run = compile_blocks(model)
    count = same(run, plain, adapter_names=["one", "__base__"])
    assert same(run, plain, adapter_names=["two", "one"]) == count + 1  # two adapters in one batch
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (logits(m, batch(2, 6), use_cache=False).float() for m in (run, plain))
    assert (a - b).norm() < 0.01 * b.norm()


def test_compiled_generation(folders, composed):
    """Beams have their prompt's alphas; a generation in flight ends with the set that it started with."""
    model, plain = composed
    compile_blocks(model)
    ids, options = batch(2, 6), {"output_logits": True, "return_dict_in_generate": True, "use_cache": False}
    for extra in ({}, {"alphas": {"b_mlp": [0.5, 2.0]}, "num_beams": 2}, {"alphas": {"b_mlp": torch.rand(2, 6)}}):
        a, b = (generated(m, ids, **options, **extra) for m in (model, plain))
        assert torch.equal(a.sequences, b.sequences)
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a.logits, b.logits))
    old, count = generated(model, ids, **options), graphs()
    started, swapped, results = threading.Event(), threading.Event(), []

    def wait(input_ids, scores):
        started.set()
        assert swapped.wait(60)
        return scores

    thread = threading.Thread(
        target=lambda: results.append(generated(model, ids, logits_processor=[wait], **options)), daemon=True
    )
    thread.start()
    assert started.wait(60)
    peft_bundles.load_bundle(model, folders / "again_b_mlp", "b_mlp", replace=True)
    new = generated(model, ids, **options)
    swapped.set()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results[0].logits, old.logits))
    assert not torch.allclose(new.logits[0], old.logits[0], atol=1e-4)
    peft_bundles.load_bundle(plain, folders / "again_b_mlp", "b_mlp", replace=True)
    assert torch.equal(new.sequences, generated(plain, ids, use_cache=False))
    assert graphs() == count
    assert list(model.peft_config) == model.active_adapters


@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_inside_of_a_call_has_alphas_of_its_own(compiled):
    """A logits processor that asks the same model once more, without its bundles."""
    torch._dynamo.reset()
    model, base = attached(), TINY["llama"]()
    if compiled:
        compile_blocks(model, fullgraph=False)
    off, found = dict.fromkeys(NAMES, 0.0), []

    def inside(input_ids, scores):
        with torch.no_grad():
            plain = base(input_ids=input_ids, use_cache=False).logits
            found.append(torch.equal(model(input_ids=input_ids, use_cache=False, alphas=off).logits, plain))
            with model.alphas(off):
                found.append(torch.equal(model(input_ids=input_ids, use_cache=False).logits, plain))
            found.append(not torch.equal(model(input_ids=input_ids, use_cache=False).logits, plain))
        return scores

    generated(model, batch(2, 6), max_new_tokens=2, min_new_tokens=2, logits_processor=LogitsProcessorList([inside]))
    assert len(found) == 6 and all(found)


def test_alphas_for_another_batch_are_refused_when_compiled_too():
    torch._dynamo.reset()
    model = compile_blocks(attached(), fullgraph=False)
    for alphas in (torch.ones(1), torch.ones(2), torch.ones(3, 1), torch.ones(3, 5)):
        with pytest.raises(ValueError, match="but the batch has 3"):
            logits(model, batch(3, 6), alphas={"b_mlp": alphas / 2})


def test_dropout_without_gradients_is_drawn_in_every_forward():
    torch._dynamo.reset()
    model = compile_blocks(attached(dropout=0.5).eval(), fullgraph=False)
    logits(model, batch(2, 6))
    model.train()
    assert not torch.equal(logits(model, batch(2, 6)), logits(model, batch(2, 6)))
