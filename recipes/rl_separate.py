"""One SmolLM2 learns from three kinds of data at once; what each of them did can be switched off afterwards.

    accelerate launch recipes/rl_separate.py            # a GPU
    python recipes/rl_separate.py --smoke               # 3 minutes on two CPU cores

Text trains with the LM loss, pairs with DPO, prompts with PPO (policy, value, entropy, KL). Every loss updates only the
bundles that own it. Settings are in rl_separate.yaml; README.md explains the table at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from peft import PeftModel, get_peft_model
from rich import print
from rich.table import Table

import peft_bundles
from peft_bundles import BundleConfig
from peft_bundles.objectives import LM, PPO, Preference
from peft_bundles.specs import resolve_rank
from peft_bundles.trainer import BundleTrainer, BundleTrainingConfig
from peft_bundles.trainer.tables import promises
from studies import records
from studies.data.smollm import HUB_MODEL, model_folder
from studies.rl_separate import cards, tasks
from studies.rl_separate.measure import HeldOut, measured_bundles, numbers, pair_logprobs
from studies.rl_separate.report import COLUMNS, plot


VARIANTS, FORWARDS = ("separate", "shared_adapter", "unrouted"), ("owners", "all")
RL = {"policy", "value", "entropy", "kl"}


# ---- settings ----


def settings(argv: list[str] | None) -> tuple[dict[str, Any], bool]:
    """The YAML with the command line over it, and whether to resume."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--forward", choices=FORWARDS, help="bundles that are on in rows of text")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--model", help="folder or Hub id of another causal LM with a chat template")
    parser.add_argument("--base", help="Hub id of that model, for model cards")
    parser.add_argument("--preferences", help="folder or Hub dataset with prompt, chosen and rejected")
    parser.add_argument("--output", help="folder for checkpoints, adapter, results and plots")
    parser.add_argument("--cards", action="store_true", default=None, help="measure every bundle and write its folder")
    parser.add_argument("--steps", type=int, help="optimizer steps, including those before a resume")
    parser.add_argument("--smoke", action="store_true", help="a few small steps on the CPU")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    flags = vars(parser.parse_args(argv))
    config = yaml.safe_load(flags.pop("config").read_text())
    smoke, resume, steps = config.pop("smoke"), flags.pop("resume"), flags.pop("steps")
    if flags.pop("smoke"):
        config = laid_over(config, smoke)
    config |= {name: value for name, value in flags.items() if value is not None}
    if steps is not None:
        config["training"]["max_steps"] = steps
    for name, choices in (("variant", VARIANTS), ("forward", FORWARDS)):
        if config[name] not in choices:
            raise ValueError(f"{name}: {config[name]!r} is unknown; choose one of {', '.join(choices)}.")
    return config, resume


def laid_over(below: Any, above: Any) -> Any:
    """Nested dicts merged: values of `above` win over those of `below`."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{name: laid_over(below.get(name), value) for name, value in above.items()}}


def bundle_config(config: dict[str, Any], hidden_size: int) -> BundleConfig:
    """The bundles of a variant; the controls have as many trainable parameters as "separate"."""
    bundles, sub_bases = config["bundles"], config["sub_bases"]
    everything = {signal: 1.0 for spec in bundles.values() for signal in spec["signals"]}
    if config["variant"] == "unrouted":
        bundles = {name: {**spec, "signals": everything} for name, spec in bundles.items()}
    elif config["variant"] == "shared_adapter":
        columns = {name: resolve_rank(rank, hidden_size) for name, rank in sub_bases.items()}
        total = sum(columns.values())
        # A bundle of h hidden units on s columns has 2 h s weights per layer.
        weights = sum(
            resolve_rank(spec["bottleneck"], resolve_rank(spec["rank"], hidden_size))
            * sum(columns[s] for s in spec["sub_bases"])
            for spec in bundles.values()
        )
        one = {"rank": total, "bottleneck": max(round(weights / total), 1), "sub_bases": ["all"], "signals": everything}
        bundles, sub_bases = {"b_shared": one}, {"all": total}
    fields = {"quiet": config["quiet"], "basis_seed": config["seed"], "task_type": "CAUSAL_LM"}
    return BundleConfig(bundles=bundles, sub_bases=sub_bases, **fields)


def switches(config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Setting -> alphas. What "RL off" turns off is read from the YAML's signals, in every variant that has bundles."""
    if config["variant"] == "shared_adapter":
        return {"all on": {}, "all off": {"b_shared": 0.0}}
    signals = {name: set(spec["signals"]) for name, spec in config["bundles"].items()}
    return {
        "all on": {},
        "RL off": {name: 0.0 for name, own in signals.items() if own <= RL},
        "preference off": {name: 0.0 for name, own in signals.items() if own == {"preference"}},
        "all off": dict.fromkeys(signals, 0.0),
    }


# ---- results ----


def show(table: dict[str, dict[str, float]], title: str) -> None:
    drawn = Table("bundles", *COLUMNS.values(), title=title)
    for name, row in table.items():
        drawn.add_row(name, *(f"{row[column]:.3f}" for column in COLUMNS))
    print(drawn)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    begun = time.perf_counter()
    config, resume = settings(argv)
    output = Path(config["output"])
    training = dict(config["training"])
    if config["model"] is None:
        config["base"] = HUB_MODEL
    if config["variant"] != "separate":
        training["lr_multipliers"] = None
    args = BundleTrainingConfig(
        output_dir=str(output),
        seed=config["seed"],
        forward={"lm": config["forward"]},
        save_strategy="steps",
        bf16=torch.cuda.is_available() and not training.get("use_cpu"),
        report_to="none",
        **training,
    )
    if config["cards"] and args.world_size > 1:
        raise ValueError(f"cards: need one process, but {args.world_size} run; start without accelerate launch.")
    last = transformers.trainer_utils.get_last_checkpoint(output) if output.is_dir() else None
    if resume and last is None:
        raise ValueError(f"--resume: {output} has no checkpoint; leave --resume out, or name the run's --output.")
    if last is not None and not resume:
        raise ValueError(f"{output} already has a run ({Path(last).name}); give --resume, or another --output.")

    source = config["model"] or str(model_folder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(args.device)
    transformers.set_seed(config["seed"])
    if config["base"]:
        base.name_or_path = config["base"]
    model: PeftModel = get_peft_model(base, bundle_config(config, base.config.hidden_size))

    texts, held, others = tasks.text(tokenizer, **config["text"])
    pairs, held_pairs = tasks.pairs(config["preferences"], **config["pairs"])
    sums, held_sums = tasks.sums(**config["sums"])
    peft_bundles.calibrate(model, others, tokenizer, progress=False, **config["calibration"])
    objectives = [
        LM(texts),
        Preference(pairs, eval_dataset=held_pairs, max_length=None, **config["preference"]),
        PPO(sums, tasks.REWARDS, reward_weights=tasks.WEIGHTS, **config["ppo"]),
    ]
    alphas = switches(config)
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
        bundles = {}
        if config["cards"]:
            bundles = measured_bundles(model, trainer, held, held_sums, reference, output / "bundles")
    results = {
        **records.made_by(
            " ".join(["recipes/rl_separate.py", *(sys.argv[1:] if argv is None else argv)]), "trl", device=args.device
        ),
        "processes": args.world_size,
        "settings": config,
        "promises": kept,
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - begun, 1),  # of this command, not of those it resumes
        "table": table,
        "bundles": bundles,
        "history": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        records.write(output / "results.json", results)
        plot(trainer.state.log_history, output / "plots")
        if bundles:
            cards.write([results], output / "bundles")
        what = f"{config['variant']}, text rows with {config['forward']}"
        title = f"{what}, seed {config['seed']}, {results['steps']} steps"
        show(table, title)
        print(f"{results['seconds']:.0f} s; recorded in {output / 'results.json'}, drawn in {output / 'plots.png'}")
    return results


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers for it
    main()
