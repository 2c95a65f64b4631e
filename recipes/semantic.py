"""Six topic bundles on real text: what each is worth to its own topic, and to the others.

    python recipes/semantic.py --prepare topics.json.gz                      # once, with a network
    python recipes/semantic.py --data topics.json.gz --model FOLDER          # a GPU; --resume goes on
    python recipes/semantic.py --smoke                                       # two CPU cores

Every cell of the sweep in semantic.yaml trains the bundles anew and leaves one line in cells.jsonl: the held-out loss
of every topic with each bundle alone, with all and with none. What the tables mean is in README.md.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import random
import sys
import time
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import peft
import torch
import transformers
import yaml
from peft import PeftModel, get_peft_model
from rich import print
from rich.table import Table
from torch import Tensor

import peft_bundles
from peft_bundles import BundleConfig
from peft_bundles.config import resolve_rank
from peft_bundles.core.walking import bundle_parameters
from peft_bundles.routers.topics import TopicRouting
from peft_bundles.taxonomy import TOPICS
from studies.data import load
from studies.data import smollm as _data
from studies.data.encoder import encoder_folder
from studies.measures.text import text_loss
from studies.semantic.report import draw, spread, sweeps


OTHERS = ("plays", "wiki", "news")  # texts of no topic
FIXED = (  # what makes two cells the same
    *("seed", "topics", "overlap", "size", "rank", "signal_rank", "mask", "gate_forward", "tau"),
    *("steps", "rows", "length", "learning_rate", "warmup", "max_grad_norm", "calibration", "test_rows", "model"),
)


# ---- settings ----


def settings(argv: list[str] | None) -> dict[str, Any]:
    """The YAML with the command line over it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--model", help="folder or Hub id of another causal LM")
    parser.add_argument("--data", help="a file that --prepare has written")
    parser.add_argument("--prepare", help="write the texts to this file and stop", metavar="FILE")
    parser.add_argument("--output", help="folder for cells.jsonl and the plots")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the sweep's")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the sweep's settings, from 0")
    parser.add_argument("--smoke", action="store_true", help="two small cells on the CPU")
    parser.add_argument("--resume", action="store_true", help="leave out the cells that cells.jsonl has")
    flags = vars(parser.parse_args(argv))
    given = yaml.safe_load(flags.pop("config").read_text())
    smoke = given.pop("smoke")
    if flags["smoke"]:
        given |= smoke
    sweep = given["sweep"]
    if (seeds := flags.pop("seeds")) is not None:
        sweep["seeds"] = seeds
    if (only := flags.pop("only")) is not None:
        if not all(0 <= n < len(sweep["cells"]) for n in only):
            raise ValueError(f"--only {only}: the sweep has {len(sweep['cells'])} settings, from 0.")
        sweep["cells"] = [sweep["cells"][n] for n in only]
    given |= {"prepare": None, **{name: value for name, value in flags.items() if value is not None}}
    for cell in sweep["cells"]:
        if unknown := sorted(set(cell) - set(FIXED[:-1])):  # the model is loaded once
            raise ValueError(f"sweep cell {cell} names {unknown}; a cell replaces some of {', '.join(FIXED[:-1])}.")
    return given


# ---- texts ----


def read_texts(wanted: dict[str, int]) -> dict[str, Any]:
    """{"train", "test"}: topic -> texts, "other": of no topic; "tau": source -> topic -> vectors of the training texts.

    The classifiers' vectors need scikit-learn and a sentence encoder; with fit: 0 there are only those of the lexicon.
    """
    from peft_bundles.routers.topic_sources import fit_topics, sentence_encoder

    found: dict[str, Any] = {"train": {}, "test": {}, "tau": {}}
    for topic in TOPICS:
        for split in ("train", "test"):
            found[split][topic] = [row["text"] for row in load(topic, split)][: wanted[split]]
    for split, count in (("train", wanted["other"]), ("test", wanted["test"])):
        parts = [[row["text"] for row in load(name, split)][: -(-count // len(OTHERS))] for name in OTHERS]
        found[split]["other"] = [text for part in parts for text in part]
    fit = [(text[:800], topic) for topic in TOPICS for text in found["train"][topic][: wanted["fit"]]]
    fit += [(text[:800], None) for text in found["train"]["other"][: wanted["fit"]]] if wanted["fit"] else []
    for source in ("lexicon", "embedding", "clusters") if fit else ("lexicon",):
        print(f"topic vectors of the training texts: {source}")
        embed = sentence_encoder(encoder_folder()) if source == "embedding" else None
        classify = fit_topics(source, TOPICS, [text for text, _ in fit], [topic for _, topic in fit], embed=embed)
        found["tau"][source] = {
            topic: [[round(x, 4) for x in row] for row in classify([t[:800] for t in found["train"][topic]]).tolist()]
            for topic in TOPICS
        }
    return found


def write_texts(texts: dict[str, Any], path: Path) -> None:
    """Through a temporary file: a failed run leaves the earlier one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(gzip.compress(json.dumps(texts, ensure_ascii=False).encode(), mtime=0))
    part.replace(path)


def encoded(tokenizer: Any, texts: list[str], length: int) -> tuple[Tensor, list[int]]:
    """Those texts that fill a row, (N, length), and their numbers."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts]
    kept = [n for n, row in enumerate(rows) if len(row) == length]
    return torch.tensor([rows[n] for n in kept]), kept


def rows_of(given: dict[str, Any], texts: dict[str, Any], tokenizer: Any) -> tuple[Any, dict[str, Tensor]]:
    """Training rows by topic, (ids, tau) each, and test rows by topic and "other".

    Raises:
        ValueError: a topic with fewer rows of that length than are tested; topic vectors that the file has not.
    """
    if given["tau"] != "tags" and given["tau"] not in texts["tau"]:
        raise ValueError(f"tau: {given['tau']!r}: the texts have {sorted(texts['tau'])}; prepare them with fit > 0.")
    train, test = {}, {}
    for number, topic in enumerate(TOPICS[: given["topics"]]):
        ids, kept = encoded(tokenizer, texts["train"][topic], given["length"])
        tau = torch.zeros(len(ids), len(TOPICS))
        tau[:, number] = 1
        if given["tau"] != "tags":
            tau = torch.tensor([texts["tau"][given["tau"]][topic][n] for n in kept])
        train[topic] = ids, tau[:, : given["topics"]]
    for topic in (*TOPICS[: given["topics"]], "other"):
        ids, _ = encoded(tokenizer, texts["test"][topic], given["length"])
        if len(ids) < given["test_rows"]:
            raise ValueError(
                f"test_rows: {given['test_rows']}, but only {len(ids)} test texts of {topic!r} have {given['length']} "
                "tokens; read more (texts: test), or shorten the rows."
            )
        test[topic] = ids[: given["test_rows"]]
    return train, test


# ---- the bundles ----


def bundle_config(given: dict[str, Any], hidden_size: int) -> BundleConfig:
    """Topic bundles of equal size, each with columns of its own and the asked-for share of common ones."""
    topics, columns = TOPICS[: given["topics"]], resolve_rank(float(given["rank"]), hidden_size)
    common = round(given["overlap"] * columns)
    if common >= columns:
        raise ValueError(f"overlap: {given['overlap']} leaves a topic bundle no column of its own; take less than 1.")
    sub_bases: dict[str, int] = dict.fromkeys(topics, columns - common)
    bundles: dict[str, Any] = {
        f"b_sem_{topic}": {
            "rank": columns,
            "sub_bases": [topic],
            "overlap": common / columns,
            "signals": {"lm": peft_bundles.taxonomy.SIDE},
            "role": "semantic",
            "topic": topic,
        }
        for topic in topics
    }
    if common:
        sub_bases["common"] = common
    if given["signal_rank"]:
        general = resolve_rank(float(given["signal_rank"]), hidden_size)
        for name, sub_basis in (("b_mem_global", "mem"), ("b_abstraction", "abstraction")):
            sub_bases[sub_basis] = general
            bundles[name] = {"rank": general, "sub_bases": [sub_basis], "signals": {"lm": 1.0}}
    return BundleConfig(
        bundles=bundles,
        sub_bases=sub_bases,
        bottleneck=float(given["size"]),
        basis_seed=given["seed"],
        task_type="CAUSAL_LM",
    )


def columns_of(config: BundleConfig) -> dict[str, dict[str, float]]:
    """Column of the matrix -> alphas: the base model, no topic bundle, each alone, all."""
    bundles = config.bundles or {}
    semantic = [name for name, spec in bundles.items() if spec.role == "semantic"]
    off = dict.fromkeys(semantic, 0.0)
    alone = {f"{bundles[name].topic}": {**off, name: 1.0} for name in semantic}
    return {"base": dict.fromkeys(bundles, 0.0), "none": off, **alone, "all": {}}


# ---- a cell ----


def run_cell(given: dict[str, Any], base: Any, tokenizer: Any, texts: dict[str, Any], own: list[str]) -> dict[str, Any]:
    """Train the bundles of one setting and measure the matrix."""
    begun = time.perf_counter()
    device = base.device
    train, test = rows_of(given, texts, tokenizer)
    topics = list(train)
    torch.manual_seed(given["seed"])
    model: PeftModel = get_peft_model(base, bundle_config(given, base.config.hidden_size))
    config: Any = model.peft_config["default"]
    general = [
        text
        for pair in zip(texts["train"]["other"], own * (len(texts["train"]["other"]) // len(own) + 1))
        for text in pair
    ]
    options = {"tokens": given["calibration"]["tokens"], "max_length": given["calibration"]["max_length"]}
    peft_bundles.calibrate(model, general, tokenizer, progress=False, **options)
    routing = TopicRouting(topics, given["mask"], given["gate_forward"], seed=given["seed"])
    names = [name for _, name in bundle_parameters(model)]
    groups = [{"params": parameters} for parameters in bundle_parameters(model).values()]
    optimizer = torch.optim.AdamW(groups, lr=given["learning_rate"], weight_decay=0.0)
    rng = random.Random(given["seed"])
    losses = []
    model.train()
    for step in range(given["steps"]):
        turn = [train[topics[n % len(topics)]] for n in range(given["rows"])]
        picked = [(rows, rng.randrange(len(rows[0]))) for rows in turn]
        ids = torch.stack([rows[n] for (rows, _), n in picked]).to(device)
        tau = torch.stack([vectors[n] for (_, vectors), n in picked])
        alphas = routing.alphas(config, tau)
        with (
            model.alphas(alphas),
            model.route("lm", weights=routing.weights(config, tau, step)),
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss  # with the quiet penalty
        loss.backward()
        model.finalize_grads()
        model.clip_bundle_grads(given["max_grad_norm"])
        rates = routing.rates(config, tau)
        warm = min(1.0, (step + 1) / max(given["warmup"], 1))
        for name, group in zip(names, optimizer.param_groups):
            group["lr"] = given["learning_rate"] * warm * rates.get(name, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    model.eval()
    matrix: dict[str, dict[str, float]] = {topic: {} for topic in test}
    for column, alphas in columns_of(config).items():
        with model.alphas(alphas), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for topic, ids in test.items():
                matrix[topic][column] = text_loss(model, ids)
    record = {
        "matrix": matrix,
        "losses": [round(x, 4) for x in losses[:: max(len(losses) // 20, 1)]],
        "trainable": model.get_nb_trainable_parameters()[0],
        "seconds": round(time.perf_counter() - begun, 1),
    }
    model.unload()
    return record


@torch.no_grad()
def own_samples(base: Any, tokenizer: Any, count: int, length: int) -> list[str]:
    """Texts that the base model samples from its first token on; once for all cells."""
    torch.manual_seed(0)
    start = torch.full((count, 1), tokenizer.bos_token_id or 0, device=base.device)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "pad_token_id": tokenizer.pad_token_id}
    with torch.autocast(base.device.type, torch.bfloat16, enabled=base.device.type == "cuda"):
        made = base.generate(input_ids=start, attention_mask=torch.ones_like(start), **options)
    return [text for text in tokenizer.batch_decode(made, skip_special_tokens=True) if text.strip()]


# ---- results ----


def show(record: dict[str, Any]) -> None:
    """The matrix of one cell: the loss with no topic bundle, and the difference that each, or all, make."""
    matrix, cell = record["matrix"], record["cell"]
    topics = [topic for topic in matrix if topic != "other"]
    title = ", ".join(f"{k}={v}" for k, v in cell.items()) or "default"
    names = [topic[:6] for topic in topics]  # it has to fit 80 columns
    drawn = Table("loss", "base", "none", *names, "all", padding=(0, 0), title=f"{title}, seed {record['seed']}")
    for topic, row in matrix.items():
        differences = [f"{row[c] - row['none']:+.3f}" for c in (*topics, "all")]
        drawn.add_row(topic[:6], f"{row['base']:.3f}", f"{row['none']:.3f}", *differences)
    print(drawn)


def show_sweeps(records: list[dict[str, Any]], folder: Path) -> None:
    """Tables and plots of every knob that has more than one value."""
    for knob, values in sweeps(records).items():
        drawn = Table(knob, *next(iter(values.values())), title=f"change of held-out loss against none, by {knob}")
        for value, row in values.items():
            drawn.add_row(str(value), *(f"{fmean(found):+.3f} ± {spread(found):.3f}" for found in row.values()))
        print(drawn)
    draw(records, folder)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    given = settings(argv)
    if given["prepare"] is not None:
        write_texts(read_texts(given["texts"]), Path(given["prepare"]))
        print(f"wrote {given['prepare']}")
        return []
    output = Path(given["output"])
    cells_file = output / "cells.jsonl"
    records = [json.loads(x) for x in cells_file.read_text().splitlines()] if cells_file.exists() else []
    if records and not given["resume"]:
        raise ValueError(f"{cells_file} has {len(records)} cells; give --resume, or another --output.")
    sweep = [(cell, seed) for cell in given["sweep"]["cells"] for seed in given["sweep"]["seeds"]]
    wanted = [(cell, seed, {k: ({**given, **cell, "seed": seed})[k] for k in FIXED}) for cell, seed in sweep]
    for _, _, setting in wanted:  # what cannot be run is said before anything is
        TopicRouting(["any"], setting["mask"])
        if not 2 <= setting["topics"] <= len(TOPICS):
            raise ValueError(f"topics: {setting['topics']!r} must be from 2 to {len(TOPICS)}.")
    missing = [w for w in wanted if w[2] not in [record["settings"] for record in records]]
    if missing:
        source = given["model"] or str(_data.model_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        device = "cuda" if torch.cuda.is_available() and not given["smoke"] else "cpu"
        base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).eval()
        base.requires_grad_(False)
        texts = (
            json.loads(gzip.decompress(Path(given["data"]).read_bytes()))
            if given["data"]
            else read_texts(given["texts"])
        )
        own = own_samples(base, tokenizer, given["calibration"]["own"], given["calibration"]["max_length"])
        output.mkdir(parents=True, exist_ok=True)
    for number, (cell, seed, setting) in enumerate(missing):
        record = {"cell": cell, "seed": seed, **run_cell({**given, **setting}, base, tokenizer, texts, own)}
        record |= {
            "settings": setting,
            "command": " ".join(["recipes/semantic.py", *(sys.argv[1:] if argv is None else argv)]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, peft_bundles)},
            "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        }
        with cells_file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        records.append(record)
        show(record)
        print(f"cell {number + 1} of {len(missing)}: {record['seconds']:.0f} s")
    found = [record for record in records if record["settings"] in [w[2] for w in wanted]]
    if not missing:
        show(found[0])
    show_sweeps(found, output)
    print(f"recorded in {cells_file}")
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers for it
    main()
