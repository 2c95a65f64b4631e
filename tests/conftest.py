"""The Hub of the tests is a server on loopback: huggingface_hub reads its address once, when it is imported."""

from __future__ import annotations

import os
import tempfile

from hub_server import HubServer


HUB = HubServer()
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HUB_DISABLE_XET"] = "1"  # a protocol of its own, which the server does not speak
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="peft_bundles-hf-")
os.environ["HF_HOME"] = _CACHE.name
os.environ.pop("HF_TOKEN", None)
