"""Completions end at their end token, and rows cut out of a rollout keep their tokens and lose common padding."""

import pytest
import torch
from models import EOS, VOCABULARY
from training import trainer

from peft_bundles.objectives import PPO
from peft_bundles.objectives.rollouts import BY_NEXT_TOKEN, BY_TOKEN, NEXT_STATES, generate, select


LETTER = 10  # the only token beside the end token that is sampled, so that completions differ in length
OPTIONS = {
    "do_sample": True,
    "top_k": 0,
    "max_new_tokens": 6,
    "suppress_tokens": [i for i in range(VOCABULARY) if i not in (EOS, LETTER)],
}
PROMPTS = [{"prompt": "a" * (1 + i % 3)} for i in range(8)]


def length(completions, **_) -> list[float]:
    return [float(len(c)) for c in completions]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    objective = PPO(
        PROMPTS, length, max_completion_length=6, generation={"suppress_tokens": OPTIONS["suppress_tokens"]}
    )
    return trainer(tmp_path_factory.mktemp("run"), objective, per_device_train_batch_size=8)


def test_a_completion_ends_with_its_first_end_token(run):
    objective = run.objectives["ppo"]
    rollout, completions = generate(run.forward, "ppo", objective.rows, objective.tokenizer, OPTIONS, (0, "key"))
    assert len({len(ids) for ids in completions}) > 1  # some are shorter than others
    for row, ids, tokens, attended, mask in zip(
        objective.rows, completions, rollout["input_ids"], rollout["attention_mask"], rollout["completion_mask"]
    ):
        assert ids == [LETTER] * (len(ids) - 1) + [ids[-1]] and (ids[-1] == EOS or len(ids) == 6)
        whole = [*row["prompt_ids"], *ids]
        assert tokens[: len(whole)].tolist() == whole and attended.sum() == len(whole)
        assert mask.nonzero()[:, 0].tolist() == list(range(len(row["prompt_ids"]), len(whole)))


def test_the_key_decides_what_is_sampled(run):
    objective = run.objectives["ppo"]
    first, again, other = (
        generate(run.forward, "ppo", objective.rows, objective.tokenizer, OPTIONS, (0, key))[1]
        for key in ("a", "a", "b")
    )
    assert first == again != other


def test_selected_rows_have_no_column_that_all_leave_empty(run):
    objective = run.objectives["ppo"]
    rollout = objective.rollout(run.forward, objective.rows, (0, "key"), 8, reduce=False)
    lengths = rollout["attention_mask"].sum(1)
    assert lengths.min() < lengths.max()
    for rows in ([int(lengths.argmin())], [int(lengths.argmax())], [3, 1, 4]):
        batch = select(rollout, torch.tensor(rows))
        longest = int(lengths[rows].max())
        assert NEXT_STATES not in batch and torch.equal(batch["metric.reward"], rollout["metric.reward"])
        for name in (*BY_TOKEN, *BY_NEXT_TOKEN):
            width = longest if name in BY_TOKEN else longest - 1
            assert torch.equal(batch[name], rollout[name][rows, :width]), name
            assert batch[name].shape == (len(rows), width), name
