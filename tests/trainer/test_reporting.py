"""What a run reports outside of its own log: TensorBoard, trackio (without a network), the console."""

import ast
import importlib
import logging
import re
import sqlite3
import sys
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import arguments, losses_of, model, pairs, texts, tokenizer, trainer
from trl import RichProgressCallback

import peft_bundles.registration
from peft_bundles.objectives import LM, PPO, Preference
from peft_bundles.trainer import BundleTrainer


def run_of(folder: Path, callbacks=None, **fields) -> BundleTrainer:
    objectives = [LM(texts(), eval_dataset=texts(3)), Preference(pairs())]
    args = arguments(folder, eval_strategy="steps", eval_steps=3, **fields)
    run = BundleTrainer(model(), args, objectives, tokenizer(), callbacks)
    run.train()
    return run


def test_tensorboard_has_every_loss_and_what_bundles_did(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    run = run_of(tmp_path, report_to="tensorboard")
    found = EventAccumulator(str(tmp_path / "runs")).Reload()
    for name in ("loss/lm", "loss/preference", "grad_norm/b_lm", "update_norm/b_preference", "alpha/b_kl"):
        logged = [entry[name] for entry in run.state.log_history if name in entry]
        assert [e.value for e in found.Scalars(f"train/{name}")] == pytest.approx(logged) and len(logged) == 3
    assert [e.step for e in found.Scalars("eval/loss/lm")] == [3]


def test_trackio_keeps_them_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    importlib.import_module("trackio")

    for name, module in list(sys.modules.items()):  # each took the folder when it was imported
        if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    run = run_of(tmp_path, report_to="trackio", project="bundles", trackio_static_space_id=False)
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = "".join(str(row) for row in database.execute("select * from metrics"))
    for name in ("train/loss/preference", "train/grad_norm/b_lm"):
        assert name in rows
    assert len(losses_of(run)) == 3


@pytest.mark.parametrize("bar", [True, False])
def test_the_console_shows_a_bar_losses_and_the_reward_and_nothing_else(tmp_path, capfd, bar):
    """What is measured of bundles and objectives goes to the tracker."""
    length = lambda completions, **_: [float(len(c)) for c in completions]  # noqa: E731
    ppo = PPO([{"prompt": "ab"}] * 4, length, max_completion_length=4)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, disable_tqdm=not bar)
    run = BundleTrainer(model(), args, [LM(texts(), eval_dataset=texts(3)), ppo], tokenizer())
    run.train()
    out, err = capfd.readouterr()
    assert ("it/s]" in err or "s/it]" in err) == bar and "examples/s" not in err
    assert {"grad_norm/b_lm", "ppo/clip_fraction"} <= run.state.log_history[0].keys()
    assert "lm: b_lm learns with all other bundles on." in out and out.count("learn") == 2
    lines = [ast.literal_eval(line) for line in re.findall(r"^.*?(\{.*\})", out, re.MULTILINE)]
    losses = {"loss", "loss/lm", "loss/ppo/policy", "loss/ppo/value", "loss/ppo/kl"}
    assert [set(line) for line in lines] == [
        *([losses | {"ppo/reward", "epoch"}] * 3),
        {"eval_loss", "eval_loss/lm", "epoch"},
        {"train_runtime", "train_loss", "epoch"},
    ]


def test_wrapping_a_model_warns_of_nothing():
    """PEFT asks transformers for a deprecated name; importing the package silences that one message."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(peft_bundles.registration)
        model()
    with warnings.catch_warnings(), pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        warnings.simplefilter("always")
        model()


def test_promises_are_logged_once_and_not_shown_by_default(tmp_path, capfd, caplog):
    fields = {"forward": {"lm": "owners"}}
    trainer(tmp_path, [LM(texts()), Preference(pairs())], **fields)
    assert capfd.readouterr().out == "" and not caplog.messages
    with caplog.at_level(logging.INFO, "peft_bundles"):
        run = trainer(tmp_path, [LM(texts()), Preference(pairs())], **fields)
    assert caplog.messages == run.promises()
    assert run.promises()[0] == "lm: its bundles get the weights of a run without preference."


def test_rich_progress_of_trl(tmp_path, capsys):
    run = run_of(tmp_path, [RichProgressCallback()])
    assert "100%" in capsys.readouterr().out and run.state.global_step == 3
