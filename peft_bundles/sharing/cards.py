"""Model cards of bundle folders, written with huggingface_hub's `ModelCard` from card_template.md."""

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
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME

from ..core.basis import bundle_shapes, sizes_of_bundles, support_overlap
from ..core.checkpoints import read_config, read_tensors, size_in_words
from ..core.places import CHILD


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
    """Write the model card (README.md) of a bundle folder: base model, signals, ranks, overlaps, results, limits.

    Args:
        folder: a folder of `save_bundle`, or any saved bundle adapter.
        results: one dict per row of the table. "task", "metric" and "value" (or "values", one number per seed) are
            needed. "seeds" (a list), "base" (the value of the base model) and "dataset" (default: the task) are
            optional.
        figure: a picture, such as an alpha sweep. It is copied into the folder.
        data: the training data, in words. None: as in the training summary.
        repo_id: the repository it will be loaded from. None: the name of the folder.

    Returns:
        The path of the card.

    Raises:
        ValueError: the folder holds no bundle, a row of results lacks a field, or the figure is not a picture.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, save_bundle, write_card
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> model = get_peft_model(base, BundleConfig(preset="ssl_rl_separate"))
        >>> folder = tempfile.TemporaryDirectory()
        >>> saved = save_bundle(model, "b_rl_policy", folder.name)
        >>> results = [{"task": "sums", "metric": "accuracy", "values": [0.5, 0.7], "seeds": [0, 1], "base": 0.1}]
        >>> card = write_card(saved, results=results, data="invented sums")
        >>> [line for line in card.read_text().splitlines() if line.startswith("| sums")]
        ['| sums | accuracy | 0.6 ± 0.14 | 0, 1 | 0.1 |']
        >>> folder.cleanup()
    """
    folder = Path(folder)
    config = read_config(folder)
    assert config.bundles is not None and config.base_shape is not None
    rows = [_row(i, row) for i, row in enumerate(results or [])]
    if figure is not None and (not Path(figure).is_file() or Path(figure).suffix.lower() not in PICTURES):
        raise ValueError(f"figure={str(figure)!r} is not a picture; give an existing file ({', '.join(PICTURES)}).")
    names, provenance = list(config.bundles), config.provenance or {}
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = read_tensors(str(weights), str(folder))[0] if weights.is_file() else {}
    sizes = {key: tensor.numel() for key, tensor in tensors.items()}
    layers = len({key.rpartition(f".{CHILD}.")[0] for key in sizes})
    base_id = hub_id(config.base_model_name_or_path)
    # A local folder is named without its path, which is private.
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
    shapes = bundle_shapes(config, config.base_shape[0])
    overlap = support_overlap({name: shapes.get(name) for name in names})
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
        adapted=layers,
        digest=provenance.get("basis", {}).get("digest", "its own")[:16],
        basis_init=config.basis_init if config.basis_fingerprint else None,
        size=size_in_words(tensors) if tensors else None,
        keys=", ".join(f"`{n}` {k['rows']:,} rows" for n, k in (config.keys or {}).items()),
        calibration=(
            f"{calibration['tokens']:,} tokens of {calibration['source']}" if calibration else "not calibrated"
        ),
        rows=[
            {
                "bundle": name,
                **shape,
                "parameters": sum(size for key, size in sizes.items() if key.endswith(f".{name}")),
                "alpha": f"{config.bundles[name].alpha:g}",
                "signals": ", ".join(f"{s} ({w:g})" for s, w in config.bundles[name].signals.items() if w) or "-",
            }
            for name, shape in sizes_of_bundles(config, config.base_shape[0]).items()
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


EARLIER = "## Earlier card"


def with_sections(card: str, earlier: bytes) -> str:
    """A new card with what somebody has added to the earlier one: its further sections and metadata.

    An earlier card that does not name the type BUNDLE was written by somebody else, and becomes one section.

    Raises:
        ValueError: the earlier card is no text, or its metadata cannot be read.
    """
    try:
        new, old = ModelCard(card), ModelCard(earlier.decode(), ignore_metadata_errors=True)
        for field, value in old.data.to_dict().items():
            if field not in new.data.to_dict():
                setattr(new.data, field, value)
    except Exception as error:  # of the YAML parser, and of huggingface_hub's checks
        raise ValueError(f"the repository's {CARD} cannot be read ({error}); mend it, or give card=.") from error
    titles = {title for title, _ in _sections(new.text)}
    if "BUNDLE" in old.text:
        added = [text for title, text in _sections(old.text) if title not in titles]
    else:
        added = [f"{EARLIER}\n\n{old.text.strip()}"]
    return "\n\n".join([str(new).rstrip(), *(text.strip() for text in added)]) + "\n"


def _sections(text: str) -> list[tuple[str, str]]:
    """(title, text with its title) of the sections that start with ##, outside of code."""
    sections: list[tuple[str, str]] = []
    code = False
    for line in text.splitlines(keepends=True):
        code ^= line.startswith("```")
        if line.startswith("## ") and not code:
            sections.append((line.strip(), line))
        elif sections:
            title, before = sections[-1]
            sections[-1] = title, before + line
    return sections


def hub_id(name: str | None) -> str | None:
    """The name of a base model if it is a Hub id and no local folder."""
    return name if name and HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def _row(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the results table, with mean and standard deviation over seeds."""
    if not isinstance(row, Mapping) or not {"task", "metric"} <= row.keys() or not {"value", "values"} & row.keys():
        raise ValueError(
            f"results[{number}]={row!r} lacks a field; give a dict with 'task', 'metric' and 'value' (or 'values', one "
            "number per seed)."
        )
    values = list(row["values"]) if "values" in row else [row["value"]]
    if not values or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise ValueError(f"results[{number}] has the values {values!r}; give finite numbers.")
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
    """A training summary on one line."""
    return ", ".join(f"{key} {value}" for key, value in summary.items() if key != "data")
