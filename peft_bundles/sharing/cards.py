"""Model cards of bundle folders, written through huggingface_hub's ModelCard from the template beside this file."""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..core.basis import bundle_shapes, support_overlap
from ..core.checkpoints import SAFETENSORS_WEIGHTS_NAME, read_config


TEMPLATE = Path(__file__).with_name("card_template.md")
CARD = "README.md"
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".webp")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_card(
    folder: str | Path,
    *,
    results: list[dict[str, Any]] | None = None,
    figure: str | Path | None = None,
    data: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write README.md of a bundle folder: base model, signals, ranks, overlaps, results, how to load, limits.

    Args:
        folder: what `save_bundle` wrote, or any saved bundle adapter.
        results: one dict a row: "task", "metric" and "value", or "values" with one number a seed; if known also
            "seeds" (list), "base" (the base model's value), "dataset" (a name; the task if there is none).
        figure: a picture, such as the alpha sweep; it is copied into the folder.
        data: what it was trained on, in words. None: what the training summary says.
        repo_id: where it will be loaded from; None is the folder's name.

    Returns:
        The path of the card.

    Raises:
        ValueError: the folder holds no bundle, a row of results without its fields, or a figure that is no picture.
    """
    folder = Path(folder)
    config = read_config(folder)
    assert config.bundles is not None and config.base_shape is not None
    rows = [_row(i, row) for i, row in enumerate(results or [])]
    if figure is not None and (not Path(figure).is_file() or Path(figure).suffix.lower() not in PICTURES):
        raise ValueError(f"figure={str(figure)!r} must be a picture ({', '.join(PICTURES)}).")
    names, provenance = list(config.bundles), config.provenance or {}
    shapes, sizes = bundle_shapes(config, config.base_shape[0]), _sizes(folder, names)
    base_id = hub_id(config.base_model_name_or_path)
    # A folder on the author's disk is no model of the Hub, and its path is nobody's business.
    base = base_id or os.path.basename((config.base_model_name_or_path or "").rstrip("/\\")) or "an unnamed base model"
    card_data = ModelCardData(
        library_name="peft",
        base_model=base_id,
        pipeline_tag="text-generation",
        tags=["peft_bundles", "bundle", "adapter"],
        model_name=names[0] if rows else None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=row["dataset"],
                dataset_name=row["dataset"],
                metric_type=row["metric"],
                metric_value=row["mean"],
            )
            for row in rows
        ]
        or None,
    )
    overlap = support_overlap(shapes)
    calibration = config.calibration or {}
    summaries = {n: s for n, s in provenance.get("summaries", {}).items() if s}
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        names=names,
        base=base,
        base_id=base_id or "the base model",
        revision=provenance.get("base_revision"),
        hidden_size=config.base_shape[0],
        layers=config.base_shape[1],
        adapted=len(config.basis_fingerprint or {}),
        digest=provenance.get("basis", {}).get("digest", "its own")[:16],
        basis_init=config.basis_init,
        calibration=(
            f"{calibration['tokens']:,} tokens of {calibration['source']}" if calibration else "not calibrated"
        ),
        rows=[
            {
                "bundle": name,
                "kind": shape.kind,
                "rank": shape.rank,
                "hidden": shape.hidden,
                "support": len(shape.support),
                "parameters": sizes.get(name, 0),
                "alpha": f"{config.bundles[name].alpha:g}",
                "signals": ", ".join(f"{s} ({w:g})" for s, w in config.bundles[name].signals.items() if w) or "-",
            }
            for name, shape in shapes.items()
        ],
        overlaps=[
            f"`{a}` and `{b}`: {overlap[i, j]:.2f}"
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if i < j and overlap[i, j]
        ],
        training="\n".join(f"- `{n}`: {_words(s)}" for n, s in summaries.items()) or "No training summary was saved.",
        data=data or "; ".join(str(s["data"]) for s in summaries.values() if "data" in s) or "not stated",
        results=rows,
        figure=Path(figure).name if figure is not None else None,
        where=repo_id or folder.resolve().name,
    )
    if figure is not None and Path(figure).resolve().parent != folder.resolve():
        shutil.copyfile(figure, folder / Path(figure).name)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        card.save(Path(staging) / CARD)
        os.replace(Path(staging) / CARD, folder / CARD)
    return folder / CARD


def hub_id(name: str | None) -> str | None:
    """The name of a base model where it is one of the Hub's, and no folder."""
    return name if name and HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def _row(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of results as the table has it: mean and deviation over seeds."""
    me = f"results[{number}]"
    if not isinstance(row, Mapping) or not {"task", "metric"} <= row.keys() or not {"value", "values"} & row.keys():
        raise ValueError(f"{me}={row!r} must be a dict with 'task', 'metric' and 'value' (or 'values', one a seed).")
    values = list(row["values"]) if "values" in row else [row["value"]]
    if not values or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise ValueError(f"{me}: values {values!r} must be finite numbers.")
    mean, task = statistics.fmean(values), str(row["task"])
    seeds = row.get("seeds")
    return {
        "task": task,
        "metric": str(row["metric"]),
        "dataset": str(row.get("dataset") or task),
        "mean": mean,
        "text": f"{mean:.4g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""),
        "seeds": ", ".join(map(str, seeds)) if seeds else f"{len(values)} run{'s' if len(values) > 1 else ''}",
        "base": f"{row['base']:.4g}" if isinstance(row.get("base"), (int, float)) else "-",
    }


def _words(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in summary.items() if key != "data")


def _sizes(folder: Path, names: list[str]) -> dict[str, int]:
    """Parameters of each bundle, from the header of the weights' file; empty where there is none."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return {}
    sizes = dict.fromkeys(names, 0)
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            bundle = key.rpartition(".")[2]
            if bundle in sizes:
                sizes[bundle] += math.prod(file.get_slice(key).get_shape())
    return sizes
