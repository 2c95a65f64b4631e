"""Routing in two processes is that of one, behind blocks and at linear layers, with and without DDP."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from test_signals import batch, loss_of, make
from torch.nn.parallel import DistributedDataParallel
from training import two_processes

from peft_bundles import BundleSpec, calibrate
from peft_bundles.core.walking import bundle_parameters


PLACED = {
    "l_lm": BundleSpec(rank=3, place="mlp", signals={"lm": 1.0, "policy": 0.3}),
    "l_policy": BundleSpec(rank=2, place=["o_proj", "down_proj"], kind="mlp", signals={"policy": 1.0, "kl": 0.5}),
    "l_kl": BundleSpec(rank=2, place="mlp", signals={"kl": 1.0}),
}


def _alphas(step: int, rows: slice) -> dict:
    """Per token: in step 0 no token selects l_lm, in step 1 one of the last row selects l_kl."""
    tokens = torch.zeros(4, 7)
    tokens[3, 2] = float(step == 1)
    return {} if step == 2 else {"l_lm" if step == 0 else "l_kl": tokens[rows], "l_policy": torch.ones(4, 7)[rows]}


def _steps(model, rank: int, world: int, wrap: str, steps: int = 3) -> list[set[str]]:
    """Three AdamW steps; each rank sees its share of the rows, and step 1 has a signal that only rank 0 sees.

    Returns the bundles that each step has moved.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    plans = [["lm", "policy", "lm", "policy"], ["lm", "value", "kl", "kl"], [("policy", "kl")] * 4]
    trainer, moved = model, []
    if wrap != "none":
        trainer = DistributedDataParallel(model, find_unused_parameters=wrap == "ddp")
    for step, plan in enumerate(plans[:steps]):
        if wrap == "ddp" and step == 2:
            break  # several backwards under plain DDP are what no_sync is for
        optimizer.zero_grad()
        share = slice(rank * 4 // world, (rank + 1) * 4 // world)
        rows, ids = plan[share], batch(4)[share]
        context = trainer.no_sync() if wrap == "no_sync" else torch.enable_grad()
        with context:
            with model.route(rows):
                logits = trainer(ids, alphas=_alphas(step, share)).logits
            if step == 2:
                model.routed_backward({s: loss_of(s, logits) * world / 4 for s in plan[0]})
            else:
                (sum(loss_of(s, logits[i : i + 1]) for i, s in enumerate(rows)) * world / 4).backward()
        model.finalize_grads(reduce=wrap != "ddp")
        table = bundle_parameters(model)
        before = {name: [p.detach().clone() for p in ps] for (_, name), ps in table.items()}
        optimizer.step()
        moved.append({name for (_, name), ps in table.items() if not all(map(torch.equal, before[name], ps))})
    return moved


def _everywhere():
    """Bundles behind blocks and at linear layers, with a penalty on kept states."""
    model = make("llama", placed=PLACED, quiet=5.0)
    calibrate(model, tokens=256, max_length=32, states_only=True, progress=False)
    return model.train()


def worker(wrap: str, rank: int, folder: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = _everywhere()
    moved = _steps(model, rank, 2, wrap)
    flags = {k: [p.grad is None for p in ps] for k, ps in bundle_parameters(model).items()}
    torch.save({"state": model.state_dict(), "none": flags, "moved": moved}, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["none", "no_sync", "ddp"])
def test_two_processes_equal_one(tmp_path, wrap):
    first, second = two_processes(partial(worker, wrap), tmp_path)
    assert first["none"] == second["none"]
    assert all(torch.equal(first["state"][k], second["state"][k]) for k in first["state"])
    alone = _everywhere()
    moved = [
        {"b_lm", "b_both", "b_policy", "l_policy"},
        {"b_lm", "b_both", "b_value", "b_anchor", "l_lm", "l_policy", "l_kl"},
        {"b_both", "b_policy", "b_anchor", "l_lm", "l_policy", "l_kl"},
    ][: 2 if wrap == "ddp" else 3]
    assert first["moved"] == second["moved"] == _steps(alone, 0, 1, "none", steps=len(moved)) == moved
    expected = {k: [p.grad is None for p in ps] for k, ps in bundle_parameters(alone).items()}
    assert first["none"] == expected and any(any(f) for f in expected.values())
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(first["state"][key], value, rtol=1e-8, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")
