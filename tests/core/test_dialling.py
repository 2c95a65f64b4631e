"""Alphas: where they come from, their shapes, beams, threads."""

import itertools
import threading

import pytest
import torch
from models import TINY, attached, batch, bundle_config, logits, perturb, quietly_loaded
from peft import get_peft_model

import peft_bundles
from peft_bundles import BundleConfig, BundleSpec


NAMES = ("b_one", "b_two", "b_three")


def make(arch: str = "llama", **changes):
    torch.manual_seed(0)
    config = BundleConfig(
        **{"task_type": "CAUSAL_LM", **changes},
        sub_bases={"a": 16, "b": 16},
        bundles={
            "b_one": BundleSpec(8, ["a"], signals={"lm": 1.0}),
            "b_two": BundleSpec(8, ["a", "b"], signals={"lm": 1.0}, alpha=0.5),
            "b_three": BundleSpec(8, ["b"], adapter="linear", signals={"policy": 1.0}),
        },
    )
    return perturb(get_peft_model(TINY[arch](), config), scale=1.0).eval()


def with_numbers(model, one, two, three, ids):
    with model.alphas({"b_one": one, "b_two": two, "b_three": three}):
        return logits(model, ids)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mamba"])
def test_every_shape_says_the_same_as_numbers_row_by_row(arch):
    model, ids = make(arch), batch(4, 6)
    table = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.5, -1.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0]])
    rows = torch.cat([with_numbers(model, *table[b].tolist(), ids[b : b + 1]) for b in range(4)])
    with model.alphas(table):
        torch.testing.assert_close(logits(model, ids), rows)
    with model.alphas(table[:, None, :].expand(4, 6, 3)):
        torch.testing.assert_close(logits(model, ids), rows)
    by_name = {name: table[:, k].tolist() for k, name in enumerate(NAMES)}
    torch.testing.assert_close(logits(model, ids, alphas=by_name), rows)
    torch.testing.assert_close(logits(model, ids, alphas=table), rows)
    mixed = {"b_one": table[:, 0], "b_two": table[:, 1, None].expand(4, 6), "b_three": table[:, 2]}
    torch.testing.assert_close(logits(model, ids, alphas=mixed), rows)
    with model.alphas(table[1]):
        torch.testing.assert_close(logits(model, ids), with_numbers(model, *table[1].tolist(), ids))


def test_per_layer_alphas_switch_layers():
    model, ids = make(), batch(2, 5)
    with model.disable_adapter():
        base = logits(model, ids)
    with model.alphas(torch.zeros(2, 3), per="layer"):
        assert torch.equal(logits(model, ids), base)
    with model.alphas(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), per="layer"):
        hidden = model(ids, output_hidden_states=True).hidden_states[1]
        first = logits(model, ids)
    with model.alphas(dict.fromkeys(NAMES, 1.0)):
        assert torch.equal(model(ids, output_hidden_states=True).hidden_states[1], hidden)
        assert not torch.equal(logits(model, ids), first)
    with model.alphas({"b_one": [1.0, 0.25]}, per="layer"), model.alphas(b_two=1.0, b_three=1.0):
        mixed = logits(model, ids)
    layers = [m for m in model.modules() if isinstance(m, peft_bundles.BundleLayer)]
    for layer in layers:
        layer.bundle_up["default"]["b_one"].data *= [1.0, 0.25][layer.index]
    torch.testing.assert_close(with_numbers(model, 1.0, 1.0, 1.0, ids), mixed)


def test_per_token_alphas_act_from_that_token_on():
    model, ids = make(), batch(2, 6)
    late = torch.zeros(2, 6, 3)
    late[:, 4:] = 1.0
    with model.alphas(late):
        mixed = logits(model, ids)
    off, on = with_numbers(model, 0, 0, 0, ids), with_numbers(model, 1, 1, 1, ids)
    torch.testing.assert_close(mixed[:, :4], off[:, :4])
    assert not torch.allclose(mixed[:, 4], off[:, 4]) and not torch.allclose(mixed[:, 4], on[:, 4])


@pytest.mark.parametrize("place", ["block", "mlp"])
@pytest.mark.parametrize("off", [0.0, [0.0, 0.0, 0.0], torch.zeros(3, 5)])
def test_a_bundle_that_is_off_beside_one_with_alphas_per_row_learns_nothing(place, off):
    bundles = {name: {"rank": 4, "sub_bases": ["a"], "signals": {"lm": 1.0}} for name in ("b_one", "b_two")}
    config = BundleConfig(sub_bases={"a": 16}, bundles=bundles, place=place, task_type="CAUSAL_LM", quiet=0.0)
    model, ids = get_peft_model(TINY["llama"](), config), batch(3, 5)
    model(input_ids=ids, labels=ids, alphas={"b_one": torch.tensor([0.0, 1.0, 2.0]), "b_two": off}).loss.backward()
    assert all(p.grad is not None for p in model.bundle_parameters("b_one"))
    assert all(p.grad is None for p in model.bundle_parameters("b_two"))


def test_precedence_call_block_set_default():
    model, ids = make(), batch(2, 5)
    default = with_numbers(model, 1.0, 0.5, 1.0, ids)
    assert torch.equal(logits(model, ids), default)
    model.set_alphas({"b_one": 0.2})
    assert torch.equal(logits(model, ids), with_numbers(model, 0.2, 0.5, 1.0, ids))
    with model.alphas(b_one=0.7):
        assert torch.equal(logits(model, ids), with_numbers(model, 0.7, 0.5, 1.0, ids))
        with model.alphas(b_two=0.0):  # blocks nest; what they do not name stays
            assert torch.equal(logits(model, ids), with_numbers(model, 0.7, 0.0, 1.0, ids))
            called = logits(model, ids, alphas={"b_one": 0.1})
        assert torch.equal(called, with_numbers(model, 0.1, 0.0, 1.0, ids))
        assert torch.equal(logits(model, ids), with_numbers(model, 0.7, 0.5, 1.0, ids))
    assert torch.equal(logits(model, ids), with_numbers(model, 0.2, 0.5, 1.0, ids))
    model.set_alphas({"b_one": 1.0})
    assert torch.equal(logits(model, ids), default)


def test_both_ways_to_set_alphas_take_the_same_forms():
    model, ids = attached(), batch()
    for values, by_name in (({"b_mlp": 0.5}, {}), (None, {"b_mlp": 0.5}), ({"b_diag": 2.0}, {"b_mlp": 0.5})):
        with model.alphas(values, **by_name):
            wanted = logits(model, ids)
        model.set_alphas(values, **by_name)
        assert torch.equal(logits(model, ids), wanted)
        model.set_alphas()
    assert torch.equal(logits(model, ids), logits(attached(), ids))  # back to the config


def test_baked_alphas_are_saved(tmp_path):
    model, ids = attached(), batch()
    model.set_alphas(b_mlp=0.25, b_diag=torch.tensor(-1.0))
    wanted = logits(model, ids)
    model.bake_alphas()
    assert torch.equal(logits(model, ids), wanted)
    model.set_alphas()
    assert torch.equal(logits(model, ids), wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(quietly_loaded(TINY["llama"](), tmp_path).eval(), ids), wanted)
    assert model.peft_config["default"].bundles["b_linear"].alpha == 1.0
    model.set_alphas(b_mlp=[0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"alphas of \['b_mlp'\] differ between rows, tokens or layers"):
        model.bake_alphas()


def test_a_block_that_raises_leaves_no_alphas_behind():
    model, ids = make(), batch(2, 5)
    before = logits(model, ids)
    with pytest.raises(KeyError), model.alphas(b_one=0.0):
        raise KeyError
    with pytest.raises(ValueError, match="rows"):
        model(ids, alphas={"b_one": [1.0, 2.0, 3.0]})
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_generate_takes_one_alpha_a_row(arch, task_type):
    model, ids = make(arch, task_type=task_type), batch(3, 5)
    mask = torch.ones_like(ids)
    alphas = {"b_one": [0.0, 1.0, 3.0], "b_three": [2.0, 0.0, 1.0]}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with model.alphas(alphas):
        together = model.generate(input_ids=ids, attention_mask=mask, **options)
    if task_type is not None:
        called = model.generate(input_ids=ids, attention_mask=mask, alphas=alphas, **options)
        assert torch.equal(together, called)
    for b in range(3):
        with model.alphas({name: values[b] for name, values in alphas.items()}):
            alone = model.generate(input_ids=ids[b : b + 1], attention_mask=mask[b : b + 1], **options)
        assert torch.equal(together[b], alone[0])
    base = model.get_base_model()
    with model.alphas(dict.fromkeys(NAMES, 0.0)):
        off = model.generate(input_ids=ids, attention_mask=mask, **options)
    with model.disable_adapter():
        assert torch.equal(off, base.generate(input_ids=ids, attention_mask=mask, **options))
    assert not torch.equal(off, together)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beam_search_keeps_each_prompts_alphas(options):
    model, ids = make(), batch(3, 5)
    mask = torch.ones_like(ids)
    options = {**options, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    values = [0.0, 1.0, 4.0]
    together = model.generate(input_ids=ids, attention_mask=mask, alphas={"b_one": values}, **options)
    n = options.get("num_return_sequences", 1)
    for b in range(3):
        alone = model.generate(
            input_ids=ids[b : b + 1], attention_mask=mask[b : b + 1], alphas={"b_one": values[b]}, **options
        )
        assert torch.equal(together[b * n : (b + 1) * n], alone)


def test_per_token_alphas_of_a_prompt_go_on_with_the_last_token():
    model, ids = make(), batch(2, 5)
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    gates = torch.rand(2, 5, 3)
    got = model.generate(input_ids=ids, attention_mask=mask, alphas=gates, **options)
    tokens = ids
    for _ in range(4):
        longer = torch.cat([gates, gates[:, -1:].expand(-1, tokens.shape[1] - 5, -1)], 1)
        tokens = torch.cat([tokens, logits(model, tokens, alphas=longer)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, tokens)


def test_two_threads_serve_at_once_with_their_own_alphas():
    model, ids = make(), batch(2, 6)
    model.set_alphas({"b_three": 0.5})
    wanted = {a: with_numbers(model, a, 0.5, 0.5, ids) for a in (0.0, 2.0)}
    barrier, wrong = threading.Barrier(2), []

    def serve(alpha: float) -> None:
        for step in range(30):
            barrier.wait()
            with model.alphas(b_one=alpha) if step % 2 else torch.no_grad():
                got = logits(model, ids, **({} if step % 2 else {"alphas": {"b_one": alpha}}))
            if not torch.equal(got, wanted[alpha]):
                wrong.append((alpha, step))

    threads = [threading.Thread(target=serve, args=(a,)) for a in wanted]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_learnt_alpha_gets_its_gradient():
    model, ids = make("gpt2").double(), batch(2, 5)
    gates = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)

    def run(gates: torch.Tensor) -> torch.Tensor:
        return model(ids, alphas=gates).logits[..., :3].sum((1, 2))

    assert torch.autograd.gradcheck(run, (gates,))
    shared = torch.ones((), dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # the second forward must not reuse the first one's graph
        model(ids, alphas={"b_one": shared}).logits.sum().backward()
    assert shared.grad is not None and shared.grad != 0


def test_functions_work_where_there_is_no_bundle_model():
    model = TINY["gpt2"]()
    ids = batch(2, 5)
    base = logits(model, ids)
    model.add_adapter(make().peft_config["default"])
    perturb(model)
    assert not torch.equal(logits(model, ids), base)
    with peft_bundles.alphas(model, dict.fromkeys(NAMES, 0.0)):
        assert torch.equal(logits(model, ids), base)
    peft_bundles.set_alphas(model, torch.zeros(3))
    assert torch.equal(logits(model, ids), base)
    peft_bundles.set_alphas(model, torch.ones(3))
    with peft_bundles.route(model, "policy"):
        model(ids).logits.sum().backward()
    peft_bundles.finalize_grads(model)
    assert {k.split(".")[-1] for k, p in model.named_parameters() if p.grad is not None} == {"b_three"}
    assert "b_three" in str(peft_bundles.report(model, "default"))


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"b_four": 1.0}, {}, r"unknown bundle\(s\) \['b_four'\].*b_one"),
        ({"b_one": float("nan")}, {}, "b_one.*finite"),
        ({"b_one": torch.tensor([1.0, float("inf")])}, {}, "b_one.*NaN or infinity"),
        (torch.ones(2), {}, r"shape \(2,\); the last axis must have one value for each of the 3 bundles"),
        (torch.ones(2, 4), {}, r"shape \(2, 4\)"),
        (torch.ones(3, 3), {"per": "layer"}, "3 values, but the model has 2 layers"),
        ({"b_one": torch.ones(2, 2, 2)}, {}, r"shape \(2, 2, 2\)"),
        ({"b_one": torch.ones(2, 2)}, {"per": "layer"}, r"give one value per layer, \(L,\)"),
        ({"b_one": 1.0}, {"per": "head"}, "per='head'"),
        ({"b_one": "high"}, {}, r"alphas\['b_one'\]='high' must be a number, or numbers in a tensor or list"),
        ({"b_one": None}, {}, r"alphas\['b_one'\]=None must be a number"),
        ({"b_one": [[0.1], [0.2, 0.3]]}, {}, r"must be a number, or numbers in a tensor or list \(expected sequence"),
        ({"b_one": 1 + 2j}, {}, "must be real"),
        ("high", {}, "alphas='high' must be a number"),
    ],
)
def test_bad_alphas_are_refused_before_any_compute(values, options, message):
    model = make()
    with pytest.raises(ValueError, match=message), model.alphas(values, **options):
        pass
    with pytest.raises(ValueError, match=message):
        model.set_alphas(values, **options)


def test_alphas_for_another_batch_are_refused():
    model, ids = make(), batch(4, 6)
    for values, message in (
        (torch.ones(2, 3), "2 rows, but the batch has 4"),
        ({"b_one": [1.0] * 8}, "8 rows, but the batch has 4"),
        (torch.ones(4, 5, 3), "5 tokens a row, but the batch has 6"),
    ):
        with pytest.raises(ValueError, match=message), model.alphas(values):
            model(ids)


def test_models_without_bundles_are_refused():
    with pytest.raises(ValueError, match="has no bundles; attach some"):
        peft_bundles.set_alphas(TINY["gpt2"](), {"b": 1.0})


def test_set_alphas_reaches_every_thread_and_outlives_a_block():
    model, ids = make(), batch(2, 5)
    on, off = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 2.0]]), torch.tensor([[0.0, 0.3, 1.0], [1.0, 0.2, 0.1]])
    model.set_alphas(on)
    first = logits(model, ids)
    thread = threading.Thread(target=model.set_alphas, args=(off,))
    thread.start()
    thread.join()
    second = logits(model, ids)
    assert not torch.equal(first, second)
    with model.alphas(b_one=0.5):
        logits(model, ids)
        model.set_alphas(on)
    assert torch.equal(logits(model, ids), first)
    on.zero_()  # the user's tensor is not the model's
    assert torch.equal(logits(model, ids), first)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generate_wants_one_alpha_a_prompt(options):
    model, ids = make(), batch(4, 5)
    for call in ({"alphas": {"b_one": [0.5, 3.0]}}, {"adapter_names": ["default", "__base__"]}):
        with pytest.raises(ValueError, match="2 rows, but the batch has 4"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **options, **call)


def test_training_after_an_evaluation_in_inference_mode():
    model, ids = make(), batch(2, 5)
    table = torch.rand(2, 3)
    model.set_alphas({"b_three": torch.tensor([0.3, 0.6])})
    for context in (torch.no_grad(), model.alphas(table)):
        with context:
            with torch.inference_mode():
                model(ids)
            model(ids)
            with torch.enable_grad():
                model(ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.bundle_parameters("b_one"))


def test_alphas_per_layer_and_per_row_at_once():
    model, ids = make(), batch(2, 5)
    rows = torch.tensor([0.5, 2.0])
    with model.alphas({"b_one": [1.0, 0.0]}, per="layer"), model.alphas(b_two=rows):
        together = logits(model, ids)
        assert torch.equal(logits(model, ids), together)
    for row in range(2):
        with model.alphas({"b_one": [1.0, 0.0]}, per="layer"), model.alphas(b_two=float(rows[row])):
            torch.testing.assert_close(logits(model, ids)[row], together[row])


def test_what_is_remembered_of_alphas_does_not_grow_without_end():
    model = make()
    state = next(m for m in model.modules() if isinstance(m, peft_bundles.BundleLayer)).state
    for length in range(1, 60):
        for rows in range(1, 7):
            model.set_alphas({"b_one": torch.rand(rows)})
            logits(model, batch(rows, length % 9 + 1))
    assert len(state.call.own.tensors) <= 257


@pytest.mark.parametrize("input_norm", ["standard", "none"])
def test_folded_follows_all_that_may_change(input_norm):
    """Inside `folded()` each layer keeps what one call looked up; another call's alphas, shapes and adapters differ."""
    configs = [make(input_norm=input_norm).peft_config["default"] for _ in range(2)]
    model = get_peft_model(TINY["llama"](), configs[0])
    peft_bundles.calibrate(model, tokens=256, max_length=32, progress=False)
    model.add_adapter("other", configs[1])
    perturb(model, scale=1.0).eval()
    state, rows, gates = model.base_model._state, torch.rand(3, 3), torch.rand(3, 6, 3)
    learnt = torch.ones((), requires_grad=True)

    def both(ids, **call):
        """Logits, after a look at them without what is kept."""
        found = logits(model, ids, **call)
        folds, state.call.folds = state.call.folds, None
        torch.testing.assert_close(found, logits(model, ids, **call), rtol=1e-5, atol=1e-5)
        state.call.folds = folds
        return found

    long, short = batch(3, 6), batch(2, 4)
    with model.folded():
        found = [
            both(long),
            both(long, alphas={"b_one": 0.3}),
            both(long, alphas={"b_one": rows[:, 0], "b_two": rows[:, 1], "b_three": 2.0}),
            both(long, alphas=dict(zip(NAMES, gates.unbind(-1)))),
            both(short),
            both(short, alphas=dict.fromkeys(NAMES, 0.0)),
        ]
        model.set_alphas({"b_one": -1.0})
        found.append(both(short))
        model.set_adapter("other")
        found.append(both(short))
        model.base_model.set_adapter(["default", "other"])
        found += [both(short), both(short, adapter_names=["default", "__base__"])]
        peft_bundles.set_norm_budget(model, 1e-3)
        found.append(both(short))
        peft_bundles.set_norm_budget(model, None)
        model.set_alphas({"b_one": learnt})
        found.append(both(short))
        with torch.no_grad():
            learnt.fill_(0.2)
        found.append(both(short))
        model.set_alphas({"b_one": 1.0, "b_two": [0.2, 1.5]}, per="layer")
        found += [both(short), both(short, alphas={"b_one": rows[:2, 0]})]
        with torch.autocast("cpu", torch.bfloat16):
            found.append(both(short))
    for a, b in itertools.pairwise(found):
        assert a.shape != b.shape or not torch.equal(a, b)


def test_gates_by_row_are_not_those_of_an_adapter_that_had_the_name_before():
    """The same bundles in another order, and a config's own alpha that is changed, beside gates that stay."""
    model = attached(adapter="x")
    model.add_adapter("y", bundle_config(bundles={"b_other": {"rank": 5, "sub_bases": ["right"]}}))
    model.set_alphas({"b_mlp": torch.tensor([0.5, 0.25])})
    ids, table = batch(2, 6), {n: {"rank": 8, "sub_bases": ["left"]} for n in ("b_mlp", "b_second")}
    for order in (("b_mlp", "b_second"), ("b_second", "b_mlp")):
        logits(model, ids)
        model.set_adapter("y")
        model.delete_adapter("x")
        model.add_adapter("x", bundle_config(bundles={name: table[name] for name in order}))
        model.set_adapter("x")
        perturb(model, "x").eval()
        found = logits(model, ids)
        assert torch.equal(found, logits(model, ids, alphas={"b_mlp": torch.tensor([0.5, 0.25])}))
    model.peft_config["x"].bundles["b_second"].alpha = 0.0
    assert torch.equal(logits(model, ids), logits(model, ids, alphas={"b_second": 0.0}))
    assert not torch.equal(logits(model, ids), found)
