"""Configs check themselves at construction and survive JSON; presets are the tables of the documentation."""

import json
import math
import warnings
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from peft_bundles import PRESETS, BundleConfig, BundleSpec, SubBasis
from peft_bundles.core.basis import bundle_shapes, support_overlap
from peft_bundles.specs import KINDS, ROLES, resolve_rank
from peft_bundles.taxonomy import SIGNALS


SIZES = {
    "baseline": 0,
    "single_adapter": 1,
    "all_overlap": 3,
    "ssl_rl_separate": 6,
    "full_modular": 15,
    "affective_social": 12,
    "feedback_isolated": 5,
    "hierarchical": 6,
    "cognitive_semantic_split": 10,
    "taxonomy": 17,
}


@pytest.mark.parametrize("preset", SIZES)
def test_presets_have_their_number_of_bundles_at_every_width(preset):
    config = BundleConfig(preset=preset)
    assert len(config.bundles) == SIZES[preset]
    for hidden_size in (64, 100, 576, 768, 2048, 4096):
        shapes = bundle_shapes(config, hidden_size)
        assert all(1 <= s.rank <= len(s.support) <= hidden_size for s in shapes.values())


def test_there_are_ten_presets():
    assert set(PRESETS) == set(SIZES)


def test_ssl_rl_separate_on_the_gpt2_shape():
    model = get_peft_model(GPT2LMHeadModel(GPT2Config()), BundleConfig(preset="ssl_rl_separate"))
    config = model.peft_config["default"]
    ranks = {name: shape.rank for name, shape in bundle_shapes(config, 768).items()}
    assert ranks == {
        "b_ssl_main": 138,
        "b_ssl_semantic": 92,
        "b_rl_policy": 76,
        "b_rl_value": 61,
        "b_rl_explore": 38,
        "b_rl_anchor": 46,
    }
    owners = ["lm", "lm", "policy", "value", "entropy", "kl"]
    assert [next(iter(spec.signals)) for spec in config.bundles.values()] == owners
    trainable, everything = model.get_nb_trainable_parameters()
    assert abs(trainable - 2.6e6) < 0.26e6
    assert abs(everything - 127e6) < 0.5e6


def test_taxonomy_is_the_table_of_the_design():
    config = BundleConfig(preset="taxonomy")
    assert set(config.signals) == set(SIGNALS)

    def owners(signal: str) -> set:
        return {name for name, weight in config.column(signal).items() if weight == 1.0}

    semantic = {f"b_sem_{t}" for t in ("animals", "ml", "programming", "finance", "law", "medical")}
    assert owners("lm") == {"b_mem_global", "b_abstraction"}
    assert {n for n, w in config.column("lm").items() if 0 < w < 1} == semantic
    assert owners("logic") == {"b_logic_global", "b_abstraction"}
    assert config.column("logic")["b_mem_global"] == 0.05
    assert owners("meta_correctness") == {"b_meta", "b_err_confusion", "b_err_consistency"}
    assert owners("calibration") == {"b_err_calibration", "b_meta"}
    assert owners("contrastive") == {"b_abstraction"}
    assert owners("policy") == {"b_policy"} and config.column("policy")["b_rl_advantage"] == 0.3
    assert owners("advantage") == owners("curiosity") == {"b_rl_advantage"}
    supports = {name: spec.sub_bases for name, spec in config.bundles.items()}
    assert all(supports[name] == ["mem", "abstraction"] for name in semantic)
    assert supports["b_err_confusion"] == ["meta", "policy", "abstraction"]


def test_hierarchical_supports_are_nested_and_all_overlap_shares_80_percent():
    shapes = bundle_shapes(BundleConfig(preset="hierarchical"), 768)
    inside = {"b_sem_animals": "b_mem_global", "b_sem_programming": "b_logic_global", "b_sem_law": "b_abstraction"}
    for semantic, cognitive in inside.items():
        assert set(shapes[semantic].support.tolist()) < set(shapes[cognitive].support.tolist())
    share = support_overlap(bundle_shapes(BundleConfig(preset="all_overlap"), 768))
    assert torch.all((share - 0.8).abs()[~torch.eye(3, dtype=torch.bool)] < 0.01)


def spec(**fields) -> dict:
    return {"rank": 4, "sub_bases": ["a"], **fields}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "nope"}, "preset='nope'.*ssl_rl_separate"),
        ({"adapter": "mpl"}, "adapter='mpl'.*mlp"),
        ({"basis_init": "svd"}, "basis_init='svd'.*null"),
        ({"input_norm": "rms"}, "input_norm='rms'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"bottleneck": 0}, "bottleneck=0"),
        ({"basis_rank": -3}, "basis_rank=-3"),
        ({"save_basis": False}, "save_basis=False.*save_basis=True"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"sub_bases": {"a": 0}, "bundles": {}}, "sub-basis 'a'.*rank=0"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(rank=0)}}, "bundle 'b'.*rank=0"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(rank=True)}}, "rank=True"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(rank=1.5)}}, "rank=1.5"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(sub_bases=["c"])}}, r"sub_bases \['c'\].*\['a'\]"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(sub_bases=[])}}, "sub_bases is empty; name at least one of"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(sub_bases="a")}}, "must be a list"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(sub_bases=["a", "a"])}}, "twice"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(adapter="mpl")}}, "bundle 'b'.*adapter='mpl'"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(role="boss")}}, "role='boss'"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(overlap=0.5)}}, "needs a sub-basis named 'common'"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(overlap=1.0)}}, "overlap=1.0"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(alpha=math.inf)}}, "alpha=inf"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(signals={"lm": math.nan})}}, r"signals\['lm'\]=nan"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(signals={"lm": -0.1})}}, r"signals\['lm'\]=-0.1"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(signals={"lm": 2})}}, r"signals\['lm'\]=2"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(signals={"lm": 0.3}, protected=True)}}, "protected"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(alpha="1")}}, "alpha='1'"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(overlap=None)}}, "overlap=None"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(signals=None)}}, "signals=None must be a dict"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": {"sub_bases": ["a"]}}}, "bundle 'b': rank is missing"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": 5}}, "bundle 'b' is 5"),
        ({"bundles": 3}, "bundles=3 must be a dict"),
        ({"bundles": [BundleSpec(4)]}, r"bundle 0 of the list has no name; .*BundleSpec\(name='style', \.\.\.\)"),
        ({"sub_bases": [{"name": "a", "rank": 8}, {"rank": 8}]}, r"sub-basis 1 of the list has no name; .*SubBasis\("),
        ({"sub_bases": {"a": "x"}}, "sub-basis 'a' is 'x'"),
        ({"dropout": None}, "dropout=None"),
        ({"basis_seed": -1}, "basis_seed=-1"),
        ({"basis_seed": "a"}, "basis_seed='a'"),
        ({"layers_to_transform": "all"}, "layers_to_transform='all'"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(rnak=4)}}, r"unknown field\(s\) \['rnak'\]"),
        ({"sub_bases": {"a": 8}, "bundles": {"b.c": spec()}}, "bundle name 'b.c'"),
        ({"sub_bases": {"a": 8}, "bundles": {"keys": spec()}}, "bundle name 'keys'"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(name="c")}}, "under key 'b' is named 'c'"),
        ({"sub_bases": {"a": 8}, "bundles": [spec(name="b"), spec(name="b")]}, r"\['b'\] appear twice"),
        ({"sub_bases": {"a": 8}, "bundles": {"b": spec(adapter="identity")}}, r"no longer .* 0\.2; use one of mlp"),
        ({"projection": "free"}, r"projection='free' is no longer supported as of version 0\.2; use one of none, tied"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        BundleConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sub_bases": {"a": 65}, "bundles": {"b": spec()}}, "65 columns but the hidden size is 64"),
        ({"sub_bases": {"a": 32}, "basis_rank": 16, "bundles": {"b": spec()}}, "32 columns but basis_rank=16"),
        ({"sub_bases": {"a": 3}, "bundles": {"b": spec()}}, "rank=4 is 4 columns.*support.*has 3"),
        ({"sub_bases": {"a": 0.25}, "bundles": {"b": spec(rank=0.28)}}, "17 columns.*support.*has 16"),
        ({"sub_bases": {"a": 3}, "basis_rank": 99, "bundles": {"b": spec(rank=2)}}, "basis_rank=99 exceeds"),
        ({"sub_bases": {"a": 8, "common": 2}, "bundles": {"b": spec(overlap=0.5)}}, "asks for 8 common columns"),
    ],
)
def test_sizes_are_checked_against_the_hidden_size(fields, message):
    with pytest.raises(ValueError, match=message):
        bundle_shapes(BundleConfig(**fields), 64)


fraction = st.floats(0.02, 0.3)
specs = st.builds(
    BundleSpec,
    rank=st.one_of(st.integers(1, 8), st.floats(0.01, 0.1)),
    sub_bases=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True),
    signals=st.dictionaries(st.sampled_from(SIGNALS), st.floats(0, 1), max_size=4),
    bottleneck=st.one_of(st.none(), st.integers(1, 16), st.floats(0.1, 2.0)),
    adapter=st.sampled_from([None, *KINDS]),
    alpha=st.floats(-2, 2),
    role=st.sampled_from(ROLES),
    topic=st.one_of(st.none(), st.text(max_size=5)),
)
configs = st.builds(
    BundleConfig,
    sub_bases=st.fixed_dictionaries({"c": fraction, "a": fraction, "b": fraction}),
    bundles=st.dictionaries(st.from_regex(r"[a-z]_[a-z0-9_]{1,8}", fullmatch=True), specs, max_size=5),
    basis_seed=st.integers(0, 2**31),
    projection=st.sampled_from(["none", "tied"]),
    dropout=st.floats(0, 0.9),
    basis_init=st.sampled_from(["random", "pca", "null"]),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_a_config_survives_its_file_in_order(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    loaded = PeftConfig.from_pretrained(folder)
    assert type(loaded) is BundleConfig and loaded == config
    assert list(loaded.bundles) == list(config.bundles) and list(loaded.sub_bases) == list(config.sub_bases)
    assert all(isinstance(s, BundleSpec) for s in loaded.bundles.values())


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(128, 1024))
def test_resolved_shapes_fit_or_say_why_not(config, hidden_size):
    try:
        shapes = bundle_shapes(config, hidden_size)
    except ValueError as error:
        assert "columns" in str(error)
        return
    for name, shape in shapes.items():
        if shape.kind == "full":
            continue
        allowed = sum(resolve_rank(config.sub_bases[s].rank, hidden_size) for s in config.bundles[name].sub_bases)
        assert len(shape.support) == allowed and shape.rank <= allowed
        assert len(set(shape.support.tolist())) == len(shape.support)


def test_fractions_are_rounded_down_to_at_least_one():
    assert [resolve_rank(f, 100) for f in (0.29, 0.299, 0.001, 1.0)] == [29, 29, 1, 100]
    assert resolve_rank(7, 3) == 7


def test_lists_of_named_specs_and_bare_ranks_are_accepted():
    config = BundleConfig(sub_bases=[SubBasis(8, name="a")], bundles=[BundleSpec(4, ["a"], name="b")])
    assert config.bundles["b"].rank == 4 and config.sub_bases["a"].rank == 8
    assert BundleConfig(sub_bases={"a": 8}, bundles={"b": spec()}).sub_bases["a"] == SubBasis(8, name="a")


def test_specs_do_not_share_state_with_presets_or_each_other():
    first, second = BundleConfig(preset="taxonomy"), BundleConfig(preset="taxonomy")
    first.bundles["b_meta"].signals["lm"] = 1.0
    assert "lm" not in second.bundles["b_meta"].signals
    assert "lm" not in BundleConfig(preset="taxonomy").bundles["b_meta"].signals


def test_a_failed_save_leaves_the_earlier_config(tmp_path):
    BundleConfig(basis_seed=1).save_pretrained(tmp_path)
    broken = BundleConfig(basis_seed=2)
    broken.calibration = {"not": object()}
    with pytest.raises(TypeError):
        broken.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["basis_seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]
    with pytest.raises(ValueError, match="is a file"):
        broken.save_pretrained(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    "name, fitting",
    [("my-style", "my_style"), ("2nd", "b_2nd"), ("a.b", "a_b"), ("keys", "b_keys"), ("", "b_"), (3, "b_3")],
)
def test_a_name_that_cannot_be_used_comes_with_one_that_can(name, fitting):
    with pytest.raises(ValueError, match=rf"becomes a part of parameter names.* Write '{fitting}'\."):
        BundleConfig(sub_bases={"a": 8}, bundles={name: {"rank": 8, "sub_bases": ["a"]}})
    assert BundleConfig(sub_bases={"a": 8}, bundles={fitting: {"rank": 8, "sub_bases": ["a"]}}).bundles


def test_a_bundle_that_no_signal_updates_is_told_of():
    bundles = {"b_one": {"rank": 8, "sub_bases": ["a"], "signals": {"lm": 1.0}}}
    with pytest.warns(UserWarning, match=r"no signal updates bundle\(s\) \['b_two'\]"):
        BundleConfig(sub_bases={"a": 8}, bundles={**bundles, "b_two": {"rank": 8, "sub_bases": ["a"], "signals": {}}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BundleConfig(sub_bases={"a": 8}, bundles=bundles)


# ---- anything as a config ----

WORDS = st.sampled_from(["", "a", "b_one", "keys", "x-y", "common", "mlp", "null", "é", "1"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats(allow_nan=True) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
FIELDS = [f.name for f in fields(BundleConfig) if f.name not in {f.name for f in fields(PeftConfig)}]
SPEC = st.dictionaries(st.sampled_from([*(f.name for f in fields(BundleSpec)), "ranks"]), ANYTHING, max_size=2)
GOOD = {"rank": 4, "sub_bases": ["a"], "signals": {"lm": 1.0}}


@settings(max_examples=1000, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=2), SPEC, st.booleans(), st.sampled_from([8, 64]))
def test_a_malformed_config_gets_a_sentence(values, spec, listed, hidden_size):
    """It is taken, with shapes that fit, or refused with what is wrong; no other error."""
    bundles = [{"name": "b_one", **GOOD, **spec}] if listed else {"b_one": {**GOOD, **spec}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = BundleConfig(**{"sub_bases": {"a": 4}, "bundles": bundles, **values})
            bundle_shapes(config, hidden_size)
    except ValueError as error:
        assert len(str(error)) > 20
