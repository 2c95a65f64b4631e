"""Topic vectors as gates: who learns from a row about two topics, who does not, and the four masks."""

import pytest
import torch
from models import TINY, batch, perturb
from peft import get_peft_model

from peft_bundles import BundleConfig
from peft_bundles.core.walking import bundle_parameters
from peft_bundles.routers.topics import MASKS, TopicRouting


TOPICS = ["animals", "law", "finance"]
ON = ["b_mem_global", "b_abstraction"]


def config(**fields) -> BundleConfig:
    semantic = {
        f"b_sem_{t}": {
            "rank": 6,
            "sub_bases": ["mem", "abstraction"],
            "role": "semantic",
            "topic": t,
            "signals": {"lm": 1.0},
        }
        for t in TOPICS
    }
    general = {
        "b_mem_global": {"rank": 8, "sub_bases": ["mem"], "signals": {"lm": 1.0}},
        "b_abstraction": {"rank": 8, "sub_bases": ["abstraction"], "signals": {"lm": 1.0}},
    }
    return BundleConfig(
        task_type="CAUSAL_LM",
        sub_bases={"mem": 16, "abstraction": 16},
        bundles={**general, **semantic},
        bottleneck=0.5,
        **fields,
    )


def made(name="llama", dtype=torch.float32, **fields):
    model = get_peft_model(TINY[name](), config(**fields), autocast_adapter_dtype=False)
    return perturb(model, scale=0.1).to(dtype).train()


def gradients(model) -> dict:
    table = bundle_parameters(model)
    found = {name: [None if p.grad is None else p.grad.clone() for p in ps] for (_, name), ps in table.items()}
    model.zero_grad(set_to_none=True)
    return found


def row_losses(model, ids):
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("mask", MASKS)
def test_two_topics_train_both_bundles_and_no_third(name, mask):
    """Bitwise, after AdamW steps with momentum and weight decay from earlier steps on all bundles."""
    model = made(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    row_losses(model, batch()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    routing = TopicRouting(TOPICS, mask=mask)
    tau = torch.tensor([[0.7, 0.6, 0.0]] * 3)
    adapter = model.peft_config["default"]
    trained = {name: False for _, name in bundle_parameters(model)}
    for step in range(4):  # "stochastic" may leave a bundle out of a step
        before = {key: [p.detach().clone() for p in ps] for key, ps in bundle_parameters(model).items()}
        weights = routing.weights(adapter, tau, step)
        with model.alphas(routing.alphas(adapter, tau)), model.route("lm", weights=weights):
            row_losses(model, batch()).sum().backward()
        model.finalize_grads()
        optimizer.step()
        for key, ps in bundle_parameters(model).items():
            same = [torch.equal(p, b) for p, b in zip(ps, before[key])]
            live = key[1] not in weights or bool(weights[key[1]].any())
            assert not any(same) if live else all(same), key
            trained[key[1]] |= live
        optimizer.zero_grad()
    assert trained == {**dict.fromkeys([*ON, "b_sem_animals", "b_sem_law"], True), "b_sem_finance": False}


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_the_gradient_is_the_rows_own_times_topic_times_table(name):
    """In float64: sum over rows of tau_ik * table_k * dL_i, against a backward for each row by itself."""
    model = made(name, torch.float64).eval()
    ids = batch(4)
    tau = torch.tensor([[1.0, 0.0, 0.25], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.3, 1.0]], dtype=torch.float64)
    routing = TopicRouting(TOPICS, gate_forward=False)
    weights = routing.weights(model.peft_config["default"], tau)
    with model.route("lm", weights=weights):
        row_losses(model, ids).sum().backward()
    model.finalize_grads()
    ours = gradients(model)
    expected = dict.fromkeys(ours)
    for i in range(4):
        row_losses(model, ids)[i].backward()
        for bundle, grads in gradients(model).items():
            factor = float(weights[bundle][i]) if bundle in weights else 1.0
            scaled = [g * factor for g in grads]
            expected[bundle] = scaled if expected[bundle] is None else [a + b for a, b in zip(expected[bundle], scaled)]
    for bundle, grads in ours.items():
        for got, wanted in zip(grads, expected[bundle]):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
            assert wanted.abs().max() > 0


def test_a_weight_that_only_meets_signals_without_the_bundle_leaves_no_gradient():
    """Zero in the rows that it could learn from, one in a row whose signal does not know it: None, and not zeros."""
    semantic = {"rank": 6, "sub_bases": ["mem"], "signals": {"lm": 1.0}}
    other = {"rank": 6, "sub_bases": ["mem"], "signals": {"policy": 1.0, "lm": 1.0}}
    given = BundleConfig(task_type="CAUSAL_LM", sub_bases={"mem": 16}, bundles={"b_a": semantic, "b_b": other})
    model = perturb(get_peft_model(TINY["llama"](), given))
    with model.route(["lm", "policy"], weights={"b_a": [0.0, 1.0]}):
        row_losses(model, batch(2)).sum().backward()
    model.finalize_grads()
    found = gradients(model)
    assert all(g is None for g in found["b_a"]) and all(g is not None for g in found["b_b"])


def test_weights_hold_in_routed_backward_too():
    model = made("gpt2", torch.float64).eval()
    weights = {"b_sem_law": torch.tensor([0.5, 0.0, 1.0])}
    with model.route("lm", weights=weights):
        loss = row_losses(model, batch()).sum()
        model.routed_backward({"lm": loss})
    ours = gradients(model)
    with model.route("lm", weights=weights):
        row_losses(model, batch()).sum().backward()
    theirs = gradients(model)
    for name in ours:
        assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name])), name


def test_a_text_without_topic_trains_what_is_always_on():
    model = made()
    routing = TopicRouting(TOPICS)
    tau = torch.zeros(3, 3)
    adapter = model.peft_config["default"]
    with model.alphas(routing.alphas(adapter, tau)), model.route("lm", weights=routing.weights(adapter, tau)):
        row_losses(model, batch()).sum().backward()
    model.finalize_grads()
    found = gradients(model)
    assert all((g is None) == (name not in ON) for name, grads in found.items() for g in grads)


def test_masks():
    tau = torch.tensor([[0.5, 0.2, 0.0], [1.0, 0.0, 0.0]])
    adapter = config()
    soft, hard, rate = (TopicRouting(TOPICS, mask=m) for m in ("soft", "hard", "rate"))
    assert soft.weights(adapter, tau)["b_sem_animals"].tolist() == [0.5, 1.0]
    assert hard.weights(adapter, tau)["b_sem_animals"].tolist() == [1.0, 1.0]
    assert hard.weights(adapter, tau)["b_sem_law"].tolist() == [0.0, 0.0]
    assert rate.weights(adapter, tau)["b_sem_law"].tolist() == [1.0, 0.0]
    assert rate.rates(adapter, tau) == pytest.approx({"b_sem_animals": 0.75, "b_sem_law": 0.2, "b_sem_finance": 0.0})
    assert soft.rates(adapter, tau) == {}
    drawn = TopicRouting(TOPICS, mask="stochastic", seed=3)
    many = torch.tensor([[0.3, 1.0, 0.0]] * 2000)
    first = drawn.weights(adapter, many, 5)
    assert torch.equal(first["b_sem_animals"], drawn.weights(adapter, many, 5)["b_sem_animals"])
    assert not torch.equal(first["b_sem_animals"], drawn.weights(adapter, many, 6)["b_sem_animals"])
    assert abs(float(first["b_sem_animals"].mean()) - 0.3) < 0.05  # 5 standard deviations
    assert first["b_sem_law"].all() and not first["b_sem_finance"].any()


def test_alphas_are_the_weights_of_the_mask_or_tau_where_weights_are_drawn_or_rates():
    tau = torch.tensor([[0.5, 0.2, 0.0], [1.0, 0.0, 0.7]])
    adapter = config()
    for mask, same in (("soft", "soft"), ("hard", "hard"), ("stochastic", "soft"), ("rate", "soft")):
        alphas = TopicRouting(TOPICS, mask=mask).alphas(adapter, tau)
        weights = TopicRouting(TOPICS, mask=same).weights(adapter, tau)
        assert {name: alpha.tolist() for name, alpha in alphas.items()} == {
            name: weight.float().tolist() for name, weight in weights.items()
        }
        assert TopicRouting(TOPICS, mask=mask, gate_forward=False).alphas(adapter, tau) == {}


def test_alphas_are_those_of_the_rows():
    """A row's output is what the same row has alone with its alphas as numbers; a bundle's own alpha is a factor."""
    model = made().eval()
    model.peft_config["default"].bundles["b_sem_law"].alpha = 0.5
    tau = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    alphas = TopicRouting(TOPICS).alphas(model.peft_config["default"], tau)
    with torch.no_grad(), model.alphas(alphas):
        together = model(input_ids=batch()).logits
    for i, values in enumerate([(0.5, 0.5, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)]):
        with torch.no_grad(), model.alphas({f"b_sem_{t}": v for t, v in zip(TOPICS, values)}):
            alone = model(input_ids=batch()).logits[i]
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: TopicRouting(TOPICS, mask="fuzzy"), r"mask='fuzzy' is unknown"),
        (lambda m: TopicRouting([]), r"topics=\[\] must name"),
        (lambda m: TopicRouting(["law", "law"]), r"each once"),
        (lambda m: TopicRouting(TOPICS, threshold=0), r"threshold=0 must be"),
        (lambda m: TopicRouting(TOPICS).weights(m, torch.tensor([[1.5, 0, 0]])), r"tau holds values from 0 to 1.5"),
        (lambda m: TopicRouting(TOPICS).weights(m, torch.tensor([[-0.1, 0, 0]])), r"must be in \[0, 1\]"),
        (lambda m: TopicRouting(TOPICS).weights(m, torch.tensor([[float("nan"), 0, 0]])), r"must be in \[0, 1\]"),
        (lambda m: TopicRouting(TOPICS).weights(m, torch.ones(2, 4)), r"give \(B, 3\)"),
        (lambda m: TopicRouting([*TOPICS, "art"]).weights(m, torch.ones(2, 4)), r"\['art'\], which no bundle owns"),
        (lambda m: TopicRouting(["law"]).weights(m, torch.ones(2, 1)), r"is about 'animals', but the topics are"),
    ],
)
def test_bad_topics(call, message):
    with pytest.raises(ValueError, match=message):
        call(config())


def test_a_topic_nobody_owns_is_no_matter_until_a_row_has_it():
    tau = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert set(TopicRouting([*TOPICS, "art"]).weights(config(), tau)) == {f"b_sem_{t}" for t in TOPICS}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"b_sem_cooking": [1.0] * 3}, r"name the bundle 'b_sem_cooking', which no adapter has"),
        ({"b_sem_law": [1.0, 2.0, 0.0]}, r"must be one number in \[0, 1\] for each row"),
        ({"b_sem_law": 0.5}, r"must be one number in \[0, 1\] for each row"),
        ({"b_sem_law": [1.0] * 3, "b_sem_animals": [1.0] * 2}, r"\{'b_sem_animals': 2\} values, but there are 3 rows"),
    ],
)
def test_bad_weights(weights, message):
    model = made()
    with pytest.raises(ValueError, match=message), model.route("lm", weights=weights):
        pass


def test_weights_for_another_batch():
    model = made()
    with pytest.raises(ValueError, match="given 2 rows, but the batch has 3"):
        with model.route("lm", weights={"b_sem_law": [1.0, 0.0]}):
            model(input_ids=batch(3))
