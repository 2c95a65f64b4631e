"""For the reference: sections "Example:" of docstrings are shown as code, as griffe shows "Examples:"."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example(?: \(.*\))?:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
