"""Calibration: what it measures, what it sets, and when it refuses."""

import pytest
import torch
from models import TINY, batch, bundle_config, layers, logits, perturb
from peft import get_peft_model

from peft_bundles import BundleConfig, calibrate
from peft_bundles.calibration import OUTLIER


class Tokenizer:
    """Characters to ids: all that `calibrate` asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 2

    def __call__(self, text, truncation, max_length):
        return {"input_ids": [3 + ord(c) % 90 for c in text][:max_length]}


def texts(n: int = 60, length: int = 20) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return ["".join(chr(97 + int(i)) for i in torch.randint(0, 26, (length,), generator=generator)) for _ in range(n)]


def states(model, ids):
    """The base model's block outputs, (N, d) per layer, outliers left out."""
    found = {}
    handles = []
    for layer in layers(model):

        def hook(block, args, output, index=layer.index):
            hidden = output[0] if isinstance(output, tuple) else output
            found.setdefault(index, []).append(hidden.flatten(0, 1).double())

        handles.append(layer.get_base_layer().register_forward_hook(hook))
    with model.disable_adapter():
        logits(model, ids)
    for handle in handles:
        handle.remove()
    stacked = {index: torch.cat(parts) for index, parts in found.items()}
    return {i: h[h.norm(dim=-1) <= OUTLIER * h.norm(dim=-1).median()] for i, h in stacked.items()}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("init", ["random", "pca", "null"])
def test_it_sets_the_mean_deviation_and_directions_of_the_base_models_stream(arch, init):
    model = get_peft_model(TINY[arch](), bundle_config(basis_init=init))
    drawn = {layer.index: layer.bundle_basis["default"].clone() for layer in layers(model)}
    data = texts(8)
    result = calibrate(model, data, Tokenizer(), tokens=160, batch_size=8, progress=False)
    assert result["tokens"] == 160 and result["source"] == "given texts"
    ids = torch.tensor([Tokenizer()(t, True, 256)["input_ids"] for t in data])
    for index, kept in states(model, ids).items():
        layer = layers(model)[index]
        mean, scale = kept.mean(0), kept.std(0, unbiased=False)
        torch.testing.assert_close(layer.bundle_mean["default"].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.bundle_scale["default"].double(), scale, rtol=1e-4, atol=1e-5)
        u = layer.bundle_basis["default"].double()
        torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1], dtype=torch.float64), rtol=0, atol=1e-5)
        if init == "random":
            assert torch.equal(u.float(), drawn[index])
            continue
        variances = torch.linalg.eigvalsh(torch.corrcoef(kept.T))
        wanted = variances[-u.shape[1] :] if init == "pca" else variances[: u.shape[1]]
        explained = ((kept - mean) / scale @ u).var(0, unbiased=False).sum()
        torch.testing.assert_close(explained, wanted.sum(), rtol=2e-2, atol=2e-2)


def test_padding_and_attention_sinks_are_left_out():
    def measured(data) -> torch.Tensor:
        model = get_peft_model(TINY["llama"](), bundle_config(basis_init="random"))
        calibrate(model, data, Tokenizer(), tokens=10**6, batch_size=len(data), progress=False)
        return layers(model)[0].bundle_mean["default"]

    torch.testing.assert_close(measured(["abcdefgh", "abc"]), measured(["abcdefgh", "abc"][::-1]))
    model = TINY["llama"]()
    model.model.embed_tokens.weight.data[3 + ord("!") % 90] *= 1000  # a token with a massive state
    config = bundle_config(basis_init="random")
    loud = get_peft_model(model, config)
    result = calibrate(loud, ["!abcdefghij"] * 4, Tokenizer(), tokens=1000, progress=False)
    assert result["outliers"] == pytest.approx(1 / 11)
    assert layers(loud)[0].bundle_mean["default"].abs().max() < 1


def test_without_texts_the_base_model_speaks_for_itself():
    def run():
        model = get_peft_model(TINY["gpt2"](), bundle_config())
        state = torch.get_rng_state()
        result = calibrate(model, tokens=600, max_length=40, batch_size=4, progress=False)
        assert torch.equal(state, torch.get_rng_state())  # it has its own seed
        return result, [layer.bundle_basis["default"] for layer in layers(model)]

    (result, first), (_, second) = run(), run()
    assert result["source"] == "the base model's own samples" and result["tokens"] >= 600
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_calibrated_adapter_is_still_the_base():
    ids = batch()
    base = logits(TINY["llama"](), ids)
    model = get_peft_model(TINY["llama"](), bundle_config()).train()
    calibrate(model, texts(), Tokenizer(), tokens=1000, progress=False)
    assert model.training and not any(layer._disable_adapters for layer in layers(model))
    assert torch.equal(logits(model.eval(), ids), base)
    assert "1,120 tokens of given texts" in str(model.bundle_report())
    perturb(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)


def test_standardising_is_what_input_norm_says():
    ids = batch()
    model = get_peft_model(TINY["llama"](), bundle_config(basis_init="random"))
    calibrate(model, texts(), Tokenizer(), tokens=1000, progress=False)
    perturb(model)
    standard = logits(model, ids)
    model.peft_config["default"].input_norm = "none"
    assert not torch.equal(logits(model, ids), standard)
    fresh = perturb(get_peft_model(TINY["llama"](), bundle_config(basis_init="random", input_norm="none")))
    assert torch.equal(logits(model, ids), logits(fresh, ids))


def test_bundles_of_another_adapter_are_off_while_measuring():
    def measured(with_another: bool) -> torch.Tensor:
        model = get_peft_model(TINY["llama"](), bundle_config(basis_init="random", layers_to_transform=[1]), "mine")
        if with_another:
            model.add_adapter("other", bundle_config(layers_to_transform=[0]))
            perturb(model, "other", scale=2.0)
            model.base_model.set_adapter(["mine", "other"])
        calibrate(model, texts(8), Tokenizer(), adapter="mine", tokens=160, progress=False)
        return next(m for m in layers(model) if m.index == 1).bundle_mean["mine"]

    assert torch.equal(measured(True), measured(False))


def test_dropout_is_off_while_measuring_and_every_module_keeps_its_mode():
    model = get_peft_model(TINY["gpt2"](resid_pdrop=0.5, embd_pdrop=0.5), bundle_config(basis_init="random")).train()
    frozen = model.get_base_model().transformer.h[0].eval()
    calibrate(model, texts(8), Tokenizer(), tokens=160, progress=False)
    first = layers(model)[1].bundle_mean["default"].clone()
    calibrate(model, texts(8), Tokenizer(), tokens=160, progress=False)
    assert torch.equal(first, layers(model)[1].bundle_mean["default"])
    assert model.training and not frozen.training


def test_own_samples_are_plain_samples_whatever_the_model_ships_with():
    model = get_peft_model(TINY["gpt2"](n_positions=32), bundle_config())
    model.generation_config.temperature, model.generation_config.top_p = 1e-3, 0.1
    seen = []
    handle = model.get_base_model().transformer.h[0].register_forward_hook(lambda m, a, out: seen.append(a[0].shape))
    result = calibrate(model, tokens=600, batch_size=4, progress=False)
    handle.remove()
    assert result["tokens"] == 5 * 4 * 32  # cut to the model's positions
    correlation = layers(model)[0].bundle_scale["default"]
    assert bool((correlation > 1e-3).all())  # the same sequence over and over would have next to no deviation


def test_refusals():
    model = get_peft_model(TINY["llama"](), bundle_config())
    with pytest.raises(ValueError, match="texts is one string"):
        calibrate(model, "one string", Tokenizer())
    with pytest.raises(ValueError, match=r"texts holds a dict; give strings, .*\[row\['text'\] for row"):
        calibrate(model, [{"text": "abc"}], Tokenizer(), progress=False)
    with pytest.raises(ValueError, match="texts need a tokenizer"):
        calibrate(model, texts())
    with pytest.raises(ValueError, match="tokens=10 is too few"):
        calibrate(model, tokens=10)
    with pytest.raises(ValueError, match="tokens are too few for a 64-dimensional covariance"):
        calibrate(model, ["abc"], Tokenizer(), progress=False)
    with pytest.raises(ValueError, match="no usable token"):
        calibrate(model, [""], Tokenizer(), progress=False)
    with pytest.raises(ValueError, match=r"no bundle adapter 'other'.*\['default'\]"):
        calibrate(model, adapter="other")
    calibrate(model, texts(), Tokenizer(), tokens=500, progress=False)
    calibrate(model, texts(), Tokenizer(), tokens=1000, progress=False)  # still fresh: allowed
    before = [layer.bundle_basis["default"].clone() for layer in layers(model)]
    perturb(model)
    with pytest.raises(RuntimeError, match="has been trained"):
        calibrate(model, texts(), Tokenizer(), tokens=1000, progress=False)
    assert all(torch.equal(b, layer.bundle_basis["default"]) for b, layer in zip(before, layers(model)))
    model.add_adapter("second", bundle_config())
    with pytest.raises(ValueError, match=r"several adapters fit: .*name one"):
        calibrate(model, texts(), Tokenizer())
    plain = get_peft_model(TINY["llama"](), BundleConfig(preset="baseline"))
    with pytest.raises(ValueError, match="no bundles"):
        calibrate(plain)


def test_own_samples_are_made_many_rows_at_a_time_with_a_bar_that_says_so(capfd, monkeypatch):
    """Most of the time of a token is one look at the weights, whatever the number of rows."""
    model, rows = get_peft_model(TINY["llama"](), bundle_config()), []
    real = type(model.get_base_model()).generate
    monkeypatch.setattr(
        type(model.get_base_model()), "generate", lambda self, **k: rows.append(len(k["input_ids"])) or real(self, **k)
    )
    calibrate(model, tokens=80 * 16, max_length=16, batch_size=8)
    assert rows == [64, 16]
    assert "sample from the base model: 100%" in capfd.readouterr().err
