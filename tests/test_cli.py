"""The command `peft-bundles` on tiny models in folders, without a network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch
from conftest import HUB
from folders import content, huge_header, lora, pickled
from huggingface_hub import ModelCard
from models import TINY, bundle_config, generated, logits, perturb
from peft import PeftModel, get_peft_model
from training import tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import peft_bundles
import peft_bundles_cli
from peft_bundles.evaluation import alpha_sweep, negative_loss


PROMPT = "the cats sit"
BUNDLES = ["b_mlp", "b_linear", "b_diag"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """base: a tiny Llama with a tokenizer; one: an adapter of three bundles; two: of one, in another basis."""
    root = tmp_path_factory.mktemp("cli")
    TINY["llama"]().save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    for name, fields in (
        ("one", {}),
        ("two", {"bundles": {"b_mlp": {"rank": 5, "sub_bases": ["right"], "signals": {"lm": 1.0}}}, "basis_seed": 1}),
    ):
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        perturb(get_peft_model(base, bundle_config(**fields)), scale=0.8).save_pretrained(root / name)
    (root / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (root / "b.txt").write_text("1 + 1 = 2; 2 + 2 = 4; 3 + 3 = 6; " * 20)
    return root


def run(*args: object, code: int = 0):
    result = CliRunner().invoke(peft_bundles_cli.app, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def said(*args: object) -> dict:
    """What a command says with --json: one object and nothing else on stdout."""
    return json.loads(run(*args, "--json").stdout)


def refused(*args: object, code: int = 1) -> str:
    """The one line on stderr of a command that fails; nothing on stdout."""
    result = run(*args, code=code)
    assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.output
    return result.stderr


def loaded(folders: Path, name: str = "one") -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "base"), folders / name).eval()


def test_report(folders):
    found = said("report", folders / "one", "--angles")
    (adapter,) = found["adapters"].values()
    assert [row["bundle"] for row in adapter["bundles"]] == BUNDLES and found["base"] == str(folders / "base")
    wanted = loaded(folders).bundle_report(angles=True)
    assert [row["parameters"] for row in adapter["bundles"]] == [row["parameters"] for row in wanted.rows]
    assert torch.allclose(torch.tensor(adapter["overlap"]), wanted.overlap.float(), atol=1e-6)
    table = run("report", folders / "one").stdout
    assert all(name in table for name in BUNDLES) and "share of common support" in table
    assert [
        row["bundle"] for row in next(iter(said("report", f"{folders / 'one'}:b_diag")["adapters"].values()))["bundles"]
    ] == ["b_diag"]


def test_generate_dials(folders):
    ids = tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    model = loaded(folders)
    texts = []
    for values in ({}, {"b_mlp": 0.0, "b_linear": 0.5}, dict.fromkeys(BUNDLES, 0.0)):
        options = [word for name, value in values.items() for word in ("--alpha", f"{name}={value}")]
        found = said("generate", folders / "one", "--prompt", PROMPT, "--max-new-tokens", 5, *options)
        wanted = model.generate(ids, alphas=values, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert found["text"] == tokenizer().decode(wanted, skip_special_tokens=True) and found["alphas"] == values
        texts.append(found["text"])
    assert len(set(texts)) > 1
    hot = [
        said("generate", folders / "one", "--prompt", PROMPT, "--temperature", 5, "--seed", s)["text"]
        for s in (0, 0, 1)
    ]
    assert hot[0] == hot[1] != hot[2]
    assert run("generate", folders / "one", "--prompt", PROMPT, "--max-new-tokens", 1).stdout.startswith("t")


def test_route_says_which_bundle_every_token_turns_on(folders, tmp_path):
    model = loaded(folders)
    rows = {"b_mlp": ["the quick brown fox jumps"], "b_linear": ["1 + 1 = 2; 2 + 2 = 4"], "b_diag": ["ABC DEF GHI JKL"]}
    peft_bundles.learn_keys(model, rows, tokenizer(), progress=False)
    model.save_pretrained(tmp_path / "keyed")
    (tmp_path / "nobodys.txt").write_text("\n\n".join("~{}[]^_`@#"[n % 7 :] * 3 for n in range(12)))
    null = tmp_path / "null.safetensors"
    command = ("route", tmp_path / "keyed", "--prompt", "2 + 2 = 4; 1 + 1", "--null", null, "--base", folders / "base")
    assert "does not exist; give --texts FILE" in refused(*command, code=2)
    spoken = said(*command, "--texts", tmp_path / "nobodys.txt")["tokens"]
    assert null.is_file() and said(*command)["tokens"] == spoken
    model.set_null(peft_bundles.Null.load(null))
    model.set_router("keys")
    gates = model.gates(tokenizer()("2 + 2 = 4; 1 + 1", return_tensors="pt")["input_ids"])
    wanted = [",".join(n for n, on in zip(gates.bundles, row) if on) for row in gates.values[0]]
    assert [bundle for _, bundle in spoken] == wanted and "b_linear" in wanted
    assert run(*command).stdout.splitlines()[-1].split("\t")[0] == repr(spoken[-1][0])


def test_compose(folders, tmp_path):
    both = [f"{folders / 'one'}:b_linear", f"{folders / 'one'}:b_mlp"]
    found = said("compose", *both, "--output", tmp_path / "new")
    assert found["adapters"] == [{"folder": str(tmp_path / "new"), "bundles": ["b_linear", "b_mlp"]}]
    ids = torch.arange(4, 20).view(2, 8)
    made = logits(_load(folders, tmp_path / "new"), ids)
    torch.testing.assert_close(made, logits(loaded(folders), ids, alphas={"b_diag": 0.0}), rtol=1e-5, atol=1e-5)

    # Bundles of one name and two bases: renamed when told to, and a folder for each basis.
    assert "both have a bundle 'b_mlp'" in refused(
        "compose", folders / "one", folders / "two", "--output", tmp_path / "x"
    )
    found = said("compose", folders / "one", folders / "two", "--rename", "--output", tmp_path / "mixed")
    assert [a["bundles"] for a in found["adapters"]] == [BUNDLES, ["b_mlp_2"]]
    parts = [a["folder"] for a in found["adapters"]]
    direct = peft_bundles.compose(_base(folders), [str(folders / "one"), str(folders / "two")], rename=True)
    again = peft_bundles.compose(_base(folders), parts)
    assert torch.equal(logits(again, ids), logits(direct, ids))
    assert "exists and is not an empty folder" in refused("compose", folders / "one", "--output", tmp_path / "new")


def _base(folders: Path):
    return AutoModelForCausalLM.from_pretrained(folders / "base").eval()


def _load(folders: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(_base(folders), adapter).eval()


def test_sweep(folders, tmp_path):
    options = ["--bundle", "b_mlp", "--text", f"a={folders / 'a.txt'}", "--text", f"b={folders / 'b.txt'}"]
    options += ["--values", "0,0.5,1", "--alpha", "b_diag=0", "--rows", 4, "--tokens", 16]
    found = said("sweep", folders / "one", *options, "--own", "a", "--plot", tmp_path / "sweep.png")
    model = loaded(folders)
    tasks = {}
    for task in "ab":
        ids = tokenizer()((folders / f"{task}.txt").read_text())["input_ids"]
        tasks[task] = {"input_ids": torch.tensor(ids[: 4 * 16]).view(4, 16)}
    with model.alphas(b_diag=0.0):
        wanted = alpha_sweep(model, "b_mlp", [0, 0.5, 1], negative_loss, tasks).to_dict("a")
    assert found["tasks"].keys() == {"a", "b"} and found["fixed"] == {"b_diag": 0.0}
    for task in "ab":
        assert found["tasks"][task]["mean"] == pytest.approx(wanted["tasks"][task]["mean"], abs=2e-5)
    assert found["selectivity"] == pytest.approx(wanted["selectivity"], abs=1e-3)
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    table = run("sweep", folders / "one", *options, "--own", "a").stdout.splitlines()
    assert table[0].split() == ["alpha", "0", "0.5", "1", "spearman"] and len(table) == 4


def test_card(folders, tmp_path):
    model = loaded(folders)
    peft_bundles.save_bundle(model, "b_mlp", tmp_path / "b")
    rows = [{"task": "sums", "metric": "accuracy", "value": 0.5}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    found = said("card", tmp_path / "b", "--results", tmp_path / "results.json", "--data", "invented sums")
    text = Path(found["card"]).read_text()
    assert "invented sums" in text and "sums" in text and "0.5" in text
    assert "is not valid JSON" in refused("card", tmp_path / "b", "--results", folders / "a.txt")
    assert "has no adapter_config.json; give the folder of a saved adapter" in refused("card", tmp_path)


def test_push_and_pull(folders, tmp_path):
    HUB.reset()
    writer = ["--token", "writes"]
    rows = [{"task": "sums", "metric": "accuracy", "value": 0.5}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    options = ["--private", "--data", "invented sums", "--results", tmp_path / "results.json"]
    found = said("push", f"{folders / 'one'}:b_mlp", "me/mlp", *writer, *options)
    assert found["bundle"] == "b_mlp" and found["url"].endswith("/me/mlp")
    assert b"invented sums" in HUB.files("me/mlp")["README.md"]
    assert "401" in refused("pull", "me/mlp", "--token", "wrong")
    pulled = said("pull", "me/mlp", "--output", tmp_path / "mlp", *writer)
    assert pulled["bundles"] == ["b_mlp"] and Path(pulled["folder"]) == tmp_path / "mlp"
    options = ["--prompt", PROMPT, "--max-new-tokens", 5]
    alone = said("generate", f"{folders / 'one'}:b_mlp", *options)["text"]
    assert said("generate", tmp_path / "mlp", *options)["text"] == alone
    assert said("generate", "me/mlp", *options, *writer, "--base", folders / "base")["text"] == alone
    assert said("pull", "me/mlp", *writer)["bundles"] == ["b_mlp"]  # in the Hub's cache
    assert "404" in refused("pull", "me/nothing", *writer)
    assert "403" in refused("push", f"{folders / 'one'}:b_mlp", "me/mlp", "--token", "reads")
    refused("report", folders / "one", "--base", "me/no_base")
    (tmp_path / "mlp" / "README.md").write_text("measured by hand: ![it](it.png)")
    (tmp_path / "mlp" / "it.png").write_bytes(b"a picture")
    said("push", tmp_path / "mlp", "me/own", *writer)  # a folder with its card is pushed as it is
    assert HUB.files("me/own")["README.md"].startswith(b"measured") and HUB.files("me/own")["it.png"] == b"a picture"
    said("push", tmp_path / "mlp", "me/own", *writer, "--data", "sums")
    assert b"Data: sums" in HUB.files("me/own")["README.md"]


# ---- bad input: one line that names the fix, and an exit code ----


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nosuch"], 2, "No such command 'nosuch'"),
        (["generate", "{one}"], 2, "Missing option '--prompt'"),
        (
            ["generate", "{one}", "--prompt", "a", "--alpha", "b_mlp=high"],
            2,
            "'high' is not a finite number; give one, e.g.",
        ),
        (["generate", "{one}", "--prompt", "a", "--alpha", "b_mlp=nan"], 2, "'nan' is not a finite number"),
        (["generate", "{one}", "--prompt", "a", "--alpha", "b_mlp=1", "--alpha", "b_mlp=0"], 2, "b_mlp is given twice"),
        (
            ["generate", "{one}", "--prompt", "a", "--alpha", "b_mlp"],
            2,
            "is incomplete; write BUNDLE=NUMBER, e.g. b_logic=0.5",
        ),
        (
            ["generate", "{one}", "--prompt", "a", "--alpha", "b_x=1"],
            1,
            "there is no bundle 'b_x'; name one of b_mlp, b_linear, b_diag",
        ),
        (["generate", "{one}", "--prompt", " "], 2, "--prompt ' ' is empty; give some text. See root generate --help."),
        (["generate", "{one}", "--prompt", "a", "--max-new-tokens", "0"], 2, "'--max-new-tokens'"),
        (["report", "{root}/nowhere"], 1, "nowhere' is neither an existing folder nor the name of a repository"),
        (["report", "{root}"], 1, "has no adapter_config.json"),
        (["report", "{one}:b_x"], 1, "has no bundle 'b_x'"),
        (["report", "{one}", "--base", "{root}/nowhere"], 1, "nowhere' cannot be loaded (Repo id must"),
        (["report", "{one}", "--base", "{one}"], 1, "is an adapter itself; give --base the folder or Hub id"),
        (["push", "{one}", "me/x"], 1, "has the bundles b_mlp, b_linear, b_diag; push one, e.g."),
        (
            ["sweep", "{one}", "--bundle", "b_mlp", "--text", "a=nowhere.txt"],
            1,
            "--text a=nowhere.txt: there is no such file; give a text file",
        ),
        (["sweep", "{one}", "--bundle", "b_mlp", "--text", "a.txt"], 2, "is incomplete; write TASK=FILE, e.g."),
        (["sweep", "{one}", "--bundle", "b_mlp", *["--text", "a={root}/a.txt"] * 2], 2, "--text a is given twice"),
        (
            ["sweep", "{one}", "--bundle", "b_mlp", "--text", "a={root}/a.txt", "--plot", "{root}/plot.doc"],
            2,
            "has no suffix of a picture format; give a .png, .svg or .pdf",
        ),
        (
            ["sweep", "{one}", "--bundle", "b_mlp", "--text", "a={root}/a.txt", "--plot", "nowhere/plot.png"],
            2,
            "there is no folder nowhere; give one that exists",
        ),
        (["sweep", "{one}", "--bundle", "b_x", "--text", "a={root}/a.txt"], 1, "there is no bundle 'b_x'"),
        (
            ["sweep", "{one}", "--bundle", "b_mlp", "--text", "a={root}/a.txt", "--values", "0,high"],
            2,
            "'high' is not a finite",
        ),
        (
            ["sweep", "{one}", "--bundle", "b_mlp", "--text", "a={root}/a.txt", "--own", "a"],
            2,
            "needs a --text of that name, at least one other --text, and 0",
        ),
        (["sweep", "{one}", "--bundle", "b_mlp", "--text", "a={root}/a.txt", "--tokens", "9999"], 1, "lower --tokens"),
    ],
)
def test_bad_input(folders, args, code, message):
    filled = [a.replace("{one}", str(folders / "one")).replace("{root}", str(folders)) for a in args]
    assert message in refused(*filled, code=code)


def test_what_a_stranger_may_give(folders, tmp_path):
    """Every command that reads an adapter answers on one line, and writes nothing."""
    good = peft_bundles.save_bundle(loaded(folders), "b_mlp", tmp_path / "good")
    TINY["llama"](seed=1).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")

    def spoilt(name, change):
        change(Path(shutil.copytree(good, tmp_path / name)))
        return tmp_path / name

    out = tmp_path / "out"
    for source, message, base in (
        (spoilt("lora", lora), "is an adapter of type 'LORA', not a bundle", "base"),
        (spoilt("pickle", pickled), "only adapter_model.bin, a pickle, which is never loaded", "base"),
        (spoilt("header", huge_header), "claims a header of 10,737,418,240 bytes in a file of 208", "base"),
        (good, "was trained on another base model or another revision of it", tmp_path / "other"),
        ("me/../x", "is neither an existing folder nor the name of a repository", "base"),
        (f"{good}:../b_mlp", "has no bundle '../b_mlp'; name one of ['b_mlp']", "base"),
        (tmp_path / "../../nowhere", "is neither an existing folder nor the name of a repository", "base"),
    ):
        for command in (
            ["report", source],
            ["generate", source, "--prompt", "a"],
            ["sweep", source, "--bundle", "b_mlp", "--text", f"a={folders / 'a.txt'}"],
            ["compose", source, "--output", out],
            ["push", source, "me/bad"],
        ):
            assert message in refused(*command, "--base", folders / base), command
        if base == "base":
            assert message in refused("pull", source, "--output", out)
    assert not out.exists()
    (good / "README.md").write_text("no metadata")
    assert said("report", good, "--base", folders / "base")["adapters"]
    said("card", good)
    assert ModelCard.load(good / "README.md").data.library_name == "peft"


def test_without_a_command_it_shows_the_help():
    assert "generate" in run().stdout and "distill" in run().stdout


def test_alphas_and_prompts_are_checked_before_the_base_is_loaded(folders, monkeypatch):
    def loading(*_args, **_kwargs):
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    a = ["--text", f"a={folders}/a.txt"]
    for args in (["generate", "--prompt", ""], ["generate", "--prompt", "a", "--alpha", "b_x=1"],
                 ["sweep", "--bundle", "b_x", *a], ["sweep", "--bundle", "b_mlp", *a, "--alpha", "b_y=1"]):  # fmt: skip
        assert "was loaded" not in refused(args[0], folders / "one", *args[1:], code=2 if "" in args else 1)


def test_chat_asks_in_the_template(folders):
    values = said("generate", folders / "one", "--prompt", PROMPT, "--chat", "--max-new-tokens", 5)
    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = inputs["input_ids"]
    wanted = generated(loaded(folders), ids, min_new_tokens=0)[0, ids.shape[1] :]
    assert values["text"] == tokenizer().decode(wanted, skip_special_tokens=True)


def test_distill_writes_a_plain_lora(folders, tmp_path):
    values = said("distill", folders / "one", "--text", folders / "a.txt", "--output", tmp_path / "lora", "--steps", 30,
                  "--tokens", 16, "--alpha", "b_diag=0")  # fmt: skip
    assert values["kl"]["lora"] < values["kl"]["base"] and values["alphas"]["b_diag"] == 0
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    refused("distill", folders / "one", "--text", folders / "a.txt", "--output", tmp_path / "lora", code=1)


def test_export_writes_the_same_model_as_a_plain_lora(folders, tmp_path):
    config = bundle_config(bundles={"b_code": {"rank": 3, "place": "mlp"}})
    model = perturb(get_peft_model(AutoModelForCausalLM.from_pretrained(folders / "base"), config)).eval()
    model.save_pretrained(tmp_path / "placed")
    values = said("export", tmp_path / "placed", "--alpha", "b_code=0.5", "--lora", tmp_path / "lora")
    ids = torch.arange(3, 12)[None]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "base"), values["folder"]).eval()
    torch.testing.assert_close(logits(plain, ids), logits(model, ids, alphas={"b_code": 0.5}), rtol=1e-4, atol=1e-5)
    assert "behind blocks" in refused("export", folders / "one", "--lora", tmp_path / "no")


def test_the_base_at_the_revision_that_the_bundles_were_trained_on(folders, hub, tmp_path):
    """The base moves on after the bundle was trained: its own revision is taken, and another can be given."""
    at_first = hub.add("org/base", content(folders / "base"))
    base = AutoModelForCausalLM.from_pretrained("org/base", revision=at_first)
    model = perturb(get_peft_model(base, bundle_config(), revision=at_first), scale=0.8)
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    TINY["llama"](seed=7).save_pretrained(tmp_path / "moved")
    hub.add("org/base", content(tmp_path / "moved"))
    assert said("report", "me/ml")["base"] == f"org/base@{at_first}"
    assert said("report", "me/ml", "--base", f"org/base@{at_first}")["adapters"]
    message = refused("report", "me/ml", "--base", "org/base", code=1)
    assert "another revision" in message and at_first in message
    values = said("generate", "me/ml", "--prompt", PROMPT, "--max-new-tokens", 3)
    assert values["tokens"] >= 1


# ---- as a program ----


def program(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(Path(peft_bundles_cli.__file__)), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **env},
    )


def test_the_installed_command_is_this_module():
    (script,) = entry_points(group="console_scripts", name="peft-bundles")
    assert script.value == "peft_bundles_cli:main" and script.load() is peft_bundles_cli.main


def test_a_process_prints_json_and_nothing_else(folders):
    made = program(
        "generate", folders / "one", "--prompt", PROMPT, "--max-new-tokens", 5, "--alpha", "b_mlp=0", "--json"
    )
    assert made.returncode == 0 and made.stderr == ""
    ids = tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    wanted = generated(loaded(folders), ids, alphas={"b_mlp": 0.0}, min_new_tokens=0)[0, ids.shape[1] :]
    assert json.loads(made.stdout)["text"] == tokenizer().decode(wanted, skip_special_tokens=True)


def test_a_process_fails_on_one_line(folders):
    """An unknown base, where no Hub answers: no traceback, no retries for minutes."""
    start = time.perf_counter()
    made = program("report", folders / "one", "--base", "nobody/nothing", HF_ENDPOINT="http://127.0.0.1:9")
    assert made.returncode == 1 and made.stdout == "" and made.stderr.count("\n") == 1
    assert made.stderr.startswith("error: the base model 'nobody/nothing' cannot be loaded (")
    assert made.stderr.rstrip().endswith(
        "give --base the folder or Hub id of the model that the bundles were trained on."
    )
    assert time.perf_counter() - start < 120


def test_ctrl_c_says_that_it_stopped(folders):
    """While the base model is asked for at an address where nobody answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [
            sys.executable,
            str(Path(peft_bundles_cli.__file__)),
            "report",
            str(folders / "one"),
            "--base",
            "a/b",
        ]
        made = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_ENDPOINT": endpoint})
        silent.accept()
        made.send_signal(signal.SIGINT)
        assert made.communicate(timeout=60)[1] == "error: stopped by Ctrl-C\n" and made.returncode == 130


def test_without_typer_it_says_how_to_install_it():
    code = "import sys; sys.modules['typer'] = None; import peft_bundles_cli"
    path = str(Path(peft_bundles_cli.__file__).parent)
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path)
    assert made.returncode == 1 and made.stdout == "" and made.stderr.count("\n") == 1
    assert 'pip install "peft-bundles[cli]"' in made.stderr


def test_a_plot_without_matplotlib_says_how_to_install_it(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = f"a={folders / 'a.txt'}"
    options = ["--bundle", "b_mlp", "--values", "0,1", "--rows", 1, "--plot", tmp_path / "sweep.png"]
    message = refused("sweep", folders / "one", "--text", text, *options)
    assert 'pip install "peft-bundles[analysis]"' in message


def test_help_does_not_wait_for_torch():
    code = "import sys, peft_bundles_cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    path = os.pathsep.join([str(Path(peft_bundles_cli.__file__).parent), os.environ.get("PYTHONPATH", "")])
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}).returncode == 0
    assert run("--version").stdout.strip() == version("peft-bundles")
    made = program("--help")
    assert made.returncode == 0
    assert "..." not in made.stdout.partition("Commands:")[2]  # every command says what it does on its line
    for name in ("report", "compose", "push", "pull", "generate", "sweep", "card", "--install-completion"):
        assert name in made.stdout


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("peft-bundles co", ["compose"]),
        ("peft-bundles generate {one} --alpha b_", ["b_mlp=", "b_linear=", "b_diag="]),
        ("peft-bundles generate {one}:b_diag {two} --alpha b_", ["b_diag=", "b_mlp="]),
        ("peft-bundles sweep {one} --bundle b_l", ["b_linear"]),
        ("peft-bundles generate /nowhere --alpha b_", []),
    ],
)
def test_tab_completion(folders, typed, wanted):
    """As bash asks for it: words so far and the index of the last in the environment, answers on lines."""
    words = typed.replace("{one}", str(folders / "one")).replace("{two}", str(folders / "two"))
    path = os.pathsep.join([str(Path(peft_bundles_cli.__file__).parent), os.environ.get("PYTHONPATH", "")])
    made = subprocess.run(
        [sys.executable, "-c", "import peft_bundles_cli; peft_bundles_cli.main()"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "_PEFT_BUNDLES_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
    )
    assert made.stdout.split() == wanted
