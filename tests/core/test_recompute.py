"""Gradient checkpointing where a block's hooks are recomputed with it, as in transformers before 5.23.

The real old release is run by `python3 run.py compat`; here a block of the installed one is made to do the same.
"""

from functools import partial

import pytest
import torch
from models import attached, batch, weights
from torch.utils.checkpoint import checkpoint

from peft_bundles.core import recompute


@pytest.fixture
def old(monkeypatch):
    """Checkpoint whole calls of the tiny model's blocks, hooks included."""
    monkeypatch.setattr(recompute, "HOOKS_RUN_AGAIN", True)

    def enable(model, use_reentrant=False):
        for block in model.get_base_model().model.layers:
            forward = block._call_impl
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)
            block.gradient_checkpointing = False  # the block's own checkpointing of `forward`

            def call(*args, block=block, forward=forward, **kwargs):
                return block._gradient_checkpointing_func(partial(forward, **kwargs), *args)

            block._compiled_call_impl = call  # what `block(...)` runs
        return model

    return enable


def gradients(model, context):
    with context(model):
        loss = model(input_ids=batch(2), labels=batch(2)).loss
    loss.backward()
    model.finalize_grads()
    return {n: p.grad for n, p in weights(model).items()}


CONTEXTS = {
    "plain": lambda model: model.alphas({}),
    "alphas": lambda model: model.alphas(b_mlp=0.25, b_linear=[0.0, 2.0]),
    "route": lambda model: model.route(["lm", "policy"]),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=list(CONTEXTS))
def test_recomputed_bundles_have_the_alphas_and_route_of_their_forward(old, context):
    plain, other = gradients(attached().train(), context), gradients(old(attached().train()), context)
    assert any(gradient is not None for gradient in plain.values())
    for name, gradient in plain.items():
        assert (gradient is None) == (other[name] is None), name
        assert gradient is None or torch.allclose(gradient, other[name], rtol=1e-4, atol=1e-6), name


def test_re_entrant_checkpointing_is_refused_where_it_would_lose_the_call(old):
    model = old(attached().train(), use_reentrant=True)
    for block in model.get_base_model().model.layers:
        block.gradient_checkpointing = True
    for call in (lambda: model.route("lm"), lambda: model.alphas(b_mlp=0.5)):
        with pytest.raises(RuntimeError, match=r'use_reentrant": False'), call():
            pass
