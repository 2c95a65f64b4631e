"""Optional dependencies: one line that says what is missing and how to install it."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import a module that one of the package's extras installs.

    Args:
        module: its name, such as "trl" or "sklearn.linear_model".
        extra: the extra of `peft-bundles` that installs it, such as "train".

    Returns:
        The module.

    Raises:
        ImportError: the module is not installed. The message names it and the pip command.

    Example:
        >>> require("json", "train").dumps([1])
        '[1]'
        >>> require("no_such_module", "train")
        Traceback (most recent call last):
        ...
        ImportError: no_such_module is not installed; run: pip install "peft-bundles[train]"
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the module is installed, and something that it imports is not
        raise ImportError(f'{package} is not installed; run: pip install "peft-bundles[{extra}]"') from None
