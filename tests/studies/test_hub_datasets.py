"""The sources of the Hub behind `data.load`, against a server on loopback that has tiny files of their real schema.

Columns and configs of trivia_qa are those of its card's `dataset_info` (rc.nocontext, the same features as rc); of
gsm8k (question, answer; main and socratic) and nq_open (question, a list of answers) they are from memory of the cards.
"""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from studies.data import SOURCES, check_leaks, gsm8k, load
from studies.data import families as families_module


pytestmark = pytest.mark.studies
TEXTS = pa.list_(pa.string())
SOLVED = pa.schema([("question", pa.string()), ("answer", pa.string())])
PAGES = pa.struct([(name, TEXTS) for name in ("doc_source", "filename", "title", "wiki_context")])
RESULTS = pa.struct(
    [(name, pa.list_(pa.int32()) if name == "rank" else TEXTS)
     for name in ("description", "filename", "rank", "title", "url", "search_context")]
)  # fmt: skip
ANSWER = pa.struct(
    [(name, TEXTS if "aliases" in name else pa.string())
     for name in ("aliases", "normalized_aliases", "matched_wiki_entity_name", "normalized_matched_wiki_entity_name",
                  "normalized_value", "type", "value")]
)  # fmt: skip
ASKED = pa.schema(
    [*((name, pa.string()) for name in ("question", "question_id", "question_source")),
     ("entity_pages", PAGES), ("search_results", RESULTS), ("answer", ANSWER)]
)  # fmt: skip
OPEN = pa.schema([("question", pa.string()), ("answer", TEXTS)])


def solved(number):
    return {"question": f"Ann has {number} and buys 2.", "answer": f"{number} + 2 = {number + 2}\n#### {number + 2:,}"}


def asked(number):
    value = {"value": f"City {number}", "aliases": [f"City {number}", f"Town {number}"], "type": "WikipediaEntity"}
    nothing = {name: [] for name in ("description", "filename", "rank", "title", "url", "search_context")}
    return {"question": f"Which city is number {number}?", "question_id": f"tc_{number}", "question_source": "x",
            "entity_pages": {name: [] for name in ("doc_source", "filename", "title", "wiki_context")},
            "search_results": nothing, "answer": value}  # fmt: skip


def natural(number):
    return {"question": f"who was king {number}", "answer": [f"King {number}", f"The {number}th"]}


# source -> repository, {config: its splits}, the config that is read, schema, a row of a number
HELD = {
    "gsm8k": ("openai/gsm8k", dict.fromkeys(("main", "socratic"), ("train", "test")), "main", SOLVED, solved),
    "trivia_qa": (
        "mandarjoshi/trivia_qa", dict.fromkeys(("rc", "rc.nocontext"), ("train", "validation", "test")), "rc.nocontext",
        ASKED, asked,
    ),
    "nq_open": ("google-research-datasets/nq_open", {"nq_open": ("train", "validation")}, "nq_open", OPEN, natural),
}  # fmt: skip


@pytest.fixture
def sets(hub, tmp_path, monkeypatch):
    """An empty Hub, and no cache of datasets."""
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(f"datasets.config.{name}", str(tmp_path / name))
    families_module._parts.cache_clear()
    yield hub
    families_module._parts.cache_clear()


def publish(hub, name, rows=None, *, schema=None, configs=None, **fields):
    """A source's repository with four training rows and three held out, the first of them in other case in training."""
    repo, real, read, its_schema, row = HELD[name]
    files, lines = {}, ["---", "configs:"]
    for config, splits in (configs or real).items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            made = [row(i) for i in ((1, 2, 3, 4) if split == "train" else (5, 6, 7))]
            if rows is not None and config == read:
                made = rows(made, split)
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(made, schema=schema or its_schema), file)
            files[f"{config}/{split}-00000-of-00001.parquet"] = file.getvalue()
    hub.add(f"datasets/{repo}", {"README.md": "\n".join([*lines, "---", "# A card"]).encode(), **files}, **fields)


def test_every_source_of_the_hub_is_tried_here():
    assert {name for name, source in SOURCES.items() if source.package.startswith("hub ")} == set(HELD)
    assert all(SOURCES[name].package == f"hub {repo}" for name, (repo, *_) in HELD.items())


@pytest.mark.parametrize("name", HELD)
def test_a_source_of_the_hub_gives_rows_with_tags_and_splits(sets, name):
    publish(sets, name)
    train, test = (load(name, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 3)
    tags = {"task": SOURCES[name].task, "topic": None, "source": name}
    assert all(row.items() >= tags.items() for row in train + test)
    row = HELD[name][-1]
    assert {r["question"] for r in train} == {row(i)["question"] for i in (1, 2, 3, 4)}
    found = next(r for r in test if r["question"] == row(5)["question"])
    wanted = {
        "gsm8k": {"answer": "7", "solution": "5 + 2 = 7\n#### 7"},
        "trivia_qa": {"answer": "City 5", "aliases": ["City 5", "Town 5"]},
        "nq_open": {"answer": "King 5", "aliases": ["King 5", "The 5th"]},
    }
    assert found.items() >= wanted[name].items()
    check_leaks(train, test)
    assert load(name, rows=2) == train[:2] and load(name, seed=1) != [] and sets.requests
    asked_for = [r for r in sets.requests if ".parquet" in r]
    assert asked_for and all(f"/{HELD[name][2]}/" in r for r in asked_for)  # no other config was downloaded


@pytest.mark.parametrize("name", HELD)
def test_held_out_questions_that_stand_in_training_are_dropped(sets, name):
    row = HELD[name][-1]
    copy = {**row(5), "question": row(5)["question"].upper()}
    publish(sets, name, lambda rows, split: [*rows, rows[0], copy] if split == "train" else rows)
    train, test = (load(name, split) for split in ("train", "test"))
    assert copy["question"] in {r["question"] for r in train}
    assert {r["question"] for r in test} == {row(i)["question"] for i in (6, 7)}
    check_leaks(train, test)
    assert len({r["question"] for r in train}) == len(train)  # none twice


# ---- failures: one line that names the source and what to do ----


def failure(name):
    with pytest.raises(RuntimeError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith(f"source {name!r}: the Hub's {HELD[name][0]} (") and "\n" not in message
    return message


@pytest.mark.parametrize("name", HELD)
def test_a_source_that_is_gone_or_private(sets, monkeypatch, name):
    assert "could not be read (DatasetNotFoundError" in failure(name)
    publish(sets, name, private=True)
    monkeypatch.delenv("HF_TOKEN")
    message = failure(name)  # 401
    assert "it is private, gated or gone: look at its page, and log in with `hf auth login`" in message
    monkeypatch.setenv("HF_TOKEN", "nonsense")
    assert "log in with `hf auth login`" in failure(name)
    monkeypatch.setenv("HF_TOKEN", "reads")
    assert len(load(name)) == 4  # nothing of the failures was kept


@pytest.mark.parametrize("name", HELD)
def test_no_network(sets, monkeypatch, name):
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}"
    )
    assert "is there a network? Other sources need none" in failure(name)
    assert not sets.requests


@pytest.mark.parametrize("how", [500, "cut"])
def test_a_server_that_fails_while_it_sends_the_file(sets, how):
    publish(sets, "nq_open")
    sets.fail(r"GET .*\.parquet", how, times=100)
    message = failure("nq_open")
    assert "could not be read (" in message and message.endswith(".")


def test_a_config_or_split_that_is_no_longer_there(sets):
    publish(sets, "gsm8k", configs={"socratic": ("train", "test")})
    assert "openai/gsm8k (main, train)" in failure("gsm8k")
    assert "its configs or splits are no longer those this version knows: update peft_bundles" in failure("gsm8k")
    publish(sets, "nq_open", configs={"nq_open": ("train",)})
    message = failure("nq_open")
    assert "(validation)" in message and "update peft_bundles" in message


@pytest.mark.parametrize("name", HELD)
def test_columns_that_were_renamed(sets, name):
    schema = HELD[name][3]
    renamed = schema.set(schema.get_field_index("question"), pa.field("query", pa.string()))
    publish(sets, name, lambda rows, split: [{**row, "query": row["question"]} for row in rows], schema=renamed)
    message = failure(name)
    assert "has the columns ['query'" in message and "no ['question']: it was changed; update peft_bundles" in message


def test_an_answer_of_another_form(sets):
    """nq_open with one text for an answer instead of a list: its first letter would be the answer."""
    publish(sets, "nq_open", lambda rows, split: [{**row, "answer": row["answer"][0]} for row in rows], schema=SOLVED)
    assert "its rows have another form" in failure("nq_open")


def test_gsm8k_by_itself_says_the_same(sets):
    with pytest.raises(RuntimeError, match=r"the Hub's openai/gsm8k \(main, test\) could not be read"):
        gsm8k(None, "test")
    publish(sets, "gsm8k")
    assert [row["answer"] for row in gsm8k(None, "test")] == ["7", "8", "9"]
