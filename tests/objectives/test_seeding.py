"""Draws and seeds are functions of their key."""

import pytest
import torch

from peft_bundles.objectives.batches import Share
from peft_bundles.objectives.seeding import draw, seed_of, seeded


@pytest.mark.parametrize("size", [1, 5, 8])
def test_a_walk_visits_every_row_once_a_pass_and_may_be_cut_anywhere(size):
    whole = draw(size, 0, 4 * size, 7, "lm")
    passes = [whole[i : i + size] for i in range(0, 4 * size, size)]
    assert all(sorted(numbers) == list(range(size)) for numbers in passes)
    assert size < 5 or len({tuple(numbers) for numbers in passes}) > 1  # shuffled anew
    for start in range(2 * size):
        assert draw(size, start, size + 1, 7, "lm") == whole[start : start + size + 1]


def test_another_key_is_another_order_and_another_seed():
    assert draw(50, 0, 50, 7, "lm") != draw(50, 0, 50, 7, "logic") != draw(50, 0, 50, 8, "logic")
    assert seed_of(1, "lm") == seed_of(1, "lm") != seed_of("1", "lm")


def test_numbers_after_a_seeded_block_are_those_without_it():
    torch.manual_seed(3)
    plain = torch.rand(4)
    torch.manual_seed(3)
    with seeded(torch.device("cpu"), "head", "lm"):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), plain) and not torch.equal(inside, plain)
    with seeded(torch.device("cpu"), "head", "lm"):
        assert torch.equal(torch.rand(4), inside)


def test_rows_of_a_step_are_those_of_all_processes():
    assert Share(rows=3, accumulation=2, rank=1, world=4).step_rows == 24
