"""Sequences of statements with one changed statement, and their controls."""

import random

import pytest

from studies.data.breaks import breaks, changed


pytestmark = pytest.mark.studies


def test_a_break_changes_one_statement_and_its_control_none():
    sequences = [["Anna has 3 hats.", "Ben has 7 jars.", "It is warm."], ["Rain is not cold.", "Sun is hot."]] * 5
    rows = breaks(sequences, seed=1)
    assert len(rows) == 20 and rows == breaks(sequences, seed=1) != breaks(sequences, seed=2)
    for item, sequence in enumerate(sequences):
        control, broken = sorted((r for r in rows if r["item"] == item), key=lambda r: any(r["contradicts"]))
        assert sum(broken["contradicts"]) == 1 and not any(control["contradicts"])
        place = broken["contradicts"].index(True)
        assert place > 0 and control["statements"][place] in sequence[: place + 1]
        without = [[s for i, s in enumerate(r["statements"]) if i != place] for r in (control, broken)]
        assert without == [sequence, sequence]
        assert broken["statements"][place] not in sequence
        assert len(broken["statements"][place].split()) - len(control["statements"][place].split()) in (-1, 0, 1)


def test_what_a_break_does_to_a_statement():
    rng = random.Random(0)
    assert changed("Anna has 3 of 5.", ["3", "5", "8"], rng) in ("Anna has 3 of 3.", "Anna has 3 of 8.")
    assert changed("It is warm.", [], rng) == "It is not warm."
    assert changed("It is not warm.", [], rng) == "It is warm."
    with pytest.raises(ValueError, match=r"numbers=\['3'\] has no other number"):
        changed("3", ["3"], rng)
    with pytest.raises(ValueError, match=r"sequence 1 has no statement with a number or a verb"):
        breaks([["It is."], ["Hello"]])
