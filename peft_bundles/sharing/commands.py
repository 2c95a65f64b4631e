"""What commands of `peft-bundles` do with sources and base models, once the package is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from torch import Tensor

from ..core.checkpoints import CONFIG_NAME
from ..keys import learn_null
from ..routers.keys import Null
from .composing import compose
from .hub import read_source


def check_bundles(sources: list[str], names: Any, rename: bool, token: str | None) -> None:
    """Refuse names of bundles that the sources do not have, before the base model is loaded."""
    if rename or not names:
        return  # the names are known when the bundles are put together
    bundles = [name for source in sources for name in read_source(source, token)[0].names]
    if unknown := [name for name in names if name not in bundles]:
        raise ValueError(f"there is no bundle {unknown[0]!r}; name one of {', '.join(bundles)}.")


def ready(sources: list[str], names: Any, base: str | None, token: str | None, rename: bool) -> tuple[Any, Any, str]:
    """The model with the bundles of all sources, its tokenizer and the base model's name, after checking `names`."""
    check_bundles(sources, names, rename, token)
    model, name = load(sources, base, token, rename)
    return model, tokenizer_of(name, token), name


def load(sources: list[str], base: str | None, token: str | None = None, rename: bool = False) -> tuple[Any, str]:
    """The base model with the bundles of all sources, in eval mode, and the base model's name."""
    import torch
    import transformers

    if base is None:
        config = read_source(sources[0], token)[0].config
        base = config.base_model_name_or_path
        if not base:
            raise ValueError(f"{sources[0]} does not say its base model; give it with --base.")
        revision = config.revision or (config.provenance or {}).get("base_revision")
        base = f"{base}@{revision}" if revision and not Path(base).expanduser().is_dir() else base
    name, revision = _split(base)
    fix = "give --base the folder or Hub id of the model that the bundles were trained on."
    if (Path(name) / CONFIG_NAME).is_file():
        raise ValueError(f"the base model {base!r} is an adapter itself; {fix}")
    try:
        if not Path(name).is_dir() and not isinstance(
            try_to_load_from_cache(name, "config.json", revision=revision), str
        ):
            HfApi(token=token).model_info(name, revision=revision, timeout=20)  # once: the loaders retry for minutes
        loaded = transformers.AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto", token=token)
    except Exception as error:  # without a network, the type of the error is that of the HTTP client
        raise ValueError(f"the base model {base!r} cannot be loaded ({error}); {fix}") from error
    model = compose(loaded, sources, rename=rename, token=token)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), base


def _split(base: str) -> tuple[str, str | None]:
    """A folder, or "id" or "id@revision" -> name and revision."""
    folder = Path(base).expanduser()
    if folder.exists() or "@" not in base:
        return str(folder), None
    name, _, revision = base.partition("@")
    return name, revision or None


def tokenizer_of(base: str, token: str | None) -> Any:
    name, revision = _split(base)
    try:
        return transformers.AutoTokenizer.from_pretrained(name, revision=revision, token=token)
    except (OSError, ValueError) as error:
        raise ValueError(f"the base model {base!r} has no tokenizer ({error}); give one with --base.") from error


def rows_of(what: str, path: str | Path, tokenizer: Any, rows: int, tokens: int) -> Any:
    """The first rows of a text file, (rows or fewer, tokens)."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if not (count := min(rows, len(ids) // tokens)):
        raise ValueError(f"{what} has {len(ids)} tokens, fewer than a row of {tokens}; lower --tokens.")
    return torch.tensor(ids[: count * tokens]).view(count, tokens)


def inputs_of(prompt: str, chat: bool, tokenizer: Any, base: str) -> Any:
    """A prompt as the model reads it: text, or a question in the chat template."""
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"--chat: the tokenizer of {base} has no chat template; leave --chat out.")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        options: dict[str, Any] = {"return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[1]:
        raise ValueError(f"--prompt {prompt!r} has no token; give some text.")
    return inputs


def spoken(model: Any, tokenizer: Any, ids: Tensor, null: Path, texts: Path | None) -> list[tuple[str, str]]:
    """(token, the bundle that its keys turn on, or "") for a row of token ids, (1, T)."""
    if null.is_file():
        model.set_null(Null.load(null))
    else:
        assert texts is not None
        paragraphs = [text for text in texts.read_text(encoding="utf-8").split("\n\n") if text.strip()]
        learn_null(model, paragraphs, tokenizer).save(null)
    model.set_router("keys")
    gates = model.gates(ids)
    on = [",".join(name for name, gate in zip(gates.bundles, row) if gate) for row in gates.values[0].tolist()]
    return [(tokenizer.decode([token]), names) for token, names in zip(ids[0].tolist(), on)]


def sweep_table(shown: dict[str, Any], points: list[float], own: str | None) -> str:
    """The result of a sweep (`AlphaSweep.to_dict`) as a table: a row a task, a column an alpha."""
    width = max(len("spearman"), *map(len, shown["tasks"]))
    lines = ["alpha".ljust(width) + "".join(f"{v:>9g}" for v in points) + "  spearman"]
    for task, each in shown["tasks"].items():
        rho = "-" if each["spearman"] is None else f"{each['spearman']:.2f}"
        lines.append(task.ljust(width) + "".join(f"{v:>9.3f}" for v in each["mean"]) + f"{rho:>10}")
    if own is not None:
        lines.append(f"selectivity for {own}: {shown['selectivity']}")
    return "\n".join(lines)
