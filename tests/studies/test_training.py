"""The training loop is AdamW's, whatever is fixed, clipped or captured; rows keep what they hold; records are whole."""

import json
import random
from pathlib import Path

import pytest
import torch

from studies import records, workers
from studies.rows import Draws, Rows, batches_of, rows_of, stack, widen
from studies.training import Training, row_loss, warmup_decay


pytestmark = pytest.mark.studies
ITEMS = [([5, 6, 7], 1), ([5, 6, 7, 8, 9], 3), ([4, 4], 1)]


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def inputs(steps=5):
    return [(torch.randn(4, 3, generator=torch.Generator().manual_seed(n)),) for n in range(steps)]


def gradients(net):
    def made(x):
        loss = (net(x) - x[:, :2]).square().sum()
        loss.backward()
        return loss.detach()

    return made


def test_it_is_a_plain_loop_of_adamw():
    ours, plain = model(), model()
    training = Training([[ours.weight], [ours.bias]], gradients(ours), decay=0.1, clip=0.5)
    seen = []
    training.run(inputs(), lambda n: [0.01 * (n + 1), 0.02], lambda done, loss: seen.append((done, float(loss))))
    optimizer = torch.optim.AdamW([{"params": [plain.weight]}, {"params": [plain.bias]}], weight_decay=0.1)
    wanted = []
    for n, (x,) in enumerate(inputs()):
        optimizer.zero_grad()
        loss = (plain(x) - x[:, :2]).square().sum()
        loss.backward()
        for group, lr in zip(optimizer.param_groups, (0.01 * (n + 1), 0.02)):
            group["lr"] = lr
            torch.nn.utils.clip_grad_norm_(group["params"], 0.5)  # each group by its own norm
        optimizer.step()
        wanted.append((n + 1, float(loss.detach())))
    assert seen == wanted
    assert torch.equal(ours.weight, plain.weight) and torch.equal(ours.bias, plain.bias)


def test_fixed_batches_give_the_same_steps_and_a_second_run_begins_anew():
    stacked = stack([rows_of([item], 8) for item in ITEMS])

    def trained(fixed, runs=1):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10))
        start = [p.detach().clone() for p in net.parameters()]

        def step(rows):
            loss = row_loss(net(rows.ids).flatten(0, 1)[rows.where], rows)
            loss.backward()
            return loss.detach()

        training = Training([net.parameters()], step, fixed=[stacked.at(0)] if fixed else ())
        for _ in range(runs):
            with torch.no_grad():
                for parameter, value in zip(net.parameters(), start):
                    parameter.copy_(value)
            assert training.run(batches_of(stacked), lambda n: [0.1]) == 3
        return [p.detach() for p in net.parameters()], start

    free, start = trained(False)
    for found in (trained(True)[0], trained(True, runs=2)[0]):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, free))
    assert not any(torch.equal(a, b) for a, b in zip(free, start))


def test_after_ends_the_run_and_update_replaces_the_step():
    net = model()
    before = net.weight.detach().clone()
    training = Training([net.parameters()], gradients(net), update=lambda optimizer: None)
    assert training.run(inputs(), lambda n: [1.0], lambda done, loss: done == 2) == 2
    assert torch.equal(net.weight, before)


def test_the_rate_warms_up_and_falls():
    shares = [warmup_decay(n, 10, 4) for n in range(10)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0] and shares[4] == 1.0
    assert shares[4:] == sorted(shares[4:], reverse=True) and 0 < shares[-1] < 0.2
    assert warmup_decay(0, 1, 10) == 0.1


# ---- rows ----


def test_batches_of_one_shape_hold_what_their_rows_hold():
    def same(batch):
        flat, counted = batch.ids.flatten(), batch.weight > 0
        assert torch.equal(flat[batch.where[counted] + 1], batch.target[counted])
        assert torch.equal(batch.where[counted] // batch.ids.shape[1], batch.row[counted])
        assert batch.weight.sum() == pytest.approx(len(batch.ids))

    rows = Draws({"a": ITEMS}, {"a": random.Random(0)}).batches(["a", "a"], 3, 8)
    assert rows.ids.shape == (3, 2, 5)
    for [batch] in batches_of(rows):
        same(batch)
    drawn = [tuple(row[row > 0].tolist()) for row in rows.ids.flatten(0, 1)]
    assert sorted(drawn) == sorted(2 * [tuple(tokens) for tokens, _ in ITEMS])
    assert len({*drawn[:3]}) == 3  # each once before any twice
    wide = widen(rows, 8, 6)
    assert wide.ids.shape == (3, 2, 8) and wide.where.shape == (3, 6)
    for [batch] in batches_of(wide):
        same(batch)


def test_every_row_has_the_same_weight_in_the_loss():
    rows = rows_of(ITEMS, 8)
    logits = torch.randn(len(rows.where), 10, generator=torch.Generator().manual_seed(0))
    losses = torch.nn.functional.cross_entropy(logits, rows.target, reduction="none")
    means = torch.stack([losses[rows.row == n].mean() for n in range(3)])
    torch.testing.assert_close(row_loss(logits, rows), means.mean())
    assert isinstance(rows.to("cpu"), Rows)


# ---- records and workers ----


def test_records_are_appended_read_and_resumed_by_key(tmp_path):
    path = tmp_path / "new" / "cells.jsonl"
    assert records.read(path) == [] and records.done(path, lambda r: r["seed"]) == set()
    for record in ({"seed": 0}, {"seed": 1, "error": "x"}, {"seed": 2, **records.made_by("python x.py", device="cpu")}):
        records.append(path, record)
    assert [r["seed"] for r in records.read(path)] == [0, 1, 2]
    assert records.done(path, lambda r: r["seed"]) == {0, 2}
    last = records.read(path)[-1]
    assert last["command"] == "python x.py" and last["versions"]["torch"] == torch.__version__
    assert last["device"].startswith("CPU")


def test_a_record_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "record.json"
    records.write(path, {"a": 1})
    with pytest.raises(TypeError):
        records.write(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and [*tmp_path.iterdir()] == [path]


def test_a_cell_has_one_claimant(tmp_path):
    folder = workers.clear(tmp_path / "claims")
    assert workers.claim(folder / "a") and not workers.claim(folder / "a") and workers.claim(folder / "b")
    assert workers.claim(workers.clear(folder) / "a")


def test_workers_are_numbered_and_the_worst_status_comes_back(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys, pathlib\nn = sys.argv[-1]\npathlib.Path(sys.argv[1], n).touch()\nsys.exit(int(n))")
    assert workers.start([str(program), str(tmp_path)], 2) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"program.py", "0", "1"}


def test_no_program_edits_the_import_path():
    """Programs run from an installed checkout; a child process would not find what only its parent's path has."""
    root = Path(__file__).parents[2]
    edits = []
    for folder in ("recipes", "studies", "benchmarks", "examples", "tests/studies"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if "sys." + "path.insert" in text or 'setattr(sys, "' + 'path"' in text:
                edits.append(path.relative_to(root).as_posix())
    assert edits == ["studies/measures/code.py"]  # inside the isolated process that runs completions
