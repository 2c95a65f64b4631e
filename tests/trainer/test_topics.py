"""Topics of rows in `BundleTrainer`: who learns from a row, with what weight and rate, and that runs stay exact."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import TINY, perturb, snapshot, unchanged
from peft import get_peft_model
from torch import Tensor
from training import Watch, arguments, bundles_of, losses_of, tokenizer, two_processes

from peft_bundles import BundleConfig, calibrate
from peft_bundles.objectives import (
    LM,
    PPO,
    Anchor,
    Calibration,
    Confusion,
    Consistency,
    Contrastive,
    MetaCorrectness,
    Preference,
    Temporal,
)
from peft_bundles.objectives.topical import RowTopics
from peft_bundles.routers.topics import MASKS, TopicRouting
from peft_bundles.trainer import BundleTrainer
from peft_bundles.trainer.topics import check_topics


TOPICS = ["animals", "law", "finance"]
SIGNALS = ("lm", "logic", "preference", "policy", "value", "kl", "anchor")
META = ("confusion", "calibration", "meta_correctness", "consistency", "contrastive", "temporal")


def config(**fields) -> BundleConfig:
    """A bundle that is always on, and one a topic; all learn from everything, the general one not from "logic"."""
    general = {"rank": 8, "sub_bases": ["a"], "signals": dict.fromkeys((*SIGNALS, *META), 1.0)}
    topical = {"rank": 6, "sub_bases": ["b"], "role": "semantic", "signals": dict.fromkeys(SIGNALS, 0.5)}
    bundles = {"b_general": general, **{f"b_sem_{t}": {**topical, "topic": t} for t in TOPICS}}
    return BundleConfig(
        **{"sub_bases": {"a": 24, "b": 16}, "bottleneck": 1.0, "bundles": bundles, "task_type": "CAUSAL_LM", **fields}
    )


def model(*, calibrated: bool = False, **fields):
    made = get_peft_model(TINY["llama"](), config(**fields))
    if calibrated:
        calibrate(made, tokens=1024, max_length=64, progress=False)
    return perturb(made, scale=0.1)


def texts(count: int = 12) -> list[dict]:
    """Text 3n is about animals and law, 3n + 1 about finance, 3n + 2 about nothing; of different lengths."""
    topics = lambda i: [{"animals": 1 - i / 20, "law": 0.25}, {"finance": i / 12}, {}][i % 3]  # noqa: E731
    return [{"text": f"text {i} " + "la " * (i % 5), "topics": topics(i)} for i in range(count)]


def two_topics(count: int = 12) -> list[dict]:
    return [{"text": f"text {i}", "topics": ["animals", "law"]} for i in range(count)]


def trainer(folder: Path, objectives, on=None, mask: str = "soft", **fields) -> BundleTrainer:
    topics = {"topics": TOPICS, "mask": mask, **fields.pop("routing", {})}
    return BundleTrainer(on or model(), arguments(folder, topics=topics, **fields), objectives, tokenizer())


# ---- who learns ----


@pytest.mark.parametrize("mask", MASKS)
def test_rows_about_two_topics_train_both_bundles_and_no_third(tmp_path, mask):
    """Bit for bit, with AdamW's momentum and decay from the steps on another objective between."""
    others = [{"text": f"other {i}", "topics": [0.0, 0.0, 1.0]} for i in range(4)]
    run = trainer(
        tmp_path, [LM(others), LM(two_topics(), signal="logic")], mask=mask, mixing="alternate", max_steps=6,
        weight_decay=0.1, forward={"logic": {"b_general": 1.0}},
    )  # fmt: skip
    run.add_callback(watch := Watch(run))
    run.train()
    assert watch.moved() == [{"b_general", "b_sem_finance"}, {"b_general", "b_sem_animals", "b_sem_law"}] * 3


def test_a_row_without_topic_trains_only_what_is_always_on(tmp_path):
    rows = LM([{"text": "about nothing", "topics": []}, {"text": "nor this", "topics": []}])
    run = trainer(tmp_path, rows, max_steps=2)
    run.add_callback(watch := Watch(run))
    run.train()
    assert watch.moved() == [{"b_general"}] * 2


def test_a_step_whose_rows_have_none_of_the_topics_of_its_bundles_moves_nothing(tmp_path):
    """Only topic bundles learn; rows of two objectives, of which one has topics."""
    topical = {n: s for n, s in model().peft_config["default"].bundles.items() if n != "b_general"}
    rows = [{"text": "about nothing", "topics": []}, {"text": "of law", "topics": ["law"]}]
    run = trainer(tmp_path, LM(rows), model(bundles=topical), per_device_train_batch_size=1, max_steps=8)
    run.add_callback(watch := Watch(run))
    run.train()
    assert sorted(map(sorted, watch.moved())) == [[]] * 4 + [["b_sem_law"]] * 4


@pytest.mark.parametrize("shared", [True, False])
def test_objectives_without_the_column_are_as_they_were(tmp_path, shared):
    """SGD, one step: beside rows with topics, the other objective's gradient is that of a run without topics."""
    pairs = [{"prompt": f"say {i}:", "chosen": f"yes {i}", "rejected": "no"} for i in range(6)]
    common = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0.0, "shared_forward": shared}
    moved = []
    for objectives in ([LM(two_topics()), Preference(pairs)], [LM(two_topics())], [Preference(pairs)]):
        made = model()
        before = bundles_of(made)
        topics = {"topics": TOPICS} if isinstance(objectives[0], LM) else None
        BundleTrainer(made, arguments(tmp_path, topics=topics, **common), objectives, tokenizer()).train()
        moved.append({n: [a - b for a, b in zip(ps, before[n])] for n, ps in bundles_of(made).items()})
    both, text, preference = moved
    for name in both:
        for sum_, a, b in zip(both[name], text[name], preference[name]):
            torch.testing.assert_close(sum_, a + b, rtol=1e-3, atol=2e-6)
    assert not any(t.any() for t in text["b_sem_finance"]) and any(t.any() for t in preference["b_sem_finance"])


# ---- with what weight ----


@pytest.mark.parametrize("gate_forward", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_the_trainer_is_the_plain_loop(tmp_path, mask, gate_forward):
    """AdamW, alphas, weights and rates, against the loop of docs/guides/topics.md on the same rows."""
    made, plain = model(), model()
    dataset = texts()
    common = {"weight_decay": 0.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "optim": "adamw_torch"}
    run = trainer(tmp_path, rows := LM(dataset), made, mask, routing={"gate_forward": gate_forward}, **common)
    run.train()
    routing, adapter = TopicRouting(TOPICS, mask, gate_forward), plain.peft_config["default"]
    table = bundles_parameters(plain)
    optimizer = torch.optim.AdamW([{"params": ps, "name": n} for n, ps in table.items()], lr=1e-2, weight_decay=0.0)
    plain.train()
    rates_seen = []
    for step in range(3):
        (batch,) = rows.batches(run.forward, step, run.share("lm"))
        tau = torch.stack([tau_of(dataset, ids) for ids in batch["input_ids"]])
        weights = routing.weights(adapter, tau, draws=batch.get("draws"))
        with plain.alphas(routing.alphas(adapter, tau)), plain.route("lm", weights=weights):
            logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        wanted = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        F.cross_entropy(logits[:, :-1].transpose(1, 2), wanted[:, 1:]).backward()
        plain.finalize_grads()
        rates_seen.append(rates := routing.rates(adapter, tau))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rates.get(group["name"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, found in bundles_of(made).items():
        # Where a gradient is nearly 0, Adam makes a step of 1e-2 out of its sign and its rounding.
        torch.testing.assert_close(found, bundles_of(plain)[name], rtol=1e-4, atol=2e-4, msg=lambda m, n=name: n + m)
    assert (len({json.dumps(r) for r in rates_seen}) > 1) == (mask == "rate")
    assert all(group["lr"] == 1e-2 for group in run.optimizer.param_groups)  # scaled for the step only


def bundles_parameters(on) -> dict[str, list]:
    return {name: list(on.bundle_parameters(name)) for name in on.peft_config["default"].bundles}


def tau_of(dataset: list[dict], ids: Tensor) -> Tensor:
    """The topic vector of the row whose text these ids are."""
    number = re.match(r"text(\d+)", tokenizer().decode(ids).replace(" ", ""))[1]
    return torch.tensor([dataset[int(number)]["topics"].get(t, 0.0) for t in TOPICS], dtype=torch.float64)


def marked(count: int = 9) -> list[tuple[str, list[float]]]:
    """A letter and a topic vector of its own a row."""
    return [(chr(ord("A") + i), [i / 10, 0.0, 1.0 - i / 10]) for i in range(count)]


def length(completions, **columns) -> list[float]:
    assert set(columns) <= {"topics", "trainer_state", "completion_ids", "prompts"}
    return [float(len(c)) for c in completions]


def made_of(row) -> list:
    """Every objective with rows that name their letter in each of their sequences, some rows dropped."""
    pair = lambda c: {"prompt": f"{c}:", "chosen": "yes", "rejected": "no"}  # noqa: E731
    judged = lambda c: {"prompt": f"{c}=", "completion": "x" * (1 + ord(c) % 3 * 9), "correct": c < "D"}  # noqa: E731
    return [
        LM(row(lambda c: {"text": c * 3 if c != "B" else "B"})),  # one token: nothing to predict
        LM(row(lambda c: {"input_ids": tokenizer()(c * (3 if c != "C" else 1))["input_ids"]}), signal="logic"),
        LM(row(lambda c: {"prompt": f"{c}", "completion": c if c != "D" else ""}), signal="completion"),
        Anchor(row(lambda c: {"text": c * 4})),
        Preference(row(pair)),
        Preference(row(pair), loss="kto", signal="kto_pairs"),
        Preference(row(lambda c: {"prompt": c, "completion": c, "label": c < "D"}), loss="kto", signal="kto"),
        PPO(row(lambda c: {"prompt": c * 2}), length, num_generations=2, max_completion_length=2),
        Confusion(row(judged), max_length=12),
        Calibration(row(judged), max_length=12),
        MetaCorrectness(row(lambda c: {**judged(c), "explanation": c}), max_length=12, signal="single"),
        MetaCorrectness(row(pair)),
        Consistency(row(lambda c: {"first": f"{c} is", "second": f"{c} not", "contradicts": c < "D"})),
        Contrastive(row(lambda c: {"anchor": f"{c} is", "positive": f"so {c}"})),
        Temporal(row(lambda c: {"segments": [f"{c} goes", "on"] if c != "E" else ["E" * 40, "F" * 40]}), max_length=30),
    ]


def test_every_sequence_of_every_objective_has_the_topics_of_its_row(tmp_path):
    row = lambda make: [{**make(letter), "topics": tau} for letter, tau in marked()]  # noqa: E731
    signals = dict.fromkeys((*SIGNALS, *META, "completion", "kto_pairs", "kto", "single"), 1.0)
    bundles = {f"b_sem_{t}": {"rank": 6, "sub_bases": ["b"], "role": "semantic", "topic": t} for t in TOPICS}
    bundles |= {"b_general": {"rank": 8, "sub_bases": ["a"], "signals": signals}}
    run = trainer(tmp_path, made_of(row), model(bundles=bundles), "stochastic", per_device_train_batch_size=4)
    expected, tok = dict(marked()), tokenizer()
    for name, objective in run.objectives.items():
        (batch,) = objective.batches(run.forward, 0, run.share(name))
        assert len(batch["topics"]) == len(batch["draws"]) == len(batch["input_ids"]), name
        for ids, tau in zip(batch["input_ids"], batch["topics"]):
            letter = next(c for c in tok.decode(ids) if c in expected)
            assert tau.tolist() == expected[letter], (name, tok.decode(ids))
        if len(batch["draws"]) == 8:  # the two sides of a row are one row
            assert torch.equal(*batch["draws"].chunk(2)) and len(batch["draws"].unique()) == 12, name


def test_rollouts_are_generated_and_scored_under_their_topics(tmp_path):
    """On the first step the policy is the old one: had any of the two other alphas, the KL between them would show."""
    prompts = [{"prompt": "a" * n, "topics": [0.0, n / 5, 1.0]} for n in (3, 1, 5, 2)]
    ppo = PPO(prompts, length, max_completion_length=4, num_generations=2, epochs=2)
    run = trainer(tmp_path, ppo, max_steps=2, per_device_train_batch_size=4, learning_rate=0.1)
    called = []
    generate = run.model.generate

    def noted(**options):
        state = run.model.base_model._state.call.alphas
        called.append({name: alpha.tolist() if isinstance(alpha, Tensor) else alpha for name, alpha in state.items()})
        return generate(**options)

    run.model.generate = noted
    run.train()
    first, second = (entry["ppo/kl_to_old"] for entry in run.state.log_history[:2])
    assert first == pytest.approx(0, abs=1e-6) and second > 1e-4
    (alphas,) = called
    assert alphas["b_sem_animals"] == 0.0 and alphas["b_sem_finance"] == [1.0] * 4
    assert alphas["b_sem_law"][::2] == alphas["b_sem_law"][1::2] and 0 < alphas["b_sem_law"][0] < 1.001


# ---- exactness ----


@pytest.mark.parametrize("mask", ["stochastic", "rate"])
def test_accumulation_does_not_change_the_step(tmp_path, mask):
    results = []
    for size, accumulation in ((4, 1), (1, 4)):
        made = model(calibrated=mask == "rate")
        trainer(
            tmp_path, [LM(texts()), LM(texts(7), signal="logic")], made, mask, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, optim="sgd", optim_args="momentum=0.9", learning_rate=0.1,
        ).train()  # fmt: skip
        results.append(bundles_of(made))
    for name, found in results[0].items():
        torch.testing.assert_close(found, results[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask", ["stochastic", "rate"])
def test_a_resumed_run_is_the_run(tmp_path, mask):
    prompts = [{"prompt": "a" * n, "topics": ["law"]} for n in (3, 1, 5, 2)]
    objectives = lambda: [LM(texts()), PPO(prompts, length, max_completion_length=3, epochs=4)]  # noqa: E731
    common = {"max_steps": 5, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, objectives(), model(calibrated=True), mask, **common)
    whole.train()
    kept = snapshot(whole.model.state_dict()), losses_of(whole)
    resumed = trainer(tmp_path, objectives(), model(calibrated=True), mask, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # in the middle of a rollout
    assert losses_of(resumed) == kept[1] and unchanged(kept[0], resumed.model.state_dict())
    other = trainer(tmp_path, objectives(), model(calibrated=True), "soft", **common)
    with pytest.raises(ValueError, match=rf"another topics: mask was '{mask}', is 'soft'"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def run_of(folder: Path, world: int, mask: str, **fields) -> BundleTrainer:
    """Often one process has a topic in a step that the other has not; with "hard" one has none at all."""
    rows = [LM(texts(), eval_dataset=texts(5)), LM(texts(7), signal="logic")]
    if mask == "hard":
        rows = LM([{"text": "of law", "topics": ["law"]}, {"text": "of none", "topics": []}], eval_dataset=texts(5))
    made = model(calibrated=True, place=["block", "down_proj"])
    return trainer(
        folder, rows, made, mask, max_steps=4, optim="sgd", optim_args="momentum=0.9",
        per_device_train_batch_size=(2 if mask == "hard" else 4) // world, learning_rate=0.05, **fields,
    )  # fmt: skip


def worker(rank: int, folder: str) -> None:
    found = {}
    for mask in ("stochastic", "rate", "hard"):
        run = run_of(Path(folder), 2, mask, ddp_backend="gloo")
        run.train()
        found[mask] = bundles_of(run.model), run.evaluate()["eval_loss/lm"]
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    first, second = two_processes(worker, tmp_path)
    for mask in ("stochastic", "rate", "hard"):
        alone = run_of(tmp_path, 1, mask)
        alone.train()
        for name, weights in bundles_of(alone.model).items():
            assert all(map(torch.equal, first[mask][0][name], second[mask][0][name])), name
            torch.testing.assert_close(first[mask][0][name], weights, rtol=1e-4, atol=1e-6)
        assert first[mask][1] == pytest.approx(alone.evaluate()["eval_loss/lm"], rel=1e-4)


def test_evaluation_is_under_the_rows_topics(tmp_path):
    held_out = texts(3)
    run = trainer(tmp_path, rows := LM(texts(), eval_dataset=held_out), per_device_train_batch_size=3)
    found = run.evaluate()["eval_loss/lm"]
    batch = rows.collate(list(rows.eval_rows))
    tau = torch.stack([tau_of(held_out, ids) for ids in batch["input_ids"]])
    with torch.no_grad(), run.model.alphas(TopicRouting(TOPICS).alphas(run.bundle_config, tau)):
        logits = run.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert found == pytest.approx(float(F.cross_entropy(logits[:, :-1].transpose(1, 2), wanted[:, 1:])), rel=1e-5)


# ---- bad input ----


def with_topics(*values) -> list[dict]:
    return [{"text": f"text {i}", "topics": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (with_topics(["animals"], ["art"]), r"objective 'lm': row 1: topics=\['art'\] names \['art'\]; the topics are"),
        (with_topics({"art": 0.5}), r"names \['art'\]; the topics are \['animals', 'law', 'finance'\]"),
        (with_topics([0.5, 0.5]), r"row 0: topics=\[0.5, 0.5\] has 2 numbers, but the topics are"),
        (with_topics([0.5, 0.5, 1.5]), r"'finance' has weight 1.5; give a number in \[0, 1\]"),
        (with_topics([0.5, 0.5, float("nan")]), r"'finance' has weight nan"),
        (with_topics(["law"], None), r"row 1: topics=None: give 3 numbers, a dict topic -> weight, or a list of names"),
        (with_topics("law"), r"row 0: topics='law': give 3 numbers"),
        ([{"text": "no topic"}], r"topics are set, but no objective's dataset has a column 'topics'\. Add it"),
    ],
)
def test_rows_that_cannot_be(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, LM(rows))


def test_topics_that_nobody_owns(tmp_path):
    routing = {"topics": [*TOPICS, "art"]}
    with pytest.raises(ValueError, match=r"objective 'lm': rows have the topic\(s\) \['art'\], which no bundle owns"):
        trainer(tmp_path, LM(with_topics(["law"], ["art"])), routing=routing)
    with pytest.raises(ValueError, match=r"bundle 'b_sem_animals' is about 'animals', but the topics are \['law'\]"):
        trainer(tmp_path, LM(with_topics(["law"])), routing={"topics": ["law"]})


def test_training_rows_and_held_out_rows_must_agree(tmp_path):
    plain = [{"text": "no topic"}]
    with pytest.raises(ValueError, match=r"the train rows have a column 'topics' and the eval rows have none"):
        trainer(tmp_path, LM(two_topics(), eval_dataset=plain))
    with pytest.raises(ValueError, match=r"the eval rows have a column 'topics' and the train rows have none"):
        trainer(tmp_path, [LM(plain, eval_dataset=two_topics()), LM(two_topics(), signal="logic")])


@pytest.mark.parametrize(
    ("topics", "message"),
    [
        ({"topics": TOPICS, "masks": "soft"}, r"topics has unknown field\(s\) \['masks'\]; it takes topics, mask,"),
        ({"topics": TOPICS, "mask": "fuzzy"}, r"topics: mask='fuzzy' is unknown; choose one of soft, hard"),
        (["law"], r"topics=\['law'\] must be a dict, e.g. \{'topics': "),
        (True, "topics=True must be a dict"),
        ({"mask": "soft"}, r"topics: topics=\[\] must name the columns of tau"),
    ],
)
def test_settings_that_cannot_be(tmp_path, topics, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, topics=topics)


def test_a_signal_that_only_topics_learn_from_does_not_go_with_a_sharded_trunk():
    """Each signal may take a backward of its own, which processes without the topic would not have."""
    bundles = {
        "b_main": {"rank": 8, "sub_bases": ["a"], "signals": {"policy": 1.0, "kl": 1.0}},
        "b_law": {"rank": 6, "sub_bases": ["b"], "signals": {"value": 1.0}, "role": "semantic", "topic": "law"},
    }
    topics = RowTopics(TopicRouting(topics=["law"]), config(bundles=bundles))
    ppo = PPO([{"prompt": "a", "topics": ["law"]}], lambda completions, **_: [0.0] * len(completions))
    ppo.topics, ppo.rows = topics, [{"_tau": [1.0]}]
    check_topics(topics, [ppo], sharded=False)
    with pytest.raises(ValueError, match=r"objective 'ppo': signal\(s\) \['value'\] update topic bundles only"):
        check_topics(topics, [ppo], sharded=True)
