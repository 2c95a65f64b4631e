"""recipes/rl_separate.py on a tiny model with a tokenizer of characters, without a network."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from models import TINY
from training import tokenizer
from transformers import AutoModelForCausalLM

import peft_bundles
from peft_bundles.objectives import Preference
from recipes import rl_separate
from studies.measures.text import text_loss
from studies.rl_separate import cards, measure, report, tasks


pytestmark = pytest.mark.studies
RECIPES = Path(__file__).parents[2] / "recipes"
WORDS = "thou art more lovely and temperate rough winds do shake the darling buds of may but not for long"


def verse(number: int) -> str:
    """A play of its own for every number."""
    rng = random.Random(number)
    return "\n".join(" ".join(rng.choices(WORDS.split(), k=9)) for _ in range(60))


@pytest.fixture(scope="module", autouse=True)
def invented_plays():
    """Invented plays; docstrings and manual are the real ones, which are installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "plays", lambda: {f"play {n}": verse(n) for n in range(10)})
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run it: steps, a folder for the output, further flags."""
    folder = tmp_path_factory.mktemp("recipe")
    TINY["llama"]().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    small = yaml.safe_load((RECIPES / "rl_separate.yaml").read_text())
    small["smoke"] |= {"text": {"length": 24, "train": 20, "held_out": 4}, "ppo": {"max_completion_length": 4}}
    small["smoke"] |= {name: {"train": 20, "held_out": 4} for name in ("pairs", "sums")}
    small["smoke"]["calibration"] = {"tokens": 600, "max_length": 64}
    small["smoke"]["training"] |= {"rows": {"lm": 2, "preference": 2, "ppo": 2}, "logging_steps": 1}
    small["smoke"]["training"] |= {"eval_steps": 1, "save_steps": 1, "disable_tqdm": True}
    (folder / "small.yaml").write_text(yaml.safe_dump(small, sort_keys=False))

    def called(steps: int, output: str, *flags: str) -> dict:
        paths = [f"--config={folder / 'small.yaml'}", f"--model={folder / 'model'}", f"--output={folder / output}"]
        rl_separate.main([*paths, "--smoke", f"--steps={steps}", *flags])
        return json.loads((folder / output / "results.json").read_text())

    called.folder = folder
    return called


@pytest.fixture(scope="module")
def whole(run):
    """Results of three steps."""
    return run(3, "whole")


def test_variants_have_the_table_and_equal_parameters(run, whole):
    found = {"separate": whole} | {v: run(1, v, f"--variant={v}") for v in rl_separate.VARIANTS[1:]}
    for variant, results in found.items():
        assert results["settings"]["variant"] == variant
        off = [] if variant == "shared_adapter" else ["RL off", "preference off"]
        assert list(results["table"]) == ["all on", *off, "all off"]
        assert all(set(row) == set(report.COLUMNS) for row in results["table"].values())
        assert results["table"]["all on"]["plays_loss"] != results["table"]["all off"]["plays_loss"]
    assert all((run.folder / "whole" / f"plots.{kind}").stat().st_size for kind in ("png", "svg"))
    assert {"loss/lm", "loss/preference", *(f"loss/ppo/{s}" for s in rl_separate.RL)} <= set().union(*whole["history"])
    counts = [results["trainable_parameters"] for results in found.values()]
    assert max(counts) < 1.05 * min(counts)


def test_the_forward_table_says_what_text_learns_alone(whole):
    assert "lm: its bundles get the weights of a run without preference, ppo." in whole["promises"]


def test_with_all_bundles_off_the_numbers_are_the_base_models(run, whole):
    off = whole["table"]["all off"]
    base = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32).eval()
    given, _ = rl_separate.settings([f"--config={run.folder / 'small.yaml'}", "--smoke"])
    _, held, _ = tasks.text(tokenizer(), **given["text"])
    _, pairs = tasks.pairs(None, **given["pairs"])
    _, sums = tasks.sums(**given["sums"])
    assert {kind: off[f"{kind}_loss"] for kind in held} == {k: text_loss(base, ids) for k, ids in held.items()}
    length = given["ppo"]["max_completion_length"]
    assert (off["reward"], off["exact"]) == measure.task_rewards(base, tokenizer(), sums, length)
    objective = Preference(pairs, eval_dataset=pairs, max_length=None)
    objective.setup(tokenizer(), base)
    logprobs = measure.pair_logprobs(base, objective)
    assert off["chosen_likelier"] == float((logprobs[:, 0] > logprobs[:, 1]).float().mean())
    assert off["preference"] == 0.5  # the base model is the reference


def test_a_resumed_run_is_the_run(run, whole):
    run(2, "parts")
    with pytest.raises(ValueError, match=r"give --resume, or another --output"):
        run(3, "parts")
    resumed = run(3, "parts", "--resume")
    assert resumed["table"] == whole["table"] and resumed["steps"] == 3
    assert _losses(resumed) == _losses(whole)


def _losses(results: dict) -> list[dict]:
    kept = [{k: v for k, v in e.items() if k.startswith(("loss/", "held_out/", "ppo/"))} for e in results["history"]]
    return [entry for entry in kept if entry]


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["ddp_2", "fsdp_2"])
def test_two_processes_run_it_to_the_end(run, processes):
    """As a user starts it, with accelerate's launcher; on CPUs through gloo."""
    small = yaml.safe_load((run.folder / "small.yaml").read_text())
    small["smoke"]["training"] |= {"ddp_backend": "gloo", "save_steps": 2}
    (run.folder / f"{processes}.yaml").write_text(yaml.safe_dump(small, sort_keys=False))
    plays = run.folder / "cache" / "plays"
    plays.mkdir(parents=True, exist_ok=True)
    for number in range(10):
        (plays / f"{number}.txt").write_text(verse(number))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]
    command += [f"--config_file={RECIPES / 'accelerate' / f'{processes}.yaml'}", str(RECIPES / "rl_separate.py")]
    command += [f"--config={run.folder / f'{processes}.yaml'}", f"--model={run.folder / 'model'}", "--smoke"]
    command += [f"--output={run.folder / processes}", "--steps=2"]
    env = {**os.environ, "PEFT_BUNDLES_CACHE": str(run.folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((run.folder / processes / "results.json").read_text())
    assert results["processes"] == 2 and results["steps"] == 2
    assert list(results["table"]) == ["all on", "RL off", "preference off", "all off"]
    assert {p.name for p in (run.folder / processes / "checkpoint-2").glob("objectives-*")} == {
        f"objectives-{rank}.safetensors" for rank in (0, 1)
    }


def test_bundles_are_folders_to_push_with_cards_over_seeds(run):
    results = [run(1, f"cards_{seed}", "--cards", f"--seed={seed}", "--base=me/tiny") for seed in (0, 1)]
    folder = run.folder / "cards_0" / "bundles"
    assert sorted(path.name for path in folder.iterdir()) == sorted(results[0]["settings"]["bundles"])
    assert "± " not in (folder / "b_rl_policy" / "README.md").read_text()
    cards.main([str(run.folder / f"cards_{seed}") for seed in (0, 1)])
    base = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    _, held, _ = tasks.text(tokenizer(), **results[0]["settings"]["text"])
    for name, measured in results[0]["bundles"].items():
        card = ModelCard.load(folder / name / "README.md")
        assert card.data.base_model == "me/tiny" and card.data.eval_results
        for wanted in (
            f"| `{name}` |",
            "± ",
            "| 0, 1 |",
            "![Scores at different values of alpha](sweep.png)",
            "Do not use it",
            "Data: ",
        ):
            assert wanted in card.text, wanted
        assert (folder / name / "sweep.png").read_bytes()[:4] == b"\x89PNG"
        model = peft_bundles.compose(base, [folder / name])  # what the card says it is, loaded as the card says
        assert text_loss(model, held["plays"]) == pytest.approx(measured["alone"]["plays_loss"], abs=1e-5)
        base = model.unload()
        means = {task: entry["mean"] for task, entry in measured["sweep"]["tasks"].items()}
        off, on = (measured["sweep"]["alphas"].index(alpha) for alpha in (0.0, 1.0))
        assert means["plays: minus loss, nats"][on] == pytest.approx(-measured["alone"]["plays_loss"], abs=1e-4)
        assert means["sums: reward"][off] == pytest.approx(results[0]["table"]["all off"]["reward"], abs=1e-4)
    for wrong, message in (
        ([results[0], results[0]], r"seeds \[0, 0\]: one run is there twice"),
        ([results[0], {**results[1], "bundles": {}}], "seed 1 measured no bundles; run it with --cards"),
        (
            [results[0], {**results[1], "settings": {**results[1]["settings"], "forward": "all"}}],
            "forward='all' of one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cards.write(wrong, folder)


def test_rewards():
    texts = ["19", "12 + 7 = 19.", "", "20", "about -5"]
    assert tasks.bare(texts) == [1, 0, 0, 1, 0]
    near = tasks.near(texts, answer=[19] * 5)
    assert near[:3] == [1, 1, 0] and 0.4 < near[3] < 0.5 and near[4] == 0
    assert tasks.near([[{"role": "assistant", "content": "19"}]], answer=[19]) == [1]


def test_made_pairs_differ_in_order_alone():
    train, held = tasks.pairs(None, train=50, held_out=20)
    prompts = [row["prompt"][1]["content"] for row in train + held]
    assert len({frozenset(p.split(": ")[1].split(", ")) for p in prompts}) == len(prompts) == 70
    for row in train + held:
        chosen, rejected = (row[name][0]["content"].split(", ") for name in ("chosen", "rejected"))
        assert chosen == sorted(rejected) != rejected


def test_tables_are_means_over_runs(tmp_path):
    def write(variant, forward, rate, seed, exact):
        settings = {"variant": variant, "forward": forward, "training": {"learning_rate": rate}}
        table = {name: dict.fromkeys(report.COLUMNS, exact) for name in ("all on", "all off")}
        (tmp_path / f"{variant}_{rate}_{seed}.json").write_text(json.dumps({"settings": settings, "table": table}))

    for seed, exact in enumerate((0.6, 0.8)):
        write("separate", "owners", 5e-4, seed, exact)
    write("unrouted", "all", 1e-3, 0, 0.5)
    main, rates = report.tables(report.read(tmp_path))
    assert main.heading.endswith("(2 runs)")
    assert main.rows == [[name, *["0.700 ± 0.141"] * 6] for name in ("all on", "all off")]
    assert [row[:4] for row in rates.rows] == [
        ["separate, owners", "0.0005", "2", "0.700 ± 0.141"],
        ["unrouted, all", "0.001", "1", "0.500"],
    ]
