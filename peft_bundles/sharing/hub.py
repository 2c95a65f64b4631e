"""Bundles as checkpoints that people share: folders, and repositories of the Hub through huggingface_hub's own client.

A source is written `folder`, `folder:bundle`, `repo`, `repo:bundle`, `repo@revision` or `repo@revision:bundle`. A
repository holds one adapter at its root: one bundle (`push_bundle`), or a whole adapter (`model.push_to_hub`), of which
`repo:bundle` takes one.
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

from ..core.checkpoints import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, Checkpoint, read, read_config, write
from .cards import CARD, PICTURES, write_card
from .parts import adapter_with, from_model, select, with_base


_REPO = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<bundle>[A-Za-z_]\w*))?")


@dataclass(frozen=True)
class Source:
    """Where a bundle is: in a folder, or in a repository at a revision; `bundle` None is all that is there."""

    folder: str | None = None
    repo: str | None = None
    revision: str | None = None
    bundle: str | None = None
    text: str = ""


def parse_source(source: str | Path) -> Source:
    """Take a source apart; a folder that exists wins over a repository of the same name.

    Raises:
        ValueError: neither a folder that exists nor the name of a repository.
    """
    text = str(source)
    head, colon, tail = text.rpartition(":")
    for folder, bundle in ((text, None), (head, tail)) if colon else ((text, None),):
        if folder and os.path.isdir(os.path.expanduser(folder)):
            return Source(folder=os.path.expanduser(folder), bundle=bundle, text=text)
    found = _REPO.fullmatch(text)
    if found is None or ".." in text or text.startswith((".", "-")):
        raise ValueError(
            f"source {text!r} is no folder that exists and no repository; write folder, repo, repo:bundle or "
            "repo@revision:bundle."
        )
    validate_repo_id(found["repo"])
    return Source(repo=found["repo"], revision=found["revision"], bundle=found["bundle"], text=text)


def api_for(token: str | None) -> HfApi:
    """huggingface_hub's client."""
    return HfApi(token=token, library_name="peft_bundles")


def _download(source: Source, token: str | None, force: bool = False) -> str:
    """The folder of a source; of a repository only the files that a bundle has, all of one commit."""
    if source.folder is not None:
        return source.folder
    assert source.repo is not None
    api = api_for(token)
    folder = api.snapshot_download(
        source.repo, revision=source.revision, allow_patterns=[CONFIG_NAME], force_download=force
    )
    read_config(folder, source.text)  # another kind of adapter is refused before its weights are fetched
    commit = Path(folder).name
    wanted = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD, *(f"*{suffix}" for suffix in PICTURES)]
    folder = api.snapshot_download(source.repo, revision=commit, allow_patterns=wanted, force_download=force)
    if not os.path.isfile(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)):
        files = api.list_repo_files(source.repo, revision=commit)
        pickled = f"only {WEIGHTS_NAME}, a pickle, which is never loaded" if WEIGHTS_NAME in files else f"only {files}"
        raise ValueError(f"{source.text} has no {SAFETENSORS_WEIGHTS_NAME}, {pickled}.")
    return folder


def read_source(source: str | Path, token: str | None = None) -> tuple[Checkpoint, str]:
    """The adapter that a source names (of `:bundle` that bundle alone), every check done, and the folder it came from.

    A download whose content is wrong (a cache that was damaged, a proxy) is fetched once more before it is refused.

    Raises:
        ValueError: not a bundle, damaged, half-written, or without the bundle that was named.
        huggingface_hub.errors.HfHubHTTPError: the Hub's answer: no such repository or revision, or no right to it.
    """
    parsed = parse_source(source)
    folder = _download(parsed, token)
    try:
        checkpoint = read(folder, parsed.text)
    except ValueError:
        if parsed.repo is None:
            raise
        folder = _download(parsed, token, force=True)
        checkpoint = read(folder, parsed.text)
    return (select(checkpoint, parsed.bundle) if parsed.bundle else checkpoint), folder


def pull_bundle(source: str | Path, folder: str | Path | None = None, token: str | None = None) -> Path:
    """Download a bundle (or a whole adapter), check it, and return the folder it is in.

    Args:
        source: see the module.
        folder: where to write it; None leaves it in the Hub's cache.
        token: of the Hub, for private repositories; None is the stored one.

    Raises: see `read_source`; ValueError also where one bundle of several is to be written and no folder is given.
    """
    checkpoint, found = read_source(source, token)
    whole = read_config(found).bundles or {}
    if folder is None:
        if len(whole) > len(checkpoint.names):
            raise ValueError(f"{source} is one of {len(whole)} bundles of a file; give folder= to write it to.")
        return Path(found)
    write(checkpoint, folder)
    if len(whole) > len(checkpoint.names):
        write_card(folder)
    else:
        _copy_card(found, folder)
    return Path(folder)


def _copy_card(source: str | Path, folder: str | Path) -> None:
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
    """Save one bundle as a PEFT adapter folder of its own.

    It has the columns of U that the bundle may use, with mu and sigma, and in `adapter_config.json` the digest of the
    whole basis, the fingerprint of the base model's weights, sizes, signals and the summary.
    `PeftModel.from_pretrained` loads it. A card is written where there is none.

    Args:
        model: with the bundle in an active adapter.
        bundle: its name.
        folder: where to; files of an earlier save are replaced, others left alone.
        summary: of the training, e.g. {"steps": 300, "data": "gsm8k"}; must fit into JSON. None keeps an earlier one.
        adapter: which adapter, where several active ones have a bundle of that name.

    Raises:
        ValueError: no such bundle, an adapter that trains more than bundles, or a summary that is no JSON object.
    """
    name = adapter_with(model, bundle, adapter)
    cut = select(with_base(from_model(model, name), model), bundle)
    if summary is not None:
        try:
            checked = json.loads(json.dumps(dict(summary), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"summary={summary!r} must be a dict that fits into JSON ({error}).") from error
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
    """Push one bundle with its card to a repository of its own, in one commit; returns the repository's URL.

    Args:
        model, bundle, summary, adapter: see `save_bundle`.
        repo_id: made if it does not exist.
        private: of a repository that is made now.
        token: of the Hub; None is the stored one.
        revision: branch to push to, made if it does not exist.
        results, figure, data: see `cards.write_card`.
        card: a folder whose README.md and pictures are pushed instead of a card that is written now.

    Raises:
        ValueError: see `save_bundle`; a `card` without README.md, or with results, a figure or data beside it; or the
            repository holds something else already.
        RuntimeError: somebody else pushed meanwhile; nothing was changed.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    validate_repo_id(repo_id)
    if card is not None and not ((Path(card) / CARD).is_file() and results is None and figure is None and data is None):
        raise ValueError(
            f"card={str(card)!r} must be a folder with a {CARD}, and leaves no use for results, figure, data."
        )
    with tempfile.TemporaryDirectory() as staging:
        save_bundle(model, bundle, staging, summary, adapter=adapter)
        if card is None:
            write_card(staging, results=results, figure=figure, data=data, repo_id=repo_id)
        else:
            _copy_card(card, staging)
        return upload(staging, repo_id, holds=bundle, private=private, token=token, revision=revision)


def upload(
    folder: str,
    repo_id: str,
    *,
    holds: str | None,
    private: bool,
    token: str | None,
    revision: str | None,
) -> str:
    """Commit a folder to a repository, made if need be, whose adapter is `holds` or none; returns the URL."""
    api = api_for(token)
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = api.repo_info(repo_id, revision=revision).sha
    if holds is not None and api.file_exists(repo_id, CONFIG_NAME, revision=head):
        there = read_config(api.snapshot_download(repo_id, revision=head, allow_patterns=[CONFIG_NAME]), repo_id)
        if list(there.bundles or ()) != [holds]:
            raise ValueError(
                f"{repo_id} holds {list(there.bundles or ())}; push {holds!r} to a repository of its own, or to "
                "another revision."
            )
    try:
        # With the commit it builds on: files of two writers never end up in one revision.
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=f"Push {holds or 'a basis'}",
            parent_commit=head,
        )
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 412:
            raise RuntimeError(f"somebody else pushed to {repo_id} meanwhile; look at it and push again.") from error
        raise
    return str(url)
