"""The second data file of the learning study shares nothing with the first."""

import copy
import zlib

import pytest

from studies.data.logic import FAMILIES
from studies.data.mem import biographies
from studies.quality import confirm_data
from studies.quality.make_data import apart


pytestmark = pytest.mark.studies


def file_of(mark):
    """A data file in small; `mark` is in everything."""
    pairs = [[f"question {mark}?", f"answer {mark}"]]
    part = {"biographies": pairs, "codes": pairs, "gsm": pairs, "reasoning": {f"family {mark}": pairs}}
    line = f"a line of more than thirty characters, {mark}"
    return {
        "train": {**part, "plays": [f"{line}, a play"]},
        "test": {**part, "plays": [f"{line}, another play"]},
        "known": {f"known {mark}": [[f"fact {mark}", "x"]]},
        "domains": {f"domain {mark}": [f"{line}, a domain"]},
        "calibration": {"generic": [f"{line}, calibration"]},
    }


def test_files_that_share_nothing_are_apart():
    apart(file_of("one"), file_of("two"))


@pytest.mark.parametrize(
    ("kind", "put"),
    {
        "question": lambda data, other: data["test"]["codes"].append(other["train"]["gsm"][0]),
        "question ": lambda data, other: data["known"].update({"more": [other["known"]["known one"][0]]}),
        "family": lambda data, other: data["train"]["reasoning"].update({"family one": []}),
        "kind of known facts": lambda data, other: data["known"].update({"known one": []}),
        "a domain": lambda data, other: data["domains"].update({"domain one": []}),
        "shares a line": lambda data, other: data["domains"]["domain two"].extend(other["domains"]["domain one"]),
        "shares a line ": lambda data, other: data["domains"]["domain two"].extend(other["train"]["plays"]),
        "line of calibration": lambda data, other: data["calibration"]["generic"].extend(
            other["calibration"]["generic"]
        ),
    }.items(),
)
def test_files_that_share_something_are_refused(kind, put):
    first, second = file_of("one"), file_of("two")
    put(second, copy.deepcopy(first))
    for one, other in ((first, second), (second, first)):
        with pytest.raises(ValueError, match=kind.strip()):
            apart(one, other)


def test_the_families_and_facts_of_the_second_file_are_others():
    families = {*confirm_data.FAMILIES, confirm_data.IN_WORDS}
    assert len(confirm_data.FAMILIES) == 5 and families.isdisjoint({*FAMILIES, "gsm_symbolic"})
    ships, marks, people = confirm_data.ships(), confirm_data.shelf_marks(), biographies()
    asked = [question for question, _ in (*ships, *marks)]
    assert len(asked) == len({*asked}) == 600 and {*asked}.isdisjoint(question for question, _ in people)
    assert {answer for _, answer in ships}.isdisjoint(answer for _, answer in people)
    assert len({mark for _, mark in marks}) == 300  # none can be inferred from another
    assert confirm_data.ships() == ships and confirm_data.shelf_marks() == marks


def test_novels_are_read_out_of_rs_database(tmp_path, monkeypatch):
    def vector(lines):
        return b"X\nhead" + b"".join(b"\x00\x04\x00\x09" + len(x).to_bytes(4, "big") + x for x in lines) + b"\xfe end"

    folder = tmp_path / "usr/lib/R/site-library/janeaustenr/data"
    folder.mkdir(parents=True)
    books = ([b"EMMA", b"", b"Emma Woodhouse, handsome"], [b"PERSUASION", b"x" * 300])
    packed = [zlib.compress(vector(lines)) for lines in books]
    (folder / "Rdata.rdb").write_bytes(b"".join(b"size" + one for one in packed))
    monkeypatch.setattr(confirm_data, "debian", lambda package: tmp_path)
    assert confirm_data.novels() == {
        "EMMA 00000": "EMMA\n\nEmma Woodhouse, handsome",
        "PERSUASION 00000": "PERSUASION\n" + "x" * 300,
    }
