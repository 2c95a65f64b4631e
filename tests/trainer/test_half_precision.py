"""A base of half precision, with autocast and without: what is trained and measured is what a float32 base gives."""

import pytest
import torch
from models import TINY, perturb
from peft import get_peft_model
from training import config, pairs, texts, trainer

from peft_bundles import calibrate
from peft_bundles.objectives import LM, PPO, Preference


def objectives():
    length = lambda completions, **_: [float(len(c)) for c in completions]  # noqa: E731
    return [
        LM(texts(), eval_dataset=texts(2)),
        Preference(pairs(), eval_dataset=pairs(2)),
        PPO([{"prompt": "ab"}] * 4, length, max_completion_length=4, eval_dataset=[{"prompt": "ab"}]),
    ]


def logged(folder, name, dtype, calibrated=False, autocast=True, **fields):
    on = get_peft_model(TINY[name]().to(dtype), config(), autocast_adapter_dtype=autocast)
    if calibrated:
        calibrate(on, tokens=256, max_length=32, progress=False)
    perturb(on, scale=0.1)
    run = trainer(folder, objectives(), on, max_steps=2, **fields)
    run.train()
    assert all(p.isfinite().all() for p in on.parameters())
    assert torch.isfinite(torch.tensor(run.evaluate()["eval_loss"]))
    return run.state.log_history[0]


@pytest.mark.parametrize(
    ("name", "dtype", "calibrated", "fields"),
    [
        ("llama", torch.bfloat16, False, {}),
        ("llama", torch.bfloat16, True, {"bf16": True}),
        ("llama", torch.bfloat16, True, {"trunk": "full", "trunk_ranks": {"lm": 2}}),
        ("gpt2", torch.float16, True, {}),
        ("mamba", torch.bfloat16, False, {"autocast": False}),  # a float32 stream and an adapter of bfloat16
    ],
)
def test_a_base_of_half_precision_trains_and_is_measured(tmp_path, name, dtype, calibrated, fields):
    """With a log line at every step: the sizes of what bundles write and of their updates are those in float32."""
    found = logged(tmp_path, name, dtype, calibrated, **fields)
    wanted = logged(tmp_path, name, torch.float32, calibrated)
    for key in ("loss/lm", "loss/preference", "alpha/b_lm", "activation/b_lm", "activation/b_policy"):
        assert found[key] == pytest.approx(wanted[key], rel=0.1), key
