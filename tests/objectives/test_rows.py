"""Rows of every format: what is trained on, against TRL where it prepares the same row, and what is refused."""

from __future__ import annotations

import math
import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import TINY
from peft import get_peft_model
from training import TEMPLATE, chat, model, pairs, texts, tokenizer, trainer
from trl import SFTConfig, SFTTrainer

from peft_bundles import BundleConfig, calibrate
from peft_bundles.objectives import (
    LM,
    PPO,
    Calibration,
    Consistency,
    Contrastive,
    MetaCorrectness,
    Preference,
    Temporal,
)


IDS = [5, 6, 7, 8, 9, 10]


def ones(completions, **_) -> list[float]:
    return [1.0] * len(completions)


def prepared(objective, tokens: Any = None) -> list[dict[str, Any]]:
    """The objective's rows, without a trainer."""
    objective.setup(tokens or tokenizer(), model())
    return list(objective.rows)


# ---- tokenized rows ----


def loss_of(folder, row: dict[str, Any], **fields) -> float:
    run = trainer(folder, LM([row] * 4, **fields), max_steps=1)
    run.train()
    return run.state.log_history[0]["loss/lm"]


@pytest.mark.parametrize(
    "columns",
    [
        {"token_weights": [0.0, 0, 0, 1, 1, 1]},
        {"labels": [-100] * 3 + IDS[3:]},
        {"completion_mask": [0, 0, 0, 1, 1, 1]},
        {"assistant_masks": [0, 0, 0, 1, 1, 1]},
        {"labels": [-100] * 3 + IDS[3:], "completion_mask": [0, 0, 1, 1, 1, 1], "attention_mask": [1] * 6},
    ],
    ids=lambda columns: "-".join(columns),
)
def test_columns_of_a_tokenized_row_say_what_is_learnt(columns):
    (row,) = prepared(LM([{"input_ids": IDS, **columns}]))
    assert row["input_ids"] == IDS and row["token_weights"] == [0, 0, 0, 1, 1, 1]


def test_labels_give_the_loss_of_trl(tmp_path):
    row = {"input_ids": IDS, "labels": [-100] * 3 + IDS[3:]}
    args = SFTConfig(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, bf16=False, logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=2, save_strategy="no",
    )  # fmt: skip
    run = SFTTrainer(model(), args=args, train_dataset=Dataset.from_list([row] * 4), processing_class=tokenizer())
    run.train()
    assert loss_of(tmp_path, row) == pytest.approx(run.state.log_history[0]["loss"], abs=1e-4)


def test_weights_of_prompt_and_completion_hold_for_masks():
    row = {"input_ids": IDS, "completion_mask": [0, 0, 0, 1, 1, 1]}
    (row,) = prepared(LM([row], prompt_weight=0.5, completion_weight=2.0))
    assert row["token_weights"] == [0.5] * 3 + [2.0] * 3


@pytest.mark.parametrize("left", [True, False])
def test_padding_of_a_tokenized_row_is_taken_off(tmp_path, left):
    pad, mask = [0, 0, 0], [0, 0, 0]
    row = {"input_ids": pad + IDS if left else IDS + pad, "attention_mask": mask + [1] * 6 if left else [1] * 6 + mask}
    assert loss_of(tmp_path, row) == loss_of(tmp_path, {"input_ids": IDS})


@pytest.mark.parametrize(
    "row, message",
    [
        ({"labels": [5, 6, 7]}, r"row 0 has 6 input_ids and labels=\[5, 6, 7\]; give a number a token"),
        ({"labels": [6, 7, 8, 9, 10, -100]}, r"labels\[0\] is 6 and input_ids\[0\] is 5; .* not shifted"),
        ({"attention_mask": [1, 0, 1, 1, 1, 1]}, "attention_mask has a 0 between tokens"),
        ({"position_ids": [0, 1, 2, 0, 1, 2]}, "'position_ids' says that several sequences are packed"),
        ({"input_ids": ["a", "b"]}, r"input_ids=\['a', 'b'\]; give a list of token ids"),
        ({"input_ids": 5}, "input_ids=5; give a list of token ids"),
    ],
)
def test_tokenized_rows_that_say_something_else_are_refused(row, message):
    with pytest.raises(ValueError, match=f"objective 'lm': .*{message}"):
        prepared(LM([{"input_ids": IDS, **row}]))


# ---- tools ----

TOOLS = [{"type": "function", "function": {"name": "move", "description": "d", "parameters": {"type": "object"}}}]


def with_tools():
    tokens = tokenizer()
    tokens.chat_template = (
        "{% if tools %}T:{{ tools[0]['function']['name'] }};{% endif %}{% if loud %}!{% endif %}" + TEMPLATE
    )
    return tokens


@pytest.mark.parametrize(
    "options", [{"tools": TOOLS}, {"chat_template_kwargs": {"loud": True}}], ids=["tools", "kwargs"]
)
def test_the_same_prompt_is_the_same_for_every_objective(options):
    prompt, yes, no = chat([("user", "hi")]), chat([("assistant", "y")]), chat([("assistant", "n")])
    row, tokens = {"prompt": prompt, **options}, with_tools()
    objectives = [
        PPO([row] * 2, ones, max_completion_length=4),
        Preference([{**row, "chosen": yes, "rejected": no}] * 2),
        Preference([{**row, "completion": yes, "label": True}] * 2, loss="kto"),
        LM([{**row, "completion": yes}] * 2),
        MetaCorrectness([{**row, "chosen": yes, "rejected": no}] * 2, signal="lm"),
    ]
    template = {"tools": options.get("tools"), **options.get("chat_template_kwargs", {})}
    expected = tokens.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **template)["input_ids"]
    for objective in objectives:
        first = prepared(objective, tokens)[0]
        ids = first.get("prompt_ids") or first.get("input_ids") or first["sides"][0]["ids"]
        assert ids[: len(expected)] == expected, type(objective).__name__


def test_arguments_of_one_tool_call_are_not_added_to_another():
    tokens = tokenizer()
    tokens.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}{% endfor %}"
    )

    def call(name: str, **arguments: Any) -> list[dict[str, Any]]:
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        return [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": calls}]

    first, second = prepared(LM([{"messages": call("move", x=1)}, {"messages": call("say", word="hi")}]), tokens)
    assert "word" not in tokens.decode(first["input_ids"]).replace(" ", "")
    assert '"word"' in tokens.decode(second["input_ids"]).replace(" ", "")


# ---- KTO ----


def unpaired(count: int, **fields) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "completion": "yes" * (i % 3 + 1), "label": i % 2 == 0, **fields} for i in range(count)]


def test_kto_needs_two_rows_to_compare(tmp_path):
    run = trainer(tmp_path, Preference(unpaired(8), loss="kto"), per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=r"loss='kto' with 1 row per micro-batch; .* rows=\{'preference': 2\}"):
        run.train()
    trainer(tmp_path, Preference(unpaired(8), loss="kto"), per_device_train_batch_size=2, max_steps=1).train()


def test_a_held_out_row_alone_in_its_batch_is_compared_with_another(tmp_path):
    objective = Preference(unpaired(4), loss="kto", beta=1.0, eval_dataset=unpaired(3))
    run = trainer(tmp_path, objective, per_device_eval_batch_size=2)
    alone = [rows for _, rows, _ in objective.held_out(run.share("preference"), 2) if len(rows) == 1]
    (row,) = alone[0]
    mismatched = objective.collate([row])["mismatched"]["input_ids"][0].tolist()
    assert mismatched[: len(row["prompt_ids"])] == row["prompt_ids"]
    assert mismatched[len(row["prompt_ids"]) :] == objective.eval_rows[0]["completion_ids"]
    assert math.isfinite(run.evaluate()["eval_loss"])


@pytest.mark.parametrize("label", ["False", -1, 2, 0.5, None, [1]])
def test_labels_are_true_or_false(label):
    with pytest.raises(ValueError, match=r"objective 'preference': row 0 has .*label"):
        prepared(Preference(unpaired(2, label=label), loss="kto"))


# ---- tokenizers ----

CHATTY = [{"messages": chat([("user", "a"), ("assistant", "b")])}]


def test_tokenizers(tmp_path):
    bare = tokenizer()
    bare.eos_token = None
    for objective in (LM(texts()), Preference(pairs())):
        with pytest.raises(ValueError, match=f"objective '{objective.name}': the tokenizer has no end token"):
            prepared(objective, bare)
    assert prepared(LM(CHATTY), bare)  # a chat template puts its own
    for tokens in (None, "SmolLM2"):
        with pytest.raises(ValueError, match=r"processing_class is .*; give the model's tokenizer"):
            trainer(tmp_path, LM(texts()), tokens=tokens or SimpleNamespace())
        with pytest.raises(ValueError, match=r"objective 'lm': the tokenizer is .*; give the model's tokenizer"):
            LM(texts()).setup(tokens, model())
    processor = SimpleNamespace(tokenizer=tokenizer())
    assert trainer(tmp_path, LM(texts()), tokens=processor).objectives["lm"].rows[0]["input_ids"]
    calibrate(model(moved=False), ["abc"] * 30, processor, tokens=64, max_length=8, progress=False)
    bare.pad_token = None
    with pytest.raises(ValueError, match="neither a padding token nor an end token"):
        trainer(tmp_path, LM(CHATTY), tokens=bare)


@pytest.mark.parametrize("objective", [LM(CHATTY), PPO([{"prompt": chat([("user", "a")])}], ones)], ids=["lm", "ppo"])
def test_a_missing_chat_template_names_the_objective(objective):
    tokens = tokenizer()
    tokens.chat_template = None
    with pytest.raises(ValueError, match=f"objective '{objective.name}': .* has no chat template; set tokenizer.chat"):
        prepared(objective, tokens)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tokens": "4k"}, "tokens='4k' must be a whole number"),
        ({"tokens": 0}, "tokens=0 must be"),
        ({"max_length": 0}, "max_length=0 must be"),
        ({"batch_size": 1.5}, "batch_size=1.5 must be"),
        ({"tokenizer": None}, "texts need a tokenizer, and tokenizer is None"),
    ],
)
def test_calibrate_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model(moved=False), ["abc"], **{"tokenizer": tokenizer(), "tokens": 16, "progress": False, **fields})


@pytest.mark.parametrize("max_length", [0, -1, "4k", 2.5, True])
def test_max_length_is_a_whole_number(max_length):
    for objective in (LM(texts(), max_length=max_length), Preference(pairs(), max_length=max_length)):
        with pytest.raises(ValueError, match=f"objective '{objective.name}': max_length=.* must be a whole number"):
            prepared(objective)


def test_topics_that_nobody_reads_are_told_of():
    with pytest.warns(UserWarning, match="objective 'lm': the train rows have a column 'topics', which is not used"):
        prepared(LM([{"text": "abc", "topics": [1.0]}]))


@pytest.mark.parametrize("returned", [1.0, None, "good", {"a": 1}, torch.tensor(1.0), ["x", "y"], [[1.0], [2.0]]])
def test_rewards_are_a_list_of_numbers(tmp_path, returned):
    run = trainer(tmp_path, PPO([{"prompt": "a"}] * 2, lambda completions, **_: returned, max_completion_length=2))
    with pytest.raises(ValueError, match=r"reward function '<lambda>' (returned|gave row 0 the reward).*; return a "):
        run.train()


# ---- rows that mix text and messages, and rows of anything ----


@pytest.mark.parametrize(
    "objective, message",
    [
        (
            Preference([{"prompt": "a", "chosen": chat([("assistant", "b")]), "rejected": "c"}]),
            "row 0: 'chosen' holds messages where 'prompt' of row 0 holds text",
        ),
        (LM([{"messages": "hello"}]), None),
        (LM([{"prompt": "a", "completion": chat([("assistant", "b")])}]), "'completion' holds messages where 'prompt'"),
        (LM([{"text": ["a"]}]), r"row 0: 'text' has the message 'a'; each message needs a role and a content"),
        (PPO([{"prompt": "a"}, {"prompt": chat([("user", "b")])}], ones), "row 1: 'prompt' holds messages where"),
        (PPO([{"prompt": [{"content": "a"}]}], ones), "each message needs a role"),
        (PPO([{"prompt": 3}], ones), r"row 0: 'prompt' is 3; give text, or a list of messages \[\{'role'"),
    ],
)
def test_text_and_messages_are_not_mixed(objective, message):
    if message is None:  # a text under another name
        with pytest.raises(ValueError, match="'messages' is 'hello'; give a list of messages"):
            prepared(objective)
        return
    with pytest.raises(ValueError, match=f"objective '{objective.name}': .*{message}"):
        prepared(objective)


GOOD: dict[str, dict[str, Any]] = {
    "lm": {"text": "abc"},
    "completion": {"prompt": "ab", "completion": "c"},
    "tokens": {"input_ids": IDS, "labels": IDS, "attention_mask": [1] * 6},
    "chat": {"messages": chat([("user", "a"), ("assistant", "b")])},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "kto": {"prompt": "a", "completion": "b", "label": True},
    "ppo": {"prompt": "a", "answer": "b"},
    "meta": {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_explanation": "d", "rejected_explanation": "e"},
    "judged": {"prompt": "a", "completion": "b", "correct": True},
    "consistency": {"statements": ["ab", "cd"], "contradicts": [False, True]},
    "contrastive": {"anchor": "ab", "positive": "cd", "document": "e"},
    "temporal": {"segments": ["ab", "cd", "ef"]},
    "windows": {"text": "abcdefghi"},
}
MAKE: dict[str, Any] = {
    "lm": LM,
    "completion": LM,
    "tokens": LM,
    "chat": LM,
    "preference": Preference,
    "kto": lambda rows: Preference(rows, loss="kto"),
    "ppo": lambda rows: PPO(rows, ones, max_completion_length=2),
    "meta": MetaCorrectness,
    "judged": Calibration,
    "consistency": Consistency,
    "contrastive": Contrastive,
    "temporal": Temporal,
    "windows": lambda rows: Temporal(rows, window=3),
}
WORDS = [None, "", " ", "aaa", b"ab", "\ud800", 0, -1, 1.5, math.nan, 10**30, True]
NESTED = [[], {}, [None], [1, "a"], ["a"], [[]], [{}], {"a": {"b": []}}]
MESSAGES = [[{"role": "user"}], [{"role": 1, "content": "a"}], [{"role": "user", "content": {"a": 1}}]]
BAD = [*WORDS, *NESTED, *MESSAGES]


@pytest.fixture(scope="module")
def everything():
    """A model whose bundle owns every signal."""
    signals = {s for kind in GOOD for s in MAKE[kind]([GOOD[kind]]).signals}
    bundle = {"rank": 8, "sub_bases": ["a"], "signals": dict.fromkeys(sorted(signals), 1.0)}
    return get_peft_model(
        TINY["llama"](), BundleConfig(sub_bases={"a": 16}, bundles={"b_all": bundle}, task_type="CAUSAL_LM")
    )


@pytest.mark.parametrize("kind", GOOD)
def test_malformed_rows_get_a_sentence(kind, everything):
    """100 times one value of one row is something else: the rows are taken, or a sentence names objective and row."""
    draw, tokens, refused = random.Random(kind), tokenizer(), 0
    for _ in range(100):
        rows = [{**GOOD[kind], **({"document": i} if kind == "contrastive" else {})} for i in range(3)]
        if kind in ("consistency", "judged", "kto"):
            rows[0] |= {"consistency": {"contradicts": [False, False]}, "judged": {"correct": False},
                        "kto": {"label": False}}[kind]  # fmt: skip
        row, column = draw.randrange(3), draw.choice(list(GOOD[kind]))
        if draw.random() < 0.1:
            del rows[row][column]
        else:
            rows[row][column] = draw.choice(BAD)
        what = f"row {row}, {column}: {rows[row].get(column, 'missing')!r}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                objective = MAKE[kind](rows)
                objective.setup(tokens, everything)
                if kind != "ppo":
                    objective.collate([objective.rows[i] for i in range(len(objective.rows))])
        except ValueError as error:
            refused += 1
            assert f"objective {objective.name!r}" in str(error), (what, error)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert refused > 20
