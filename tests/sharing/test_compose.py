"""Bundles of several sources in one model: who shares a basis, who is refused, and a set that changes while it runs."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import time
import warnings

import pytest
import torch
from models import TINY, attached, batch, bundle_config, generated, layers, logits, perturb, reference, some
from peft import get_peft_model

import peft_bundles
from peft_bundles.core.checkpoints import read
from peft_bundles.core.functional import within_budget
from peft_bundles.core.layer import BundleLayer
from peft_bundles.core.walking import state_of


NAMES = ["b_mlp", "b_linear", "b_diag"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of the three bundles of one model, of one with another basis, and the two models."""
    root = tmp_path_factory.mktemp("bundles")
    here, there = attached(), perturb(attached(basis_init="random", basis_seed=7), seed=4)
    for bundle in NAMES:
        peft_bundles.save_bundle(here, bundle, root / bundle)
        peft_bundles.save_bundle(there, bundle, root / f"other_{bundle}")
    return root, here, there


def composed(saved, *names, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft_bundles.compose(TINY["llama"](), [saved[0] / name for name in names], **kwargs)


def alone(model, *names):
    with model.alphas({other: 0.0 for other in NAMES if other not in names}):
        return logits(model, batch())


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


# ---- composing ----


def test_models_that_other_threads_build_meanwhile_keep_their_weights(saved, monkeypatch):
    made, real = [], BundleLayer.update_layer
    monkeypatch.setattr(BundleLayer, "update_layer", lambda *args: made.append(torch.nn.Linear(2, 2)) or real(*args))
    composed(saved, "b_mlp")
    assert made and not any(p.is_meta for module in made for p in module.parameters())


def test_a_file_with_tensors_of_fewer_layers_than_its_config_names_is_refused(saved, tmp_path):
    folder = peft_bundles.save_bundle(attached(layers_to_transform=[0]), "b_mlp", tmp_path)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, "layers_to_transform": None}))
    with pytest.raises(ValueError, match=r"has tensors of layers \[0\], but its config asks for \[0, 1"):
        peft_bundles.compose(TINY["llama"](), [folder])


def test_bundles_of_one_basis_share_it(saved):
    _, here, _ = saved
    model = composed(saved, "b_diag", "b_mlp")
    assert model.active_adapters == ["composed_0"]
    assert close(logits(model, batch()), alone(here, "b_diag", "b_mlp"))
    assert not any(p.requires_grad for p in model.parameters())
    report = peft_bundles.composition(model)
    assert [g["bundles"] for g in report.groups] == [["b_diag", "b_mlp"]]
    assert "not controlled" not in str(report)
    assert close(generated(model, batch()), generated(composed(saved, "b_mlp", "b_diag"), batch()))


def test_bundles_of_several_bases_are_grouped_and_told_of(saved):
    root, here, there = saved
    with pytest.warns(UserWarning, match="trained in 2 bases.*not controlled"):
        model = peft_bundles.compose(TINY["llama"](), [root / "b_mlp", root / "other_b_linear", root / "b_diag"])
    assert model.active_adapters == ["composed_0", "composed_1"]
    report = peft_bundles.composition(model)
    assert [g["bundles"] for g in report.groups] == [["b_mlp", "b_diag"], ["b_linear"]]
    size = sum(layer.bundle_basis["composed_1"].numel() * 4 for layer in layers(model))
    assert report.groups[1]["basis_bytes"] == size
    with model.alphas(b_linear=0.0):
        assert close(logits(model, batch()), alone(here, "b_mlp", "b_diag"))
    with model.alphas(b_mlp=0.0, b_diag=0.0):
        assert close(logits(model, batch()), alone(there, "b_linear"))
    with model.alphas(dict.fromkeys(NAMES, 0.0)):
        assert torch.equal(logits(model, batch()), logits(reference("llama"), batch()))


def test_bundles_of_another_scaling_are_grouped_apart(saved, tmp_path):
    """One adapter has one factor: in the other's, a bundle would be louder or softer than it was trained."""
    softer = perturb(attached(scaling=1.0), seed=4)
    peft_bundles.save_bundle(softer, "b_linear", tmp_path / "softer")
    model = composed(saved, "b_mlp", tmp_path / "softer")
    assert [g["bundles"] for g in peft_bundles.composition(model).groups] == [["b_mlp"], ["b_linear"]]
    with model.alphas(b_mlp=0.0):
        assert close(logits(model, batch()), alone(softer, "b_linear"))


@some
def test_other_architectures(name, tmp_path):
    model = attached(name)
    for bundle in NAMES:
        peft_bundles.save_bundle(model, bundle, tmp_path / bundle)
    again = peft_bundles.compose(TINY[name](), [tmp_path / bundle for bundle in NAMES])
    assert close(logits(again, batch()), logits(model, batch()))


def test_name_clashes(saved):
    root, here, there = saved
    base = TINY["llama"]()
    with pytest.raises(ValueError, match=r"both have a bundle 'b_mlp'; pass rename=True \(--rename\)"):
        peft_bundles.compose(base, [root / "b_mlp", root / "other_b_mlp"])
    assert not layers(base)
    model = composed(saved, "b_mlp", "other_b_mlp", "other_b_diag", rename=True)
    assert state_of(model).bundle_names() == ["b_mlp", "b_mlp_2", "b_diag"]
    with model.alphas(b_mlp_2=0.0, b_diag=0.0):
        assert close(logits(model, batch()), alone(here, "b_mlp"))
    with model.alphas(b_mlp=0.0, b_diag=0.0):
        assert close(logits(model, batch()), alone(there, "b_mlp"))


def test_refusals(saved):
    root, *_ = saved
    for sources in ([], str(root / "b_mlp"), root / "b_mlp"):
        with pytest.raises(ValueError, match="is not a list of folders and repositories; give at least one"):
            peft_bundles.compose(TINY["llama"](), sources)
    model = composed(saved, "b_mlp")
    with pytest.raises(ValueError, match="has adapters already; add a bundle with load_bundle"):
        peft_bundles.compose(model, [root / "b_mlp"])
    for call in (peft_bundles.composition, lambda m: peft_bundles.load_bundle(m, root / "b_mlp")):
        with pytest.raises(ValueError, match="not a PeftModel with bundles; build one with compose"):
            call(TINY["llama"]())


def test_a_basis_that_was_changed_in_one_file_is_noticed(saved, tmp_path):
    """Two files name one basis and have other columns of it."""
    root, here, _ = saved
    for layer in layers(model := copy.deepcopy(here)):
        layer.bundle_basis["default"][:, 15] *= -1  # of "right"
    named = read(root / "b_diag").config.provenance
    model.peft_config["default"].provenance = named
    peft_bundles.save_bundle(model, "b_diag", tmp_path / "b_changed")
    with pytest.raises(ValueError, match=r"both name the basis .* columns of 'right' in layer 0 differ"):
        peft_bundles.compose(TINY["llama"](), [root / "b_linear", tmp_path / "b_changed"])


# ---- hot-swap ----


def test_add_replace_remove(saved):
    root, here, there = saved
    model = composed(saved, "b_mlp")
    weights = {n: p.data_ptr() for n, p in model.named_parameters() if "bundle" not in n}
    assert peft_bundles.load_bundle(model, root / "b_linear") == "b_linear"
    assert close(logits(model, batch()), alone(here, "b_mlp", "b_linear"))
    assert len(model.active_adapters) == 1  # of one basis, so one adapter
    peft_bundles.load_bundle(model, root / "b_diag", "b_named")
    with model.alphas(b_named=0.0):
        assert close(logits(model, batch()), alone(here, "b_mlp", "b_linear"))
    peft_bundles.remove_bundle(model, "b_named")
    peft_bundles.load_bundle(model, root / "other_b_linear", replace=True)
    assert len(model.active_adapters) == 2
    with model.alphas(b_linear=0.0):
        assert close(logits(model, batch()), alone(here, "b_mlp"))
    with model.alphas(b_mlp=0.0):
        assert close(logits(model, batch()), alone(there, "b_linear"))
    peft_bundles.remove_bundle(model, "b_mlp")
    assert close(logits(model, batch()), alone(there, "b_linear"))
    assert list(model.peft_config) == model.active_adapters and len(model.active_adapters) == 1
    assert {n: p.data_ptr() for n, p in model.named_parameters() if "bundle" not in n} == weights
    assert not any(p.requires_grad for p in model.parameters())


def test_a_trained_model_can_swap_and_be_saved(saved, tmp_path):
    """Its own adapter keeps the name it had until something in it changes; weights are shared and not copied."""
    root, here, _ = saved
    model = copy.deepcopy(here)
    before = {id(p) for layer in layers(model) for p in layer.bundle_up["default"].values()}
    peft_bundles.remove_bundle(model, "b_linear")
    assert close(logits(model, batch()), alone(here, "b_mlp", "b_diag"))
    (adapter,) = model.active_adapters
    assert {id(p) for layer in layers(model) for p in layer.bundle_up[adapter].values()} < before
    peft_bundles.load_bundle(model, root / "b_linear")
    assert close(logits(model, batch()), logits(here, batch()))
    peft_bundles.save_bundle(model, "b_linear", tmp_path)
    assert close(logits(peft_bundles.compose(TINY["llama"](), [tmp_path]), batch()), alone(here, "b_linear"))


def test_alphas_that_were_set_go_with_their_bundle(saved):
    root, here, _ = saved
    model = composed(saved, "b_mlp", "b_linear")
    model.set_alphas({"b_linear": 0.0, "b_mlp": 1.0})
    peft_bundles.remove_bundle(model, "b_linear")
    peft_bundles.load_bundle(model, root / "b_linear")
    assert close(logits(model, batch()), alone(here, "b_mlp", "b_linear"))


def test_refusals_of_swapping(saved, tmp_path):
    root, here, _ = saved
    here.save_pretrained(tmp_path / "whole")
    model = composed(saved, "b_mlp", "b_linear")
    before = logits(model, batch())
    for call, message in (
        (
            lambda: peft_bundles.load_bundle(model, root / "b_mlp"),
            "there is already a bundle 'b_mlp'; pass replace=True",
        ),
        (lambda: peft_bundles.load_bundle(model, root / "b_diag", replace=True), "no bundle 'b_diag' to replace"),
        (lambda: peft_bundles.load_bundle(model, tmp_path / "whole"), r"holds the bundles \['b_mlp'.*name one"),
        (lambda: peft_bundles.load_bundle(model, root / "b_diag", "9 lives"), "name '9 lives' cannot be used"),
        (lambda: peft_bundles.load_bundle(model, root / "b_diag", "composed_0"), "both an adapter and a bundle"),
        (lambda: peft_bundles.remove_bundle(model, "b_x"), r"no bundle 'b_x'.*'b_mlp', 'b_linear'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert torch.equal(logits(model, batch()), before)
        assert list(model.peft_config) == model.active_adapters
    peft_bundles.remove_bundle(model, "b_mlp")
    with pytest.raises(ValueError, match="the last bundle; set its alpha to 0"):
        peft_bundles.remove_bundle(model, "b_linear")


def test_a_half_written_folder_is_refused_until_it_is_whole(saved, tmp_path):
    """Whatever part of it is there: the files of a folder come one after another."""
    root, here, _ = saved
    model = composed(saved, "b_mlp")
    before = logits(model, batch())
    target = tmp_path / "b_linear"
    target.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (root / "b_linear" / name).read_bytes()
        for share in (0.0, 0.5, 0.99):
            (target / name).write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ValueError, match=r"half-written|damaged|not a valid"):
                peft_bundles.load_bundle(model, target)
        (target / name).write_bytes(whole)
    assert torch.equal(logits(model, batch()), before)
    peft_bundles.load_bundle(model, target)
    assert close(logits(model, batch()), alone(here, "b_mlp", "b_linear"))


def test_a_generation_in_flight_ends_with_the_set_it_started_with(saved):
    """Changed from another thread after its first token, and deleted only when it is done."""
    root, *_ = saved
    model, ids = composed(saved, "b_mlp", "b_linear"), batch()
    kwargs = {"output_logits": True, "return_dict_in_generate": True}
    old = generated(model, ids, **kwargs)
    step, ready, done = [], threading.Event(), threading.Event()

    def wait(input_ids, scores):
        if not step:
            step.append(1)
            ready.set()
            assert done.wait(30)
        return scores

    results = []
    thread = threading.Thread(target=lambda: results.append(generated(model, ids, logits_processor=[wait], **kwargs)))
    thread.start()
    assert ready.wait(30)
    peft_bundles.load_bundle(model, root / "other_b_linear", replace=True)
    new = generated(model, ids, **kwargs)
    assert len(model.peft_config) == 3  # the old adapter is still needed
    done.set()
    thread.join()
    for a, b in zip(results[0].logits, old.logits):
        assert torch.equal(a, b)
    assert not torch.equal(new.logits[0], old.logits[0])
    assert list(model.peft_config) == model.active_adapters  # and now it is gone
    for layer in layers(model):
        assert sorted(layer.bundle_adapters()) == sorted(model.active_adapters)
    assert torch.equal(generated(model, ids, **kwargs).logits[0], new.logits[0])


def test_every_forward_sees_one_whole_set(saved):
    """Two threads run the model while a third changes it as fast as it can: each result is of one of the two sets."""
    root, *_ = saved
    model, ids = composed(saved, "b_mlp", "b_linear"), batch(2, 6)
    sets = [logits(model, ids)]
    peft_bundles.load_bundle(model, root / "other_b_linear", replace=True)
    sets.append(logits(model, ids))
    tokens = {tuple(generated(model, ids).flatten().tolist())}
    peft_bundles.load_bundle(model, root / "b_linear", replace=True)
    tokens.add(tuple(generated(model, ids).flatten().tolist()))
    stop, seen, failures = threading.Event(), set(), []

    def run():
        while not stop.is_set():
            try:
                found = logits(model, ids)
                match = [i for i, wanted in enumerate(sets) if torch.allclose(found, wanted, atol=1e-4)]
                seen.add(match[0] if match else None)
                if tuple(generated(model, ids).flatten().tolist()) not in tokens:
                    failures.append("tokens of neither set")
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    end, swaps = time.monotonic() + 6, 0
    while time.monotonic() < end or (seen != {0, 1} and swaps < 500):
        peft_bundles.load_bundle(model, root / ("b_linear", "other_b_linear")[(swaps + 1) % 2], replace=True)
        swaps += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
    assert seen == {0, 1} and swaps > 4
    logits(model, ids)  # the end of a call lets go of what is left
    assert list(model.peft_config) == model.active_adapters


def test_copies_swap_by_themselves(saved):
    root, here, _ = saved
    for make in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        model = composed(saved, "b_mlp")
        other = make(model)
        peft_bundles.load_bundle(other, root / "b_linear")
        assert close(logits(other, batch()), alone(here, "b_mlp", "b_linear"))
        assert close(logits(model, batch()), alone(here, "b_mlp"))


# ---- the norm budget ----


@some
def test_norm_budget(name):
    model, ids, seen = attached(name), batch(), []
    wide, base = logits(model, ids), logits(reference(name), ids)
    for layer in layers(model):
        layer.register_forward_hook(
            lambda m, args, out: seen.append((out - args[0]).norm(dim=-1) / args[0].norm(dim=-1))
        )
    logits(model, ids)
    largest = torch.stack(seen).max()
    peft_bundles.set_norm_budget(model, float(largest) * 1.01)
    assert torch.equal(logits(model, ids), wide)  # within the limit nothing is changed
    for tau in (0.5, 0.05):
        peft_bundles.set_norm_budget(model, tau)
        seen.clear()
        limited = logits(model, ids)
        assert torch.stack(seen).max() <= tau * 1.001
        assert torch.stack(seen).max() > tau * 0.99  # and it is used
    assert (limited - base).norm() < (wide - base).norm()
    with model.alphas(dict.fromkeys(NAMES, 0.0)):
        assert torch.equal(logits(model, ids), base)
    peft_bundles.set_norm_budget(model, None)
    assert torch.equal(logits(model, ids), wide)


def test_the_budget_keeps_direction_and_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    update = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).requires_grad_()
    out = within_budget(hidden, hidden + update, 0.3)
    cosine = torch.cosine_similarity(out - hidden, update, -1)
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-6)
    out.square().sum().backward()
    assert torch.isfinite(update.grad).all()
    still = hidden.clone().requires_grad_()
    within_budget(still, still, 0.3).sum().backward()  # an update of length zero
    assert torch.equal(still.grad, torch.ones_like(still))


def test_the_budget_is_over_all_adapters(saved):
    model, seen = composed(saved, "b_mlp", "other_b_linear"), []
    peft_bundles.set_norm_budget(model, 0.05)
    for layer in layers(model):
        layer.register_forward_hook(
            lambda m, args, out: seen.append((out - args[0]).norm(dim=-1) / args[0].norm(dim=-1))
        )
    logits(model, batch())
    assert 0.049 < torch.stack(seen).max() <= 0.0501


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf"), "high"])
def test_budgets_that_are_none(tau):
    with pytest.raises(ValueError, match=r"tau=.* must be a positive number"):
        peft_bundles.set_norm_budget(get_peft_model(TINY["llama"](), bundle_config()), tau)
