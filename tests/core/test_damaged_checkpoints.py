"""A checkpoint that is damaged or made for another model, and a save or load that fails: told, and no harm done."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from models import TINY, attached, batch, bundle_config, logits, perturb
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_bundles import BundleConfig, calibrate, compose


def tampered(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first(tensors, part):
    return next(key for key in sorted(tensors) if part in key)


def _drop(part):
    return lambda tensors: tensors.pop(first(tensors, part))


def _spoil(part, value):
    def change(tensors):
        tensors[first(tensors, part)].view(-1)[0] = value

    return change


def _add(name):
    return lambda tensors: tensors.update({name: torch.zeros(2)})


def _narrow(tensors):
    key = first(tensors, "bundle_down")
    tensors[key] = tensors[key][:, :-1].contiguous()


def _rotate(tensors):
    for key in [key for key in tensors if "bundle_basis" in key]:
        tensors[key] = tensors[key].flip(0).contiguous()  # orthonormal still, but another basis


def _exchange_layers(tensors):
    a, b = sorted(key for key in tensors if "bundle_basis" in key)
    tensors[a], tensors[b] = tensors[b], tensors[a]


LAYER = "base_model.model.model.layers"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("bundle_down"), "lacks tensor .*bundle_down"),
        (_drop("bundle_up"), "lacks tensor .*bundle_up"),
        (_drop("bundle_basis"), "lacks tensor .*bundle_basis"),
        (_drop("bundle_mean"), "lacks tensor .*bundle_mean"),
        (_add(f"{LAYER}.0.bundles.bundle_up.b_unknown"), "has the unknown tensor .*b_unknown"),
        (_add(f"{LAYER}.7.bundles.bundle_up.b_mlp"), "has 1 tensors .*layers.7"),
        (_add(f"{LAYER}.0.mlp.gate_proj.lora_A.weight"), "has 1 tensors .*lora_A"),
        (_narrow, "of shape .*another"),
        (_spoil("bundle_down", float("nan")), "NaN"),
        (_spoil("bundle_up", float("inf")), "NaN or infinity"),
        (_spoil("bundle_basis", float("nan")), "NaN"),
        (_spoil("bundle_scale", float("-inf")), "NaN or infinity"),
        (_rotate, "another basis than"),
        (_exchange_layers, "another basis than"),
    ],
)
def test_spoilt_tensors(change, message, low_cpu_mem_usage, tmp_path):
    attached().save_pretrained(tmp_path)
    tampered(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(share, tmp_path):
    attached().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises((ValueError, SafetensorError)):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "null", "3", '"bundles"', '{"peft_type": "BUND'])
def test_config_that_is_no_object(content, tmp_path):
    attached().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json .*damaged"):
        BundleConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("other", "shape"),
    [
        ({"hidden_size": 32}, r"\(32, 2\)"),
        ({"num_hidden_layers": 3}, r"\(64, 3\)"),
        ({"num_hidden_layers": 1}, "64, 1"),
    ],
)
def test_other_base_model(other, shape, tmp_path):
    attached().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"\(64, 2\).*{shape}"):
        PeftModel.from_pretrained(TINY["llama"](**other), tmp_path)


def test_other_seed(tmp_path):
    attached(basis_init="random", save_basis=False, basis_seed=5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "basis_seed": 6}))
    with pytest.raises(ValueError, match=r"another basis than .*seed"):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path)


def test_failed_load_leaves_the_model_usable(tmp_path):
    model = attached()
    model.save_pretrained(tmp_path / "good")
    model.save_pretrained(tmp_path / "bad")
    tampered(tmp_path / "bad", _spoil("bundle_up", float("nan")))
    before = logits(model, batch())
    with pytest.raises(ValueError, match="NaN"):
        model.load_adapter(tmp_path / "bad", "other")
    assert torch.equal(logits(model, batch()), before)
    model.load_adapter(tmp_path / "good", "other")
    model.set_adapter("other")
    assert torch.equal(logits(model, batch()), before)


FAILING_SAVE = """
import resource, signal, sys
from peft import PeftModel
from models import TINY, perturb
limit, folder = int(sys.argv[1]), sys.argv[2]
model = perturb(PeftModel.from_pretrained(TINY["llama"](), folder), seed=9)
model.peft_config["default"].revision = "second"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    model.save_pretrained(folder)
except Exception as error:
    print("failed:", type(error).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1_000, 12_000])
def test_failed_save_leaves_the_earlier_checkpoint(limit, tmp_path):
    """The disk is full somewhere on the way: at the model card, or in the middle of the tensors."""
    model = attached()
    model.save_pretrained(tmp_path)
    names = set(os.listdir(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > limit
    run = subprocess.run(
        [sys.executable, "-c", FAILING_SAVE, str(limit), str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "failed:" in run.stdout
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    assert torch.equal(logits(again, batch()), logits(model, batch()))
    assert again.peft_config["default"].revision == model.peft_config["default"].revision
    model.save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == names  # nothing half-written stays behind


def test_a_read_only_folder_is_named_and_keeps_its_checkpoint():
    model = attached()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the second reads the card again, and with it modules that another user may not import
            model.save_pretrained(folder)
        before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        os.chmod(folder, 0o555)
        for path in Path(folder).iterdir():
            os.chmod(path, 0o444)
        perturb(model, seed=9)
        if root := os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(OSError, match=f"Permission denied.*{folder}"):
                model.save_pretrained(folder)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)
        assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before


@pytest.mark.parametrize("save", ["peft", "transformers"])
def test_one_changed_bit_in_a_tensor_is_noticed(save, tmp_path):
    if save == "peft":
        model = attached()
    else:
        model = TINY["llama"]()
        model.add_adapter(bundle_config())
        perturb(model)
    model.save_pretrained(tmp_path)
    expected = logits(model, batch())
    assert torch.equal(logits(PeftModel.from_pretrained(TINY["llama"](), tmp_path), batch()), expected)
    TINY["llama"]().load_adapter(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged or has been changed.*weights_digest"):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "weights_digest": None}))
    PeftModel.from_pretrained(TINY["llama"](), tmp_path)  # the user says that it was on purpose


def test_tensors_of_two_layers_cannot_change_places(tmp_path):
    attached().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    one, two = sorted(k for k in tensors if "bundle_up.b_mlp" in k)[:2]
    save_file({**tensors, one: tensors[two], two: tensors[one]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="damaged or has been changed"):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path)


def test_a_scale_of_zero_is_refused(tmp_path):
    model = get_peft_model(TINY["llama"](), bundle_config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "bundle_scale" in k)
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, file)
    with pytest.raises(ValueError, match=r"standard deviations .* not positive"):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path)


# ---- 200 kinds of damage ----

WRONG = [None, True, -1, 0, 0.5, 10**30, "", "x", [], [None], [[]], {}, {"a": None}, [{"name": "b_mlp"}], [1, 2]]


def _field(draw, config):
    """Another value in some field of the config, or of a bundle, a sub-basis or the notes in it."""
    places = [config, *config["bundles"], *config["sub_bases"]]
    places += [config[name] for name in ("provenance", "calibration", "base_fingerprint") if config.get(name)]
    place = draw.choice(places)
    field = draw.choice(sorted(set(place) - {"peft_type"}))  # PEFT reads that one by itself
    if draw.random() < 0.3:
        del place[field]
    else:
        place[field] = draw.choice(WRONG)
    return field


def _tensors(draw, tensors):
    """Another tensor under some name, or none, or another name."""
    key = draw.choice(sorted(tensors))
    kind = draw.choice(["shape", "dtype", "scalar", "empty", "gone", "name", "nan", "extra"])
    tensor = tensors.pop(key)
    if kind == "gone":
        return f"{key}: gone"
    changed = {
        "shape": lambda: tensor[..., :-1].contiguous(),
        "dtype": lambda: tensor.to(draw.choice([torch.int64, torch.bool, torch.float64])),
        "scalar": lambda: torch.tensor(1.0),
        "empty": lambda: tensor.new_zeros(0),
        "nan": lambda: torch.full_like(tensor, torch.nan),
    }.get(kind, lambda: tensor)()
    name = draw.choice(["", "a", key + ".x", key.replace("layers.0", "layers.7"), key.rpartition(".")[0] or "b"])
    tensors[name if kind in ("name", "extra") else key] = changed
    if kind == "extra":
        tensors[key] = tensor.clone()
    return f"{key}: {kind}"


def _bytes(draw, path):
    """Some bytes of a file changed, cut off or added."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "cut", "add", "head"])
    if kind == "cut":
        content = content[: draw.randrange(len(content))]
    elif kind == "add":
        content += b"\0" * draw.randrange(1, 99)
    else:
        for _ in range(4):
            content[draw.randrange(64 if kind == "head" else len(content))] = draw.randrange(256)
    path.write_bytes(content)
    return f"{path.name}: {kind}"


@pytest.mark.parametrize("how", ["peft", "compose"])
def test_damage_of_any_kind_gets_a_sentence(how, tmp_path):
    """100 times for PEFT and for `compose`: it loads as before, or is refused with a sentence."""
    model = get_peft_model(TINY["llama"](), bundle_config())
    calibrate(model, tokens=256, max_length=32, progress=False)
    perturb(model).save_pretrained(tmp_path / "whole")
    draw, refused, base = random.Random(0), 0, TINY["llama"]()
    for number in range(100):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        what = number % 4
        if what == 0:
            config = json.loads(files[0].read_text())
            said = _field(draw, config)
            files[0].write_text(json.dumps(config))
        elif what == 1:
            tensors = load_file(files[1])
            said = _tensors(draw, tensors)
            save_file(tensors, files[1], metadata={"format": "pt"})
        else:
            said = _bytes(draw, files[what - 2])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fresh = copy.deepcopy(base)
                PeftModel.from_pretrained(fresh, folder) if how == "peft" else compose(fresh, [folder])
        except (ValueError, OSError, SafetensorError) as error:
            refused += 1
            assert len(str(error)) > 20, said
        except Exception as error:
            raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)
    assert refused > 50
