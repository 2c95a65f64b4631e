"""Completions end at their end token, and rows cut out of a rollout keep their tokens and lose common padding."""

import pytest
import torch
from models import EOS, PAD, VOCABULARY, attached, batch
from training import model, tokenizer, trainer
from transformers import GenerationConfig, WatermarkingConfig

from peft_bundles.objectives import PPO
from peft_bundles.objectives.rollouts import BY_NEXT_TOKEN, BY_TOKEN, NEXT_STATES, generate, select
from peft_bundles.objectives.tokens import Sampling, token_entropy, token_logprobs


LETTER = 10  # the only token beside the end token that is sampled, so that completions differ in length
OPTIONS = {
    "do_sample": True,
    "top_k": 0,
    "max_new_tokens": 6,
    "suppress_tokens": [i for i in range(VOCABULARY) if i not in (EOS, LETTER)],
}
PROMPTS = [{"prompt": "a" * (1 + i % 3)} for i in range(8)]


class Letter(Sampling):
    def options(self):
        return {**super().options(), "suppress_tokens": OPTIONS["suppress_tokens"]}


def length(completions, **_) -> list[float]:
    return [float(len(c)) for c in completions]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    objective = PPO(PROMPTS, length, max_completion_length=6)
    objective.sampling = Letter()
    return trainer(tmp_path_factory.mktemp("run"), objective, per_device_train_batch_size=8)


def test_a_completion_ends_with_its_first_end_token(run):
    objective = run.objectives["ppo"]
    rollout, completions = generate(run.forward, "ppo", objective.rows, PAD, {EOS}, OPTIONS, (0, "key"))
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
        generate(run.forward, "ppo", objective.rows, PAD, {EOS}, OPTIONS, (0, key))[1] for key in ("a", "a", "b")
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


# ---- what is sampled is what is scored ----

# A value that changes what `model.generate` samples, or for how long, for every field of GenerationConfig that can.
BITING = {
    "bad_words_ids": [[i] for i in range(10, 60)],
    "begin_suppress_tokens": list(range(10, 60)),
    "do_sample": False,
    "dola_layers": "low",
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.05,
    "exponential_decay_length_penalty": [1, 3.0],
    "force_words_ids": [[7]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "guidance_scale": 2.0,
    "max_length": 4,
    "max_new_tokens": 2,
    "max_time": 1e-9,
    "min_length": 40,
    "min_new_tokens": 6,
    "min_p": 0.3,
    "no_repeat_ngram_size": 1,
    "num_beams": 2,
    "num_beam_groups": 2,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 2,
    "repetition_penalty": 1.5,
    "sequence_bias": [[[7], 50.0]],
    "stop_strings": ["a", "b", "c"],
    "suppress_tokens": list(range(10, 60)),
    "temperature": 0.3,
    "token_healing": True,
    "top_h": 0.3,
    "top_k": 3,
    "top_p": 0.3,
    "typical_p": 0.3,
    "watermarking_config": WatermarkingConfig(bias=5.0),
}
# Fields that say how to compute, what to return, or belong to beams, assistants, encoders and streams of requests.
OTHER = {
    "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
    "assistant_lookbehind", "bos_token_id", "cache_config", "cache_implementation", "compile_config", "constraints",
    "continuous_batching_config", "decoder_start_token_id", "disable_compile", "diversity_penalty", "early_stopping",
    "eos_token_id", "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_matching_ngram_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "pad_token_id", "prefill_chunk_size", "remove_invalid_values",
    "renormalize_logits", "return_dict_in_generate", "speculation_type", "target_lookbehind", "transformers_version",
    "use_cache", "use_mtp",
}  # fmt: skip


def sampled(folder, settings: dict, **fields) -> dict[str, torch.Tensor]:
    """A rollout of a policy that is sure of some tokens, whose generation_config has these settings."""
    policy = model()
    policy.get_output_embeddings().weight.data.mul_(20)
    for field, value in settings.items():
        setattr(policy.get_base_model().generation_config, field, value)
    objective = PPO([{"prompt": "ab ab ab"}] * 64, length, max_completion_length=8, **fields)
    run = trainer(folder, objective, on=policy, per_device_train_batch_size=64)
    rollout = objective.rollout(run.forward, objective.rows, (0, "key"), 64, reduce=False)
    logits = run.forward.current("ppo", {k: rollout[k] for k in ("input_ids", "attention_mask")}).logits
    assert (
        policy.get_base_model().generation_config.to_dict().items()
        >= {k: v for k, v in settings.items() if k != "watermarking_config"}.items()
    )
    return {**rollout, "entropy": token_entropy(logits, objective.sampling)}


def surprise_and_entropy(rollout: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Means over the tokens of the completions: they agree if the policy that is scored is the one that samples."""
    completion = rollout["completion_mask"][:, 1:].bool()
    return float(-rollout["old_logprobs"][completion].mean()), float(rollout["entropy"][completion].mean())


def test_every_field_of_generation_config_is_known():
    assert set(GenerationConfig().to_dict()) <= BITING.keys() | OTHER  # a new field belongs into one of the two


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return sampled(tmp_path_factory.mktemp("plain"), {})


@pytest.mark.parametrize("field", BITING)
def test_settings_of_the_model_do_not_change_what_is_sampled(tmp_path, plain, field):
    rollout = sampled(tmp_path, {field: BITING[field]})
    surprise, entropy = surprise_and_entropy(rollout)
    assert surprise == pytest.approx(entropy, abs=0.15)
    for name in ("input_ids", "completion_mask", "old_logprobs"):
        assert torch.equal(rollout[name], plain[name])


@pytest.mark.parametrize("field", ["repetition_penalty", "min_p", "no_repeat_ngram_size", "top_k"])
def test_such_a_setting_would_be_seen(field):
    """The control: with the settings left on the model the samples are others."""
    policy, ids = attached(), batch(8, 6)
    policy.get_output_embeddings().weight.data.mul_(20)

    def drawn() -> torch.Tensor:
        torch.manual_seed(0)
        return policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=8)

    before = drawn()
    setattr(policy.get_base_model().generation_config, field, BITING[field])
    assert not torch.equal(before, drawn())


CHOSEN = [
    {"temperature": 0.5},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("fields", CHOSEN, ids=lambda fields: "-".join(fields))
def test_what_the_objective_names_is_sampled_and_scored(tmp_path, plain, fields):
    rollout = sampled(tmp_path, {"repetition_penalty": 1.3}, **fields)
    surprise, entropy = surprise_and_entropy(rollout)
    assert surprise == pytest.approx(entropy, abs=0.15)
    assert abs(surprise - surprise_and_entropy(plain)[0]) > 0.05


@pytest.mark.parametrize("fields", CHOSEN, ids=lambda fields: "-".join(fields))
def test_log_probabilities_are_those_of_generate(fields):
    policy, ids, sampling = attached(), batch(4, 6), Sampling(**fields)
    policy.get_output_embeddings().weight.data.mul_(20)
    out = policy.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, eos_token_id=VOCABULARY,
        output_scores=True, return_dict_in_generate=True, **sampling.options(),
    )  # fmt: skip
    expected = policy.get_base_model().compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    with torch.no_grad():
        logits = policy(input_ids=out.sequences).logits
    torch.testing.assert_close(token_logprobs(logits, out.sequences, sampling)[:, 5:], expected, atol=1e-4, rtol=1e-4)


def test_a_sampled_token_that_left_the_set_keeps_a_probability():
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]] * 2], requires_grad=True)
    found = token_logprobs(logits, torch.tensor([[0, 3]]), Sampling(top_k=2))
    torch.testing.assert_close(found, logits[:1, :1, [0, 1, 3]].log_softmax(-1)[..., -1])
    found.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 0, 2] == 0


@pytest.mark.parametrize(
    "option, message",
    [
        ({"max_new_tokens": 200}, "write max_completion_length=200"),
        ({"temperature": 0.3}, r"write temperature=0\.3 instead"),
        ({"top_k": 5}, "write top_k=5 instead"),
        ({"do_sample": False}, "could sample from another distribution"),
        ({"num_beams": 2}, "could sample from another distribution"),
        ({"repetition_penalty": 1.0}, "could sample from another distribution"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id or a list of token ids"),
        ({"eos_token_id": []}, "eos_token_id=.. must be a token id or a list"),
    ],
)
def test_generation_takes_nothing_that_changes_the_distribution(option, message):
    with pytest.raises(ValueError, match=f"objective 'ppo': .*{message}"):
        PPO(PROMPTS, length, generation=option)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"top_k": -1}, "top_k=-1 must be a whole number >= 0"),
        ({"top_k": 0.5}, r"top_k=0\.5 must be a whole number"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0"),
        ({"min_p": 1.0}, r"min_p=1\.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a number > 0"),
    ],
)
def test_a_distribution_that_does_not_exist_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PPO(PROMPTS, length, **fields)


# ---- several end tokens ----

MANY = list(range(10, 60))


@pytest.mark.parametrize("where", ["model", "generation", "tokenizer"])
def test_a_completion_ends_at_any_end_token(tmp_path, where):
    policy, tok = model(), tokenizer()
    policy.get_base_model().generation_config.eos_token_id = [EOS, *MANY] if where == "model" else EOS
    ends = {"model": {EOS, *MANY}, "generation": set(MANY), "tokenizer": {EOS, 9}}[where]
    if where == "tokenizer":
        tok.eos_token = tok.convert_ids_to_tokens(9)
    options = {"eos_token_id": MANY} if where == "generation" else None
    objective = PPO(
        [{"prompt": "ab"}] * 16, length, max_completion_length=16, generation=options, missing_eos_penalty=99.0
    )
    run = trainer(tmp_path, objective, on=policy, tokens=tok, per_device_train_batch_size=16)
    rollout = objective.rollout(run.forward, objective.rows, (0, "key"), 16, reduce=False)
    completions = [ids[mask.bool()].tolist() for ids, mask in zip(rollout["input_ids"], rollout["completion_mask"])]
    ended = [ids[-1] in ends for ids in completions]
    assert all(e or len(ids) == 16 for e, ids in zip(ended, completions)) and any(ended)
    assert all(not ends & set(ids[:-1]) for ids in completions)
    assert float(rollout["metric.ended"]) == pytest.approx(sum(ended) / 16)
    lengths = [len(text) for text in tok.batch_decode(completions, skip_special_tokens=True)]
    assert float(rollout["metric.reward"]) == pytest.approx((sum(lengths) - 99 * (16 - sum(ended))) / 16)
    if where != "tokenizer":
        assert max(map(len, completions)) < 16  # half of the vocabulary ends it


def test_the_models_generate_ends_at_the_same_tokens():
    policy, ids = attached(), batch(8, 4)
    policy.get_base_model().generation_config.eos_token_id = [EOS, *MANY]
    out = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=True)
    assert out.shape[1] < 4 + 16
