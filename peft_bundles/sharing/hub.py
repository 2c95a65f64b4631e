"""Save, push and pull bundles: as folders, and as repositories of the Hub with huggingface_hub's client.

A source is written `folder`, `folder:bundle`, `repo`, `repo:bundle`, `repo@revision` or `repo@revision:bundle`. A
repository holds one adapter at its root: a single bundle (from `push_bundle`), or a whole adapter (from
`model.push_to_hub`). `repo:bundle` is one bundle of a whole adapter.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..core.basis_files import read_basis
from ..core.checkpoints import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, Checkpoint, read, read_config, write
from ..core.walking import resolve_adapter
from .cards import CARD, PICTURES, with_sections, write_card
from .parts import from_model, select, with_base


MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_REPO = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<bundle>[A-Za-z_]\w*))?")


@dataclass(frozen=True)
class Source:
    """A parsed source: a folder, or a repository at a revision. `bundle` None means all bundles."""

    folder: str | None = None
    repo: str | None = None
    revision: str | None = None
    bundle: str | None = None
    text: str = ""


def parse_source(source: str | Path) -> Source:
    """Parse a source. A folder that exists is preferred to a repository of the same name.

    Raises:
        ValueError: neither a folder that exists nor the name of a repository.
    """
    text = str(source)
    head, colon, tail = text.rpartition(":")
    for folder, bundle in ((text, None), (head, tail)) if colon else ((text, None),):
        if folder and os.path.isdir(os.path.expanduser(folder)):
            return Source(folder=os.path.expanduser(folder), bundle=bundle, text=text)
    match = _REPO.fullmatch(text)
    if match is None or ".." in text or text.startswith((".", "-")):
        raise ValueError(
            f"source {text!r} is neither an existing folder nor the name of a repository; write folder, "
            "folder:bundle, repo, repo:bundle or repo@revision:bundle."
        )
    validate_repo_id(match["repo"])
    return Source(repo=match["repo"], revision=match["revision"], bundle=match["bundle"], text=text)


def api_for(token: str | None) -> HfApi:
    """huggingface_hub's client, which names this library to the Hub."""
    return HfApi(token=token, library_name="peft_bundles")


def _download(source: Source, token: str | None, force: bool = False) -> str:
    """The local folder of a source. Of a repository, only the files of an adapter are downloaded, all of one commit."""
    if source.folder is not None:
        return source.folder
    assert source.repo is not None
    api = api_for(token)
    folder = api.snapshot_download(
        source.repo, revision=source.revision, allow_patterns=[CONFIG_NAME], force_download=force
    )
    read_config(folder, source.text)  # refuses another type of adapter before its weights are downloaded
    commit = Path(folder).name
    patterns = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD, *(f"*{suffix}" for suffix in PICTURES)]
    folder = api.snapshot_download(source.repo, revision=commit, allow_patterns=patterns, force_download=force)
    if not os.path.isfile(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)):
        files = api.list_repo_files(source.repo, revision=commit)
        only = f"{WEIGHTS_NAME}, a pickle, which is never loaded" if WEIGHTS_NAME in files else f"{files}"
        raise ValueError(f"{source.text} has no {SAFETENSORS_WEIGHTS_NAME}, only {only}; save it as safetensors.")
    return folder


def lora_folder(source: str | Path, token: str | None = None) -> str:
    """The local folder of a LoRA adapter, downloaded if it is a repository. Pickled weights are not downloaded.

    Raises:
        ValueError: neither a folder nor the name of a repository.
        huggingface_hub.errors.HfHubHTTPError: the Hub's answer: no such repository or revision, or no access to it.
    """
    parsed = parse_source(source)
    if parsed.folder is not None:
        return parsed.folder
    assert parsed.repo is not None
    files = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
    return api_for(token).snapshot_download(parsed.repo, revision=parsed.revision, allow_patterns=files)


def read_source(source: str | Path, token: str | None = None) -> tuple[Checkpoint, str]:
    """The checked checkpoint of a source, and the folder it came from. `source:bundle` gives that bundle only.

    If the content of a download is wrong (a damaged cache, a proxy), it is downloaded once more before it is refused.

    Raises:
        ValueError: no bundle, a damaged or half-written one, or no bundle of the given name.
        huggingface_hub.errors.HfHubHTTPError: the Hub's answer: no such repository or revision, or no access to it.
    """
    parsed = parse_source(source)
    folder = _download(parsed, token)
    try:
        checkpoint = read(folder, parsed.text, read_basis)
    except ValueError:
        if parsed.repo is None:
            raise
        folder = _download(parsed, token, force=True)
        checkpoint = read(folder, parsed.text, read_basis)
    return (select(checkpoint, parsed.bundle) if parsed.bundle else checkpoint), folder


def pull_bundle(source: str | Path, folder: str | Path | None = None, token: str | None = None) -> Path:
    """Download a bundle, or a whole adapter, and check it.

    Args:
        source: written as in `compose`. A local folder is checked (and copied) the same way.
        folder: folder to write it to. None: it stays in the Hub's cache.
        token: Hub token, for private repositories. None: the stored one.

    Returns:
        The folder it is in.

    Raises:
        ValueError: no bundle, a damaged or half-written one, or no bundle of the given name; or one bundle of several
            is asked for without `folder`.
        huggingface_hub.errors.HfHubHTTPError: the Hub's answer: no such repository or revision, or no access to it.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, pull_bundle
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> folder = tempfile.TemporaryDirectory()
        >>> get_peft_model(base, BundleConfig(preset="ssl_rl_separate")).save_pretrained(f"{folder.name}/all")
        >>> pulled = pull_bundle(f"{folder.name}/all:b_rl_policy", f"{folder.name}/one")  # or "repo:b_rl_policy"
        >>> sorted(path.name for path in pulled.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
        >>> folder.cleanup()
    """
    checkpoint, origin = read_source(source, token)
    bundles = read_config(origin).bundles or {}
    if folder is None:
        if len(bundles) > len(checkpoint.names):
            raise ValueError(f"{source} is one bundle of {len(bundles)} in one file; give a folder= to write it to.")
        return Path(origin)
    write(checkpoint, folder)
    if len(bundles) > len(checkpoint.names):
        write_card(folder)
    else:
        _copy_card(origin, folder)
    return Path(folder)


def _copy_card(source: str | Path, folder: str | Path) -> None:
    """Copy README.md and the pictures of a folder."""
    for name in os.listdir(source):
        if name == CARD or name.lower().endswith(PICTURES):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))


def save_bundle(
    model: nn.Module,
    bundle: str,
    folder: str | Path,
    summary: Mapping[str, Any] | None = None,
    *,
    adapter: str | None = None,
) -> Path:
    """Save one bundle as a PEFT adapter folder.

    The folder has the weights of the bundle, the columns of U that it may use, mu and sigma. `adapter_config.json` also
    has the digest of the whole basis, the fingerprint of the base model, sizes, signals and the summary. Both
    `PeftModel.from_pretrained` and `compose` load it. If there is no README.md, a model card is written.

    Args:
        model: a model with the bundle in an active adapter.
        bundle: name of the bundle.
        folder: folder to write to. An earlier save is replaced; other files stay.
        summary: of the training, e.g. {"steps": 300, "data": "gsm8k"}; a dict that fits into JSON. None: keep the
            summary that the bundle was loaded with.
        adapter: the adapter, if several active ones have a bundle of that name.

    Returns:
        The folder.

    Raises:
        ValueError: no such bundle, an adapter that trains other modules too, or a summary that does not fit into JSON.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, save_bundle
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> model = get_peft_model(base, BundleConfig(preset="ssl_rl_separate"))
        >>> folder = tempfile.TemporaryDirectory()
        >>> saved = save_bundle(model, "b_rl_policy", folder.name, {"steps": 0, "data": "none"})
        >>> sorted(path.name for path in saved.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
        >>> folder.cleanup()
    """
    owner = resolve_adapter(model, adapter, bundle=bundle)
    cut = select(with_base(from_model(model, owner), model), bundle)
    if summary is not None:
        try:
            checked = json.loads(json.dumps(dict(summary), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"summary={summary!r} does not fit into JSON ({error}); give a dict that does.") from error
        assert cut.config.provenance is not None
        cut.config.provenance["summaries"] = {bundle: checked}
    write(cut, folder)
    if not (Path(folder) / CARD).exists():
        write_card(folder)
    return Path(folder)


def push_bundle(
    model: nn.Module,
    bundle: str,
    repo_id: str,
    *,
    summary: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    results: list[dict[str, Any]] | None = None,
    figure: str | None = None,
    data: str | None = None,
    card: str | Path | None = None,
) -> str:
    """Push one bundle with its model card to a Hub repository, in one commit.

    If the repository has a card already, its sections and metadata that the new card does not have are kept. A card
    that was not written by this package follows the new one as its section "Earlier card".

    Args:
        model: a model with the bundle in an active adapter.
        bundle: name of the bundle.
        repo_id: "owner/name". The repository is created if it does not exist.
        summary: as in `save_bundle`.
        adapter: as in `save_bundle`.
        private: make a new repository private.
        token: Hub token. None: the stored one.
        revision: branch to push to. It is created if it does not exist.
        results: as in `write_card`.
        figure: as in `write_card`.
        data: as in `write_card`.
        card: a folder with a README.md and pictures. They are pushed, and no card is written.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: as in `save_bundle`; a `card` folder without README.md, or given together with results, figure or
            data; a repository that holds other bundles.
        RuntimeError: somebody else pushed at the same time; nothing was changed.
        huggingface_hub.errors.HfHubHTTPError: the Hub's refusal.

    Example (needs a Hub token):
        push_bundle(model, "b_rl_policy", "me/my-policy", summary={"steps": 300}, data="gsm8k")
    """
    validate_repo_id(repo_id)
    if card is not None and not (Path(card) / CARD).is_file():
        raise ValueError(f"card={str(card)!r} has no {CARD}; give a folder with one, or leave card out.")
    if card is not None and (results, figure, data) != (None, None, None):
        raise ValueError(
            f"card={str(card)!r} was given with results, figure or data, which write a card; give one or the other."
        )
    with tempfile.TemporaryDirectory() as staging:
        save_bundle(model, bundle, staging, summary, adapter=adapter)
        if card is None:
            write_card(staging, results=results, figure=figure, data=data, repo_id=repo_id)
        else:
            _copy_card(card, staging)
        keeps = card is None
        return upload(staging, repo_id, holds=bundle, private=private, token=token, revision=revision, keeps=keeps)


def upload(
    folder: str,
    repo_id: str,
    *,
    holds: str | None,
    private: bool,
    token: str | None,
    revision: str | None,
    keeps: bool = False,
) -> str:
    """Commit a folder to a repository and return its URL. The repository is created if it does not exist.

    Args:
        holds: the bundle in the folder. A repository with other bundles or a model is refused. None: the folder holds
            no bundle.
        keeps: keep what somebody has written into the repository's card (`cards.with_sections`).

    Raises:
        ValueError: the repository holds other bundles, or a model.
        RuntimeError: somebody else pushed at the same time.
    """
    api = api_for(token)
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = api.repo_info(repo_id, revision=revision).sha
    files = api.list_repo_files(repo_id, revision=head)
    if holds is not None and CONFIG_NAME not in files and (models := [f for f in files if f in MODEL_FILES]):
        raise ValueError(
            f"{repo_id} holds a model ({models[0]}); push {holds!r} to a repository of its own, or to another revision."
        )
    if keeps and CARD in files:
        path, earlier = Path(folder) / CARD, Path(api.hf_hub_download(repo_id, CARD, revision=head)).read_bytes()
        path.write_text(with_sections(path.read_text(encoding="utf-8"), earlier), encoding="utf-8")
    if holds is not None and CONFIG_NAME in files:
        config = read_config(api.snapshot_download(repo_id, revision=head, allow_patterns=[CONFIG_NAME]), repo_id)
        if (names := list(config.bundles or ())) != [holds]:
            raise ValueError(f"{repo_id} holds {names}; push {holds!r} to another repository or another revision.")
    try:
        # parent_commit: the Hub refuses the commit if another one came first, so files of two writers never mix.
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=f"Push {holds or 'a basis'}",
            parent_commit=head,
        )
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 412:
            raise RuntimeError(
                f"somebody else pushed to {repo_id} at the same time; look at it, then push again."
            ) from error
        raise
    return str(url)
