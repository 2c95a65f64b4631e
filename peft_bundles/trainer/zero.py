"""DeepSpeed's ZeRO, stages 1 and 2, under bundles: the optimizer's state in parts, one on every process.

ZeRO joins each group of an optimizer to one vector, keeps and steps a part of it on every process, and fills what got
no gradient with zeros, which momentum turns into movement (benchmarks/results/deepspeed_zero2.json). Here a group is a
bundle, a head, or a tensor of the trunk, and one without a gradient is not stepped at all: None stays None.

Only DeepSpeed's optimizer is used and not its engine, whose backward hooks several passes a step do not go through:
gradients are accumulated whole, reduced by `finalize_grads` and clipped as without ZeRO, then cut. So stage 1 and stage
2 hold the same here: what a process keeps from step to step is its part of the state, and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer


ELEMENTWISE = (Adam, AdamW, SGD)  # a part of a vector steps as in the whole


class _Groupwise(DeepSpeedZeroOptimizer):
    """Steps the groups in `live` only."""

    live: frozenset[int] = frozenset()

    def _optimizer_step(self, group_no: int) -> None:
        if group_no in self.live:
            super()._optimizer_step(group_no)


class ZeroOptimizer(Optimizer):
    """An optimizer whose state lies in parts on all processes.

    Its `state_dict` is that of the given optimizer, whole inside of `gathered`, so a checkpoint can be resumed with or
    without ZeRO and on any number of processes.

    Args:
        optimizer: over float32 parameters, elementwise (`ELEMENTWISE`); it has not stepped yet, and is used up.
        owner_of: id of a parameter -> what it belongs to; what belongs together steps together.
        names: id of a parameter -> its name, for errors.
        stage: 1 or 2.

    Raises:
        ValueError: another optimizer; a parameter that is not float32.
    """

    def __init__(self, optimizer: Optimizer, owner_of: Mapping[int, str], names: Mapping[int, str], stage: int) -> None:
        if type(optimizer) not in ELEMENTWISE:
            raise ValueError(
                f"optim: under ZeRO {type(optimizer).__name__} would step parts of vectors instead of weights; take "
                "'adamw_torch', 'adamw_torch_fused' or 'sgd'."
            )
        groups = [{**g, "params": list(g["params"])} for g in optimizer.param_groups]
        super().__init__(groups, optimizer.defaults)  # with the groups as given: a scheduler sets their rates
        self._whole: list[list[nn.Parameter]] = [g["params"] for g in groups]
        for p in (p for group in self._whole for p in group):
            if p.dtype != torch.float32:
                raise ValueError(
                    f"{names[id(p)]!r} is {p.dtype}; under ZeRO what trains must be float32 (bf16=True computes in "
                    "bfloat16 all the same)."
                )
        self._parts: list[list[nn.Parameter]] = []
        self._part_of: list[range] = []  # the parts of each group of the given optimizer
        split: list[dict[str, Any]] = []
        for group in groups:
            together: dict[str, list[nn.Parameter]] = {}
            for p in group["params"]:
                together.setdefault(owner_of[id(p)], []).append(p)
            self._part_of.append(range(len(split), len(split) + len(together)))
            split += [{**group, "params": parameters} for parameters in together.values()]
            self._parts += together.values()
        self._owners = [owner_of[id(part[0])] for part in self._parts]
        optimizer.param_groups = split
        self._inner = optimizer
        device = self._parts[0][0].device
        if (found := get_accelerator().device_name()) != device.type:
            raise ValueError(
                f"DeepSpeed works on {found!r}, but the model is on {device}; set DS_ACCELERATOR={device.type}."
            )
        if device.type == "cpu":  # would be compiled at first use, and gloo does
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._zero = _Groupwise(
            optimizer,
            {p: names[id(p)] for group in self._whole for p in group},
            NoopTimer(),
            {},
            dp_process_group=dist.group.WORLD,
            communication_data_type=torch.float32,
            contiguous_gradients=False,
            clip_grad=0.0,  # clipped before, by bundle
            check_grad_overflow=False,
            compute_grad_norm=False,
            partition_grads=stage == 2,
        )
        for hook in self._zero._grad_acc_hooks:  # gradients come by `step`
            hook.remove()
        self._zero._hp_optimizer_states_linked = True  # its debugging views, which want every group to have stepped
        self._found: dict[int, dict[str, Any]] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step the parts whose parameters have gradients, the same on every process, and share the new weights.

        Raises:
            RuntimeError: a part of which some parameters have a gradient and some have none.
        """
        zero, live = self._zero, set()
        for number, part in enumerate(self._parts):
            have = [p.grad is not None for p in part]
            if any(have):
                live.add(number)
                if not all(have):
                    raise RuntimeError(
                        f"{self._owners[number]!r} got gradients for {sum(have)} of its {len(part)} weights; ZeRO "
                        "steps all of them or none. Train without it, or let all layers take part (no alpha of 0)."
                    )
        for group, parts in zip(self.param_groups, self._part_of):
            for number in parts:
                self._inner.param_groups[number].update(_fields(group))
        zero.live = frozenset(live)
        zero.refresh_fp32_params()  # what was loaded into the model since
        for number in range(len(self._parts)):
            mine = zero.params_in_partition[number]
            zero.all_grad_tensors[number] = zero.get_all_grad_tensors(mine, torch.float32)
            zero.averaged_gradients[number] = zero.get_flat_partition(
                mine,
                zero.first_offset[number],
                zero.partition_size[number],
                dtype=torch.float32,
                device=self._parts[number][0].device,
                param_group_idx=number,
                return_tensor_list=True,
            )
        zero.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer, of the model's parameters."""
        self._zero.zero_grad(set_to_none)

    # ---- the state, whole ----

    def _places(self, number: int) -> Iterator[tuple[nn.Parameter, int]]:
        """The parameters of a part and where each begins in its vector."""
        offset = 0
        for p in self._parts[number]:
            yield p, offset
            offset += p.numel()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every process has the state of all, for `state_dict`. All of them must enter."""
        self._gather()
        try:
            yield
        finally:
            self._found = None

    @torch.no_grad()
    def _gather(self) -> None:
        self._found = {}
        world = dist.get_world_size()
        for number, group in enumerate(self._inner.param_groups):
            state = self._inner.state.get(group["params"][0], {})
            whole: dict[str, Any] = {}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    pieces = [torch.empty_like(value) for _ in range(world)]
                    dist.all_gather(pieces, value.contiguous())
                    whole[key] = torch.cat(pieces).cpu()
                else:
                    whole[key] = value
            for p, offset in self._places(number) if state else ():
                self._found[id(p)] = {
                    key: value[offset : offset + p.numel()].view(p.shape).clone() if _long(value) else _copy(value)
                    for key, value in whole.items()
                }

    def state_dict(self) -> dict[str, Any]:
        """As the given optimizer's would be.

        Raises:
            RuntimeError: it has stepped, and this is not called inside of `gathered`.
        """
        if self._found is None and self._inner.state:
            raise RuntimeError("the state lies on several processes: let all of them enter gathered() first.")
        found = self._found or {}
        groups: list[dict[str, Any]] = []
        state: dict[int, Any] = {}
        count = 0
        for group, whole in zip(self.param_groups, self._whole):
            groups.append({**_fields(group), "params": list(range(count, count + len(whole)))})
            state |= {count + i: found[id(p)] for i, p in enumerate(whole) if id(p) in found}
            count += len(whole)
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a whole state, each process its part.

        Raises:
            ValueError: it is of other parameters; it has stepped some weights of a part and not others.
        """
        given = [len(g["params"]) for g in state_dict["param_groups"]]
        if given != (mine := [len(g) for g in self._whole]):
            raise ValueError(f"the optimizer's state is of groups of {given} parameters, but these are {mine}.")
        numbers = (n for g in state_dict["param_groups"] for n in g["params"])
        found = {id(p): state_dict["state"].get(n) for p, n in zip((p for g in self._whole for p in g), numbers)}
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for saved, group, parts in zip(state_dict["param_groups"], self.param_groups, self._part_of):
            group.update(_fields(saved))
            for number in parts:
                groups.append({**saved, "params": [number]})
                values = [found[id(p)] for p in self._parts[number]]
                if any(values) and not all(values):
                    raise ValueError(
                        f"the optimizer has stepped some weights of {self._owners[number]!r} and not others, but ZeRO "
                        "steps all of them or none; go on without it."
                    )
                if values[0]:
                    state[number] = {key: self._cut(number, key, found) for key in values[0]}
        self._inner.load_state_dict({"state": state, "param_groups": groups})

    def _cut(self, number: int, key: str, found: Mapping[int, Any]) -> Any:
        """This process's part of one entry of the state."""
        first = found[id(self._parts[number][0])][key]
        if key == "step" or not isinstance(first, Tensor) or first.shape != self._parts[number][0].shape:
            return _copy(first)
        size, rank = int(self._zero.partition_size[number]), dist.get_rank()
        vector = torch.zeros(size * dist.get_world_size(), dtype=torch.float32, device=first.device)
        for p, offset in self._places(number):
            vector[offset : offset + p.numel()] = found[id(p)][key].reshape(-1)
        return vector[rank * size : (rank + 1) * size].clone()


def _fields(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's rate, decay, ..."""
    return {key: value for key, value in group.items() if key != "params"}


def _long(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
