"""examples/quickstart.py on a tiny random model, without a network."""

import random
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


LINE = "thou art more lovely and temperate rough winds do shake the darling buds of may but not for long"
WORDS = LINE.split()


def verse(number: int) -> str:
    """A play of its own for every number."""
    rng = random.Random(number)
    return "\n".join(" ".join(rng.choices(WORDS, k=9)) for _ in range(300))


@pytest.fixture
def modules(monkeypatch):
    """(quickstart, corpora), with invented plays; docs and manual are the real ones, which are installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import quickstart

    from studies.data import corpora

    monkeypatch.setattr(corpora, "plays", lambda: {f"play {n}": verse(n) for n in range(10)})
    return quickstart, corpora


@pytest.fixture
def tiny(modules, tmp_path):
    """Folder of a tiny random Llama and of a BPE tokenizer trained on the texts."""
    _, data = modules
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    kept = [piece for train, _ in data.load_texts(0).values() for piece in train[:200]]
    tokenizer.train_from_iterator(kept, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"]))
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, num_key_value_heads=2, eos_token_id=1, bos_token_id=1, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_main_checks_hold(modules, tiny, tmp_path, capsys):
    quickstart, _ = modules
    quickstart.main(["--model", str(tiny), "--steps", "20", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.count("check ") == 9 and "All checks passed" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_check_that_does_not_hold_raises(modules):
    quickstart, _ = modules
    with pytest.raises(RuntimeError, match="two is three"):
        quickstart.check("two is three", False)


def test_a_leak_between_the_bundles_raises(modules, tiny, tmp_path, monkeypatch):
    quickstart, _ = modules
    leaky = quickstart.bundle_config(0)
    leaky.bundles["b_docs"].signals["plays"] = 0.1
    monkeypatch.setattr(quickstart, "bundle_config", lambda seed: leaky)
    monkeypatch.setattr(quickstart, "row_alphas", lambda kinds: {})  # it is on in those rows, too
    with pytest.raises(RuntimeError, match="2 steps on plays only changed b_plays"):
        quickstart.main(["--model", str(tiny), "--steps", "2", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_bundle_learns_in_mixed_batches_what_it_learns_alone(modules, tiny):
    quickstart, _ = modules
    generator = torch.Generator().manual_seed(0)
    rows = {kind: torch.randint(2, 400, (12, 16), generator=generator) for kind in quickstart.KINDS}
    probe, outputs = torch.randint(2, 400, (2, 16), generator=generator), []
    for kinds in (["plays", "plays", "docs", "docs"], ["plays", "plays"]):
        torch.manual_seed(0)  # both start with the same bundles
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), quickstart.bundle_config(0))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        unread = {kind: iter(ids) for kind, ids in rows.items()}
        for _ in range(6):
            quickstart.train_step(model, optimizer, unread, kinds)
        with model.alphas(b_docs=0.0):
            outputs.append(quickstart.logits_of(model, probe))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
