"""One SmolLM2, three kinds of data at once, and what each of them did can be switched off afterwards.

    accelerate launch recipes/rl_separate.py            # a GPU
    python recipes/rl_separate.py --smoke               # 3 minutes on two CPU cores

Text trains with the LM loss, pairs with DPO, prompts with PPO (policy, value, entropy, KL), every loss only the bundles
that own it. Settings are in rl_separate.yaml, what the table at the end means in README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
import yaml
from peft import PeftModel, get_peft_model
from rich import print
from rich.table import Table
from torch import Tensor, nn
from transformers import TrainerCallback

import peft_bundles
from peft_bundles import BundleConfig
from peft_bundles.config import resolve_rank
from peft_bundles.core.basis import bundle_shapes, support_overlap
from peft_bundles.objectives import LM, PPO, Outputs, Preference
from peft_bundles.objectives.data import prompt_ids
from peft_bundles.objectives.preference import sequence_logprobs
from peft_bundles.trainer import BundleTrainer, BundleTrainingConfig
from peft_bundles.trainer.tables import promises
from studies.data import smollm as _data
from studies.measures.text import text_loss
from studies.rl_separate import cards as cards
from studies.rl_separate import tasks as _tasks
from studies.rl_separate.report import COLUMNS


VARIANTS, FORWARDS = ("separate", "shared_adapter", "unrouted"), ("owners", "all")
RL = {"policy", "value", "entropy", "kl"}
CHUNK = 32  # rows of a forward when measuring


# ---- settings ----


def settings(argv: list[str] | None) -> tuple[dict[str, Any], bool]:
    """The YAML with the command line over it, and whether to resume."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--forward", choices=FORWARDS, help="bundles that are on in rows of text")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--model", help="folder or Hub id of another causal LM with a chat template")
    parser.add_argument("--base", help="the Hub's name of that model, for cards")
    parser.add_argument("--preferences", help="folder or Hub dataset with prompt, chosen and rejected")
    parser.add_argument("--output", help="folder for checkpoints, adapter, results and plots")
    parser.add_argument("--cards", action="store_true", default=None, help="measure every bundle and write its folder")
    parser.add_argument("--steps", type=int, help="optimizer steps, those of a resumed run included")
    parser.add_argument("--smoke", action="store_true", help="a few small steps on the CPU")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    flags = vars(parser.parse_args(argv))
    given = yaml.safe_load(flags.pop("config").read_text())
    smoke, resume, steps = given.pop("smoke"), flags.pop("resume"), flags.pop("steps")
    if flags.pop("smoke"):
        given = laid_over(given, smoke)
    given |= {name: value for name, value in flags.items() if value is not None}
    if steps is not None:
        given["training"]["max_steps"] = steps
    for name, choices in (("variant", VARIANTS), ("forward", FORWARDS)):
        if given[name] not in choices:
            raise ValueError(f"{name}: {given[name]!r} is unknown; choose one of {', '.join(choices)}.")
    return given, resume


def laid_over(below: Any, above: Any) -> Any:
    """`above` where it says something, `below` elsewhere."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{name: laid_over(below.get(name), value) for name, value in above.items()}}


def bundle_config(given: dict[str, Any], hidden_size: int) -> BundleConfig:
    """The bundles of a variant; the controls have as many trainable parameters as "separate"."""
    bundles, sub_bases = given["bundles"], given["sub_bases"]
    everything = {signal: 1.0 for spec in bundles.values() for signal in spec["signals"]}
    if given["variant"] == "unrouted":
        bundles = {name: {**spec, "signals": everything} for name, spec in bundles.items()}
    elif given["variant"] == "shared_adapter":
        columns = {name: resolve_rank(rank, hidden_size) for name, rank in sub_bases.items()}
        total = sum(columns.values())
        # A bundle of h hidden units on s columns has 2 h s weights a layer.
        weights = sum(
            resolve_rank(spec["bottleneck"], resolve_rank(spec["rank"], hidden_size))
            * sum(columns[s] for s in spec["sub_bases"])
            for spec in bundles.values()
        )
        one = {"rank": total, "bottleneck": max(round(weights / total), 1), "sub_bases": ["all"], "signals": everything}
        bundles, sub_bases = {"b_shared": one}, {"all": total}
    fields = {"quiet": given["quiet"], "basis_seed": given["seed"], "task_type": "CAUSAL_LM"}
    return BundleConfig(bundles=bundles, sub_bases=sub_bases, **fields)


def switches(given: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Setting -> alphas. What "RL off" turns off is read from the YAML's signals, in every variant that has bundles."""
    if given["variant"] == "shared_adapter":
        return {"all on": {}, "all off": {"b_shared": 0.0}}
    signals = {name: set(spec["signals"]) for name, spec in given["bundles"].items()}
    return {
        "all on": {},
        "RL off": {name: 0.0 for name, own in signals.items() if own <= RL},
        "preference off": {name: 0.0 for name, own in signals.items() if own == {"preference"}},
        "all off": dict.fromkeys(signals, 0.0),
    }


# ---- measuring ----


@torch.no_grad()
def pair_logprobs(model: nn.Module, objective: Preference) -> Tensor:
    """log p of the chosen and the rejected completion of each held-out pair, (N, 2)."""
    found, count = [], len(objective.eval_rows)
    for start in range(0, count, CHUNK):
        batch = objective.collate([objective.eval_rows[i] for i in range(start, min(start + CHUNK, count))])
        batch = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}
        found.append(logprobs(model, batch).view(2, -1).T)
    return torch.cat(found)


def logprobs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """log p of every row's completion, (B,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return sequence_logprobs(Outputs(logits, logits), batch)


def prompt_batch(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """Prompts padded on the left, and the answers."""
    ids = [prompt_ids(row["prompt"], tokenizer) for row in rows]
    prompts = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    return {**prompts, "answer": [row["answer"] for row in rows]}


@torch.no_grad()
def batch_rewards(model: nn.Module, tokenizer: Any, batch: dict[str, Any], length: int) -> list[float]:
    """The reward of every row's greedy completion."""
    prompts = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    options = {"do_sample": False, "max_new_tokens": length, "use_cache": True}
    made = model.generate(**prompts, **options, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(made[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [f(texts, answer=batch["answer"]) for f in _tasks.REWARDS]
    return [sum(w * s for w, s in zip(_tasks.WEIGHTS, row)) for row in zip(*scores)]


@torch.no_grad()
def task_rewards(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]], length: int) -> tuple[float, float]:
    """Mean reward of greedy completions, and the share that is the right number and nothing else."""
    rewards = []
    for start in range(0, len(rows), CHUNK):
        rewards += batch_rewards(model, tokenizer, prompt_batch(rows[start : start + CHUNK], tokenizer), length)
    return sum(rewards) / len(rewards), sum(r > 0.999 for r in rewards) / len(rewards)


def numbers(
    model: nn.Module, trainer: BundleTrainer, held: dict[str, Tensor], sums: list[dict[str, Any]], reference: Tensor
) -> dict[str, float]:
    """A row of the table. A preference that has not moved from the reference counts a half."""
    ppo, preference = trainer.objectives["ppo"], trainer.objectives["preference"]
    reward, exact = task_rewards(model, trainer.processing_class, sums, ppo.max_completion_length)
    logprobs = pair_logprobs(model, preference)
    margin = (logprobs - reference).diff(dim=1).neg()
    return {
        "reward": reward,
        "exact": exact,
        "preference": float((margin.sign() + 1).mean() / 2),
        "chosen_likelier": float((logprobs[:, 0] > logprobs[:, 1]).float().mean()),
        **{f"{kind}_loss": text_loss(model, ids) for kind, ids in held.items()},
    }


def measured_bundles(
    model: PeftModel,
    trainer: BundleTrainer,
    held: dict[str, Tensor],
    sums: list[dict[str, Any]],
    reference: Tensor,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Every bundle in a folder of its own, measured alone and left out, with its alpha sweep drawn."""
    given, tokenizer = trainer.bundle_config, trainer.processing_class
    ppo, preference, names = trainer.objectives["ppo"], trainer.objectives["preference"], list(given.bundles or ())
    pairs = preference.collate([preference.eval_rows[i] for i in range(len(preference.eval_rows))])
    tasks = cards.sweep_tasks(held, pairs, prompt_batch(sums, tokenizer))

    def score(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        length = ppo.max_completion_length
        return cards.scores(model, batch, lambda m, b: batch_rewards(m, tokenizer, b, length), logprobs)

    overlap = support_overlap(bundle_shapes(given, model.config.hidden_size)).tolist()
    found = {}
    for name, shared in zip(names, overlap):
        signals = given.bundles[name].signals
        same = [f"{other} {share:.0%}" for other, share in zip(names, shared) if share and other != name]
        rate = trainer.args.learning_rate * (trainer.args.lr_multipliers or {}).get(name, 1.0)
        peft_bundles.save_bundle(
            model,
            name,
            folder / name,
            {
                "script": "recipes/rl_separate.py",
                "losses": ", ".join(signals),
                "columns of U shared with": ", ".join(same) or "no other bundle of the run",
                "steps": trainer.state.global_step,
                "learning rate": rate,
                "seed": trainer.args.seed,
                "base weights": cards.base_weights(model.get_base_model()),
            },
        )
        found[name] = {}
        for setting, alphas in (("alone", cards.alone(name, names)), ("without", {name: 0.0})):
            with model.alphas(alphas):
                found[name][setting] = numbers(model, trainer, held, sums, reference)
        sweep = cards.sweep(model, name, names, tasks, score)
        sweep.plot(folder / name / "sweep.png")
        found[name]["sweep"] = sweep.to_dict()
    return found


class HeldOut(TrainerCallback):
    """Held-out LM loss under every setting, before training and while it goes on, in the trainer's own history."""

    def __init__(self, alphas: dict[str, dict[str, float]], ids: Tensor) -> None:
        self.alphas, self.ids = alphas, ids
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % int(args.eval_steps) == 0:
            self.measure(state)

    def measure(self, state: Any) -> None:
        entry: dict[str, Any] = {"step": state.global_step}
        model, forward = self.trainer.model, self.trainer.forward
        with forward.eval_mode(), forward.autocast():
            for name, alphas in self.alphas.items():
                with model.alphas(alphas):
                    entry[f"held_out/{name}"] = text_loss(model, self.ids)
        state.log_history.append(entry)


# ---- results ----


def show(table: dict[str, dict[str, float]], title: str) -> None:
    drawn = Table("bundles", *COLUMNS.values(), title=title)
    for name, row in table.items():
        drawn.add_row(name, *(f"{row[column]:.3f}" for column in COLUMNS))
    print(drawn)


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Reward, KL, held-out LM loss and the loss of every signal over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = sorted({key for entry in history for key in entry if key.startswith("loss/")})
    held = list(dict.fromkeys(key for entry in history for key in entry if key.startswith("held_out/")))
    panels = {"reward": ["ppo/reward"], "KL to the base, nats a completion": ["ppo/kl_per_completion"]}
    panels |= {"held-out LM loss": held, "training loss": losses}
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels.items()):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axis.plot(*zip(*points), marker=".", label=key.split("/", 1)[1])
        axis.set(title=title, xlabel="step")
        if keys is losses:
            axis.set_yscale("symlog", linthresh=1e-3)  # from 4 for text to 1e-3 for PPO's
        if len(keys) > 1:
            axis.legend(fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    figure.savefig(path.with_suffix(".svg"))
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    begun = time.perf_counter()
    given, resume = settings(argv)
    output = Path(given["output"])
    training = dict(given["training"])
    if given["model"] is None:
        given["base"] = _data.HUB_MODEL
    if given["variant"] != "separate":
        training["lr_multipliers"] = None
    args = BundleTrainingConfig(
        output_dir=str(output),
        seed=given["seed"],
        forward={"lm": given["forward"]},
        save_strategy="steps",
        bf16=torch.cuda.is_available() and not training.get("use_cpu"),
        report_to="none",
        **training,
    )
    if given["cards"] and args.world_size > 1:
        raise ValueError(f"cards: measured and written by one process, and there are {args.world_size}; run without.")
    last = transformers.trainer_utils.get_last_checkpoint(output) if output.is_dir() else None
    if resume and last is None:
        raise ValueError(f"--resume: {output} has no checkpoint; leave --resume out, or name the run's --output.")
    if last is not None and not resume:
        raise ValueError(f"{output} has a run already ({Path(last).name}); give --resume, or another --output.")

    source = given["model"] or str(_data.model_folder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(args.device)
    transformers.set_seed(given["seed"])
    if given["base"]:
        base.name_or_path = given["base"]
    model: PeftModel = get_peft_model(base, bundle_config(given, base.config.hidden_size))

    texts, held, others = _tasks.text(tokenizer, **given["text"])
    pairs, held_pairs = _tasks.pairs(given["preferences"], **given["pairs"])
    sums, held_sums = _tasks.sums(**given["sums"])
    peft_bundles.calibrate(model, others, tokenizer, progress=False, **given["calibration"])
    objectives = [
        LM(texts),
        Preference(pairs, eval_dataset=held_pairs, max_length=None, **given["preference"]),
        PPO(sums, _tasks.REWARDS, reward_weights=_tasks.WEIGHTS, **given["ppo"]),
    ]
    alphas = switches(given)
    callback = HeldOut({name: a for name, a in alphas.items() if name != "all off"}, held["plays"])
    callback.trainer = trainer = BundleTrainer(model, args, objectives, tokenizer, [callback])
    kept = promises(trainer.bundle_config, {o.name: o.signals for o in objectives}, trainer.forward.table)
    if trainer.is_world_process_zero():
        print(model.bundle_report(), *kept, sep="\n")
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(output / "adapter"))

    table = {}
    with trainer.forward.eval_mode(), trainer.forward.autocast():
        with model.alphas(alphas["all off"]):
            reference = pair_logprobs(model, trainer.objectives["preference"])
        for name, values in alphas.items():
            with model.alphas(values):
                table[name] = numbers(model, trainer, held, held_sums, reference)
        found = {}
        if given["cards"]:
            found = measured_bundles(model, trainer, held, held_sums, reference, output / "bundles")
    results = {
        "command": " ".join(["recipes/rl_separate.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, peft, peft_bundles)},
        "device": torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "processes": args.world_size,
        "settings": given,
        "promises": kept,
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - begun, 1),  # of this command, not of those it resumes
        "table": table,
        "bundles": found,
        "history": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(trainer.state.log_history, output / "plots")
        if found:
            cards.write([results], output / "bundles")
        title = f"{given['variant']}, text rows with {given['forward']}, seed {given['seed']}, {results['steps']} steps"
        show(table, title)
        print(f"{results['seconds']:.0f} s; recorded in {output / 'results.json'}, drawn in {output / 'plots.png'}")
    return results


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers for it
    main()
