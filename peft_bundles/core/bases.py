"""`Bases`: the U of every adapter on one decoder block."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from .basis import draw_basis


class Bases(BufferDict):
    """U by adapter. A random U is drawn when it is read for the first time, so not before a checkpoint replaces it.

    Drawing takes up to a second per layer (QR in float64, 3072 x 2304, two cores), five times as long as loading a
    LoRA.
    """

    def __init__(self, beside: BufferDict) -> None:
        super().__init__(persistent=True)
        self.beside = (beside,)  # buffers on the same device; in a tuple, so that they are not registered as a child
        self.later: dict[str, tuple[int, int, int, int]] = {}

    def draw_later(self, adapter: str, *drawn: int) -> None:
        """Draw this adapter's U later. `drawn` are the arguments of `draw_basis`: hidden size, rank, seed, layer."""
        self.register_buffer(adapter, None)
        self.later[adapter] = drawn  # type: ignore[assignment]

    def draw(self) -> None:
        """Draw every U that has not been drawn yet."""
        for adapter in list(self.later):
            self[adapter]

    def __getitem__(self, key: str) -> Tensor:
        if key in self.later:
            with torch.inference_mode(False):
                self[key] = draw_basis(*self.later[key]).to(self.beside[0][key].device)
        return super().__getitem__(key)

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        super().__setitem__(key, buffer)
        self.later.pop(key, None)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.later.pop(key, None)

    def items(self) -> Any:
        self.draw()
        return super().items()

    def extra_repr(self) -> str:
        self.draw()
        return super().extra_repr()

    def _save_to_state_dict(self, *args: Any) -> None:
        self.draw()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.draw()
        super()._load_from_state_dict(*args)
