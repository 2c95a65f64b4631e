"""recipes/kl_clamp.py on a tiny model with a tokenizer of characters, without a network."""

import json
import random
from pathlib import Path

import pytest
import yaml
from models import TINY
from training import tokenizer

from recipes import kl_clamp


pytestmark = pytest.mark.studies

RECIPES = Path(__file__).parents[2] / "recipes"
WORDS = ["thou", "art", "a", "villain", "good", "morrow", "sweet", "prince", "of", "denmark"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the recipe with these clamps; its results."""
    folder = tmp_path_factory.mktemp("kl_clamp")
    TINY["llama"](initializer_range=0.2).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "cache" / "plays").mkdir(parents=True)
    for number in range(10):
        rng = random.Random(number)
        lines = [f"{number} {' '.join(rng.choices(WORDS, k=7))} {line}" for line in range(40)]
        (folder / "cache" / "plays" / f"{number}.txt").write_text("\n".join(lines))

    def called(*clamps):
        given = yaml.safe_load((RECIPES / "kl_clamp.yaml").read_text())
        given["smoke"] |= {"clamps": list(clamps), "calibration": {"tokens": 600, "max_length": 48}}
        given["smoke"]["text"] = {"length": 32, "train": 20, "held_out": 4}
        given["smoke"]["training"] |= {"max_steps": 15, "learning_rate": 0.01, "disable_tqdm": True}
        (folder / "small.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
        paths = [f"--config={folder / 'small.yaml'}", f"--model={folder / 'model'}", f"--output={folder / 'output'}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PEFT_BUNDLES_CACHE", str(folder / "cache"))
            results = kl_clamp.main([*paths, "--smoke"])
        assert json.loads((folder / "output" / "results.json").read_text()) == results
        return results["runs"]

    return called


def test_the_clamp_holds_the_bundle_near_the_base_model_and_tau_lets_it_go(run):
    free, held, loose = run(None, {"strength": 300.0, "tau": 0.0}, {"strength": 300.0, "tau": 1000.0})
    for result in (free, held, loose):
        before = result["before"]
        assert before == free["before"]  # every run starts as the base model
        assert all(abs(value) < 1e-6 for name, value in before.items() if name.endswith("_kl"))
    assert free["after"]["plays_loss"] < free["before"]["plays_loss"] - 0.004  # 0.0075 to 0.0205 over six starts
    assert 0 < held["after"]["clamped_kl"] < 0.5 * free["after"]["clamped_kl"]
    assert held["after"]["manual_kl"] < free["after"]["manual_kl"]
    assert loose["after"] == free["after"]  # KL that is below tau costs nothing, to the bit


def test_the_log_says_what_the_clamp_costs(run):
    free, held = run(None, {"strength": 1.0, "tau": 0.0})
    assert not any("lm/clamp" in entry for entry in free["history"])
    assert all(entry["lm/clamp"] == pytest.approx(entry["lm/clamp_kl/b_text"]) for entry in held["history"][:-1])
