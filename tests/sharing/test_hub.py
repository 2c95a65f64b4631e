"""Bundles in repositories of a Hub that may fail anywhere."""

from __future__ import annotations

import os
import threading

import httpx2
import pytest
import torch
from folders import CONFIG, WEIGHTS, content, loaded, lora, only
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from models import TINY, attached, batch, logits, perturb
from peft import PeftModel

import peft_bundles


def test_push_and_pull(hub, tmp_path):
    model = attached()
    url = peft_bundles.push_bundle(model, "b_mlp", "me/ml", private=True, summary={"steps": 5})
    assert url == f"{hub.url}/me/ml" and hub.repos["me/ml"].private
    assert set(hub.files("me/ml")) == {".gitattributes", CONFIG, WEIGHTS, "README.md"}
    assert len(hub.repos["me/ml"].commits) == 2  # its making, and one commit for all files
    folder = peft_bundles.pull_bundle("me/ml")
    assert torch.allclose(logits(loaded(folder), batch()), only(model, "b_mlp"), atol=1e-5)
    copy = peft_bundles.pull_bundle("me/ml", tmp_path / "copy")
    assert copy == tmp_path / "copy" and {CONFIG, WEIGHTS, "README.md"} == set(os.listdir(copy))
    assert torch.allclose(logits(loaded(copy), batch()), only(model, "b_mlp"), atol=1e-5)
    from_hub = PeftModel.from_pretrained(TINY["llama"](), "me/ml").eval()  # PEFT by itself
    assert torch.allclose(logits(from_hub, batch()), only(model, "b_mlp"), atol=1e-5)


def test_revisions(hub):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    first, sha = only(model, "b_mlp"), hub.repos["me/ml"].branches["main"]
    perturb(model, seed=3)
    peft_bundles.push_bundle(model, "b_mlp", "me/ml", revision="v2")
    for source, wanted in (
        ("me/ml", first),
        ("me/ml@v2", only(model, "b_mlp")),
        (f"me/ml@{sha}", first),
        ("me/ml@v2:b_mlp", only(model, "b_mlp")),
    ):
        composed = peft_bundles.compose(TINY["llama"](), [source])
        assert torch.allclose(logits(composed, batch()), wanted, atol=1e-5), source
    with pytest.raises(RevisionNotFoundError):
        peft_bundles.pull_bundle("me/ml@v3")


def test_one_bundle_of_a_whole_adapter(hub, tmp_path):
    model = attached()
    model.save_pretrained(tmp_path / "whole")
    hub.add("you/whole", content(tmp_path / "whole"))
    for source in (f"{tmp_path}/whole:b_linear", "you/whole:b_linear"):
        composed = peft_bundles.compose(TINY["llama"](), [source])
        assert torch.allclose(logits(composed, batch()), only(model, "b_linear"), atol=1e-5)
        peft_bundles.pull_bundle(source, tmp_path / "one")
        assert torch.allclose(logits(loaded(tmp_path / "one"), batch()), only(model, "b_linear"), atol=1e-5)
        with pytest.raises(ValueError, match="one bundle of 3 in one file; give a folder="):
            peft_bundles.pull_bundle(source)
        with pytest.raises(ValueError, match=r"has no bundle 'b_x'; name one of \['b_mlp'"):
            peft_bundles.pull_bundle(source.replace("b_linear", "b_x"), tmp_path / "none")
    assert torch.allclose(
        logits(peft_bundles.compose(TINY["llama"](), ["you/whole"]), batch()), logits(model, batch()), atol=1e-5
    )


def test_name_clashes_on_the_hub(hub, tmp_path):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    before = hub.files("me/ml")
    with pytest.raises(ValueError, match=r"me/ml holds \['b_mlp'\]; push 'b_diag' to another repository"):
        peft_bundles.push_bundle(model, "b_diag", "me/ml")
    lora(tmp_path / "lora")
    hub.add("me/lora", content(tmp_path / "lora"))
    with pytest.raises(ValueError, match="is an adapter of type 'LORA'"):
        peft_bundles.push_bundle(model, "b_diag", "me/lora")
    assert hub.files("me/ml") == before and hub.files("me/lora") == content(tmp_path / "lora")


def test_rights(hub, monkeypatch, tmp_path):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/private", private=True)
    before = dict(hub.repos["me/private"].commits)
    for token, error, status in (("wrong", HfHubHTTPError, 401), ("reads", HfHubHTTPError, 403)):
        with pytest.raises(error) as caught:
            peft_bundles.push_bundle(model, "b_mlp", "me/private", token=token)
        assert caught.value.response.status_code == status
        with pytest.raises(error):
            peft_bundles.push_bundle(model, "b_mlp", "me/new", token=token)
    assert hub.repos.keys() == {"me/private"} and hub.repos["me/private"].commits == before
    assert peft_bundles.pull_bundle("me/private", tmp_path / "read", token="reads")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        peft_bundles.pull_bundle("me/private")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        peft_bundles.pull_bundle("me/private", token="wrong")
    with pytest.raises(RepositoryNotFoundError):
        peft_bundles.pull_bundle("me/nothing", token="reads")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_hub_is_busy_for_a_moment(status, hub, tmp_path):
    """huggingface_hub tries again; what arrives is whole."""
    model = attached()
    for request in ("preupload", "objects/batch", "PUT", "verify"):
        hub.fail(request, status)
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    assert all(times == 0 for *_, times in hub.failures)
    if status == 429:
        hub.fail("GET .*resolve.*safetensors", status)
    folder = peft_bundles.pull_bundle("me/ml", tmp_path / "copy")
    assert all(times == 0 for *_, times in hub.failures)
    assert torch.allclose(logits(loaded(folder), batch()), only(model, "b_mlp"), atol=1e-5)


FAILING_UPLOADS = [
    ("repos/create", 500),
    ("preupload", 403),
    ("objects/batch", 500),
    ("PUT", 500),
    ("PUT", "cut"),
    ("verify", 404),
    ("commit", 500),
]


@pytest.mark.parametrize(("request_", "how"), FAILING_UPLOADS)
def test_an_upload_that_fails_changes_nothing(request_, how, hub):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    before = hub.files("me/ml")
    perturb(model, seed=3)
    changed = only(model, "b_mlp")
    hub.fail(request_, how, times=100)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    assert hub.files("me/ml") == before
    assert torch.equal(only(model, "b_mlp"), changed)
    hub.failures.clear()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")  # and then it goes through
    assert torch.allclose(logits(loaded(peft_bundles.pull_bundle("me/ml")), batch()), changed, atol=1e-5)


FAILING_DOWNLOADS = [
    ("api/models", 500),
    ("resolve.*config", 500),
    ("GET .*safetensors", "cut"),
    ("GET .*safetensors", 500),
]


@pytest.mark.parametrize(("request_", "how"), FAILING_DOWNLOADS)
def test_a_download_that_fails_leaves_the_earlier_copy_and_model(request_, how, hub, tmp_path):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    copy = peft_bundles.pull_bundle("me/ml", tmp_path / "copy")
    before = content(copy)
    perturb(model, seed=3)
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    composed = peft_bundles.compose(TINY["llama"](), [copy])
    old = logits(composed, batch())
    hub.fail(request_, how, times=1000)
    revision = hub.repos["me/ml"].branches["main"]  # not in the cache, as the branch is
    for action in (
        lambda: peft_bundles.pull_bundle(f"me/ml@{revision}", copy),
        lambda: peft_bundles.load_bundle(composed, f"me/ml@{revision}", replace=True),
        lambda: peft_bundles.compose(TINY["llama"](), [f"me/ml@{revision}"]),
    ):
        with pytest.raises((OSError, httpx2.TransportError)):  # HfHubHTTPError is an OSError
            action()
    assert content(copy) == before
    assert torch.equal(logits(composed, batch()), old)
    hub.failures.clear()
    peft_bundles.pull_bundle(f"me/ml@{revision}", copy)  # the next attempt goes through
    assert torch.allclose(logits(loaded(copy), batch()), only(model, "b_mlp"), atol=1e-5)


def test_a_download_that_is_cut_is_resumed(hub):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    hub.fail("GET .*safetensors", "cut", times=2)
    folder = peft_bundles.pull_bundle("me/ml")
    assert torch.allclose(logits(loaded(folder), batch()), only(model, "b_mlp"), atol=1e-5)
    assert sum("GET" in r and "safetensors" in r for r in hub.requests) == 3


def test_content_that_was_changed_on_the_way_is_fetched_again(hub):
    """Of the right length, which is all that huggingface_hub looks at."""
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    hub.fail("GET .*safetensors", "corrupt")
    folder = peft_bundles.pull_bundle("me/ml")
    assert torch.allclose(logits(loaded(folder), batch()), only(model, "b_mlp"), atol=1e-5)
    hub.add("me/other", hub.files("me/ml"))
    hub.fail("GET .*other.*safetensors", "corrupt", times=100)
    with pytest.raises(ValueError, match="not those that were saved"):
        peft_bundles.pull_bundle("me/other")


def test_two_writers_at_once(hub):
    """The one who commits second on the same head is told; no revision has files of both."""
    one, two = attached(), perturb(attached(), seed=5)
    peft_bundles.push_bundle(one, "b_mlp", "me/ml")
    perturb(one, seed=8)
    hub.on["POST /api/models/me/ml/preupload"] = lambda: peft_bundles.push_bundle(two, "b_mlp", "me/ml")
    with pytest.raises(RuntimeError, match="somebody else pushed to me/ml at the same time"):
        peft_bundles.push_bundle(one, "b_mlp", "me/ml")
    assert torch.allclose(logits(loaded(peft_bundles.pull_bundle("me/ml")), batch()), only(two, "b_mlp"), atol=1e-5)
    peft_bundles.push_bundle(one, "b_mlp", "me/ml")
    assert torch.allclose(logits(loaded(peft_bundles.pull_bundle("me/ml")), batch()), only(one, "b_mlp"), atol=1e-5)


def test_many_writers_at_once_leave_whole_revisions(hub):
    models = [perturb(attached(), seed=i) for i in range(4)]
    peft_bundles.push_bundle(models[0], "b_mlp", "me/ml")
    outcomes = []

    def push(model):
        try:
            peft_bundles.push_bundle(model, "b_mlp", "me/ml")
            outcomes.append("pushed")
        except RuntimeError:
            outcomes.append("told")

    threads = [threading.Thread(target=push, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4 and "pushed" in outcomes
    wanted = [only(model, "b_mlp") for model in models]
    for sha, files in hub.repos["me/ml"].commits.items():
        if WEIGHTS in files:
            found = logits(peft_bundles.compose(TINY["llama"](), [f"me/ml@{sha}"]), batch())
            assert any(torch.allclose(found, w, atol=1e-5) for w in wanted)


def test_files_outside_of_the_folder_are_never_written(hub, tmp_path):
    peft_bundles.push_bundle(attached(), "b_mlp", "me/ml")
    hub.add("me/ml", {"../../evil.png": b"x", "/evil.json": b"x", "code.py": b"raise SystemExit"})
    before = set(tmp_path.parent.rglob("*evil*"))
    try:
        peft_bundles.pull_bundle("me/ml", tmp_path / "copy")
    except (OSError, ValueError) as error:
        assert "evil" in str(error) or ".." in str(error)
    assert set(tmp_path.parent.rglob("*evil*")) == before
    assert not list(tmp_path.rglob("*.py"))


def test_a_second_push_keeps_what_was_written_by_hand(hub):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml", data="old data")
    card = hub.files("me/ml")["README.md"].decode()
    card = card.replace("library_name: peft\n", "library_name: peft\nlicense: mit\n")
    hub.add("me/ml", {"README.md": f"{card}\n## Ethics\n\nBy hand.\n\n```\n## no title\n```\n".encode()})
    perturb(model, seed=3)
    peft_bundles.push_bundle(model, "b_mlp", "me/ml", data="new data")
    pushed = hub.files("me/ml")["README.md"].decode()
    assert pushed.count("## Ethics\n\nBy hand.\n\n```\n## no title\n```") == 1 and "license: mit" in pushed
    assert "new data" in pushed and "old data" not in pushed and pushed.count("## How to load") == 1
    peft_bundles.push_bundle(model, "b_mlp", "me/ml", data="new data")
    assert hub.files("me/ml")["README.md"].decode() == pushed


def test_a_card_of_somebody_else_follows_the_new_one(hub):
    hub.add("me/ml", {"README.md": b"---\nlicense: mit\n---\n# Mine\n\nnothing of yours\n"})
    for _ in range(2):
        peft_bundles.push_bundle(attached(), "b_mlp", "me/ml")
        card = hub.files("me/ml")["README.md"].decode()
        assert card.count("## How to load") == 1 and "license: mit" in card
        assert card.endswith("## Earlier card\n\n# Mine\n\nnothing of yours\n")


@pytest.mark.parametrize("card", [b"---\na: [\n---\nBUNDLE\n", b"\xff\xfe BUNDLE"])
def test_a_damaged_card_is_said(hub, card):
    hub.add("me/ml", {"README.md": card})
    with pytest.raises(ValueError, match=r"README.md cannot be read"):
        peft_bundles.push_bundle(attached(), "b_mlp", "me/ml")
    assert hub.files("me/ml")["README.md"] == card


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_repository_with_a_model_is_left_alone(hub, file):
    hub.add("me/model", {file: b"{}", "README.md": b"# A model"})
    before = hub.files("me/model")
    with pytest.raises(ValueError, match=rf"me/model holds a model \({file}\); push 'b_mlp' to a repository"):
        peft_bundles.push_bundle(attached(), "b_mlp", "me/model")
    assert hub.files("me/model") == before
