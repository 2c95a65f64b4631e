"""The presets, as data: which bundles there are, which part of the basis each uses, and which signals update it.

A preset is a pair of tables: `sub_bases` (name -> rank, as a fraction of the hidden size d) and `bundles` (name -> the
fields of a `BundleSpec`). `BundleConfig(preset=...)` reads them. `docs/concepts.md` explains signals and owners.
"""

from __future__ import annotations

from typing import Any


SIDE = 0.3  # weight of a signal in bundles that it updates a little and does not own

TOPICS = ("animals", "ml", "programming", "finance", "law", "medical")

SIGNALS = (
    "lm",
    "logic",
    "meta_correctness",
    "calibration",
    "confusion",
    "consistency",
    "contrastive",
    "temporal",
    "policy",
    "value",
    "advantage",
    "curiosity",
    "preference",
    "entropy",
    "kl",
)

# Ranks are fractions of d, small enough that the six sub-bases together take 0.85 d.
COGNITIVE_SUB_BASES = {
    "mem": 0.30,
    "logic": 0.20,
    "abstraction": 0.15,
    "temporal": 0.10,
    "meta": 0.05,
    "policy": 0.05,
}

COGNITIVE: dict[str, dict[str, Any]] = {
    "b_mem_global": {
        "rank": 0.30,
        "sub_bases": ["mem"],
        "signals": {"lm": 1.0, "logic": 0.05, "calibration": SIDE},
    },
    "b_logic_global": {
        "rank": 0.20,
        "sub_bases": ["logic"],
        "signals": {"logic": 1.0, "meta_correctness": SIDE},
    },
    "b_abstraction": {
        "rank": 0.15,
        "sub_bases": ["abstraction"],
        "signals": {"lm": 1.0, "logic": 1.0, "contrastive": 1.0},
    },
    "b_temporal": {
        "rank": 0.10,
        "sub_bases": ["temporal"],
        "signals": {"temporal": 1.0, "policy": SIDE, "value": SIDE},
    },
}

CONTROL: dict[str, dict[str, Any]] = {
    "b_meta": {
        "rank": 0.05,
        "sub_bases": ["meta"],
        "signals": {
            "meta_correctness": 1.0,
            "calibration": 1.0,
            "confusion": SIDE,
            "consistency": SIDE,
            "value": SIDE,
            "preference": SIDE,
        },
    },
    "b_policy": {
        "rank": 0.05,
        "sub_bases": ["policy"],
        "role": "signal",
        "signals": {
            "policy": 1.0,
            "preference": 1.0,
            "entropy": 1.0,
            "kl": 1.0,
            "advantage": SIDE,
            "curiosity": SIDE,
        },
    },
}

SEMANTIC: dict[str, dict[str, Any]] = {
    f"b_sem_{topic}": {
        "rank": 0.03,
        "sub_bases": ["mem", "abstraction"],
        "role": "semantic",
        "topic": topic,
        "signals": {"lm": SIDE, "logic": SIDE},
    }
    for topic in TOPICS
}

ERRORS: dict[str, dict[str, Any]] = {
    name: {"rank": 0.03, "sub_bases": ["meta", "policy", "abstraction"], "role": "signal", "signals": signals}
    for name, signals in {
        "b_err_confusion": {"confusion": 1.0, "meta_correctness": 1.0},
        "b_err_consistency": {"consistency": 1.0, "meta_correctness": 1.0},
        "b_err_calibration": {"calibration": 1.0},
    }.items()
}

RL: dict[str, dict[str, Any]] = {
    "b_rl_value": {
        "rank": 0.05,
        "sub_bases": ["policy", "temporal", "meta"],
        "role": "signal",
        "signals": {"value": 1.0},
    },
    "b_rl_advantage": {
        "rank": 0.05,
        "sub_bases": ["policy", "temporal"],
        "role": "signal",
        "signals": {"advantage": 1.0, "curiosity": 1.0, "policy": SIDE},
    },
}


def _affective(rank: float, signals: dict[str, float], topic: str | None = None) -> dict[str, Any]:
    return {"rank": rank, "sub_bases": ["affect", "social"], "role": "semantic", "topic": topic, "signals": signals}


def _own(sub_basis: str, rank: float, *signals: str, **fields: Any) -> dict[str, Any]:
    return {"rank": rank, "sub_bases": [sub_basis], "signals": dict.fromkeys(signals, 1.0), **fields}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "baseline": {"sub_bases": {}, "bundles": {}},
    "single_adapter": {
        "sub_bases": {"main": 0.75},
        "bundles": {"b_main": _own("main", 0.75, *SIGNALS)},
    },
    "all_overlap": {
        "sub_bases": {"ssl": 0.05, "policy": 0.05, "value": 0.05, "common": 0.20},
        "bundles": {
            "b_ssl": _own("ssl", 0.20, "lm", "logic", "contrastive", overlap=0.8),
            "b_rl_policy": _own("policy", 0.20, "policy", "preference", "entropy", "kl", role="signal", overlap=0.8),
            "b_rl_value": _own("value", 0.20, "value", "advantage", "curiosity", role="signal", overlap=0.8),
        },
    },
    "ssl_rl_separate": {
        "sub_bases": {"ssl": 0.375, "rl": 0.375},
        "bundles": {
            "b_ssl_main": _own("ssl", 0.18, "lm", bottleneck=0.84),
            "b_ssl_semantic": _own("ssl", 0.12, "lm", bottleneck=0.84, role="semantic"),
            "b_rl_policy": _own("rl", 0.10, "policy", bottleneck=0.84, role="signal"),
            "b_rl_value": _own("rl", 0.08, "value", bottleneck=0.84, role="signal"),
            "b_rl_explore": _own("rl", 0.05, "entropy", bottleneck=0.84, role="signal"),
            "b_rl_anchor": _own("rl", 0.06, "kl", bottleneck=0.84, role="signal"),
        },
    },
    "full_modular": {
        "sub_bases": COGNITIVE_SUB_BASES,
        "bundles": {**COGNITIVE, **CONTROL, **SEMANTIC, **ERRORS},
    },
    "affective_social": {
        "sub_bases": {"mem": 0.30, "abstraction": 0.15, "affect": 0.15, "social": 0.15, "policy": 0.05, "meta": 0.05},
        "bundles": {
            "b_mem_global": COGNITIVE["b_mem_global"],
            "b_abstraction": COGNITIVE["b_abstraction"],
            "b_affect_valence": _affective(0.05, {"lm": SIDE, "contrastive": SIDE}, "emotion"),
            "b_affect_arousal": _affective(0.03, {"lm": SIDE, "contrastive": SIDE}, "emotion"),
            "b_affect_tone": _affective(0.05, {"lm": SIDE, "preference": SIDE}, "tone"),
            "b_social_empathy": _affective(0.05, {"lm": SIDE, "preference": SIDE}, "empathy"),
            "b_social_norms": _affective(0.05, {"lm": SIDE, "preference": SIDE}, "norms"),
            "b_social_mind": _affective(0.05, {"lm": SIDE, "consistency": 1.0}, "theory_of_mind"),
            "b_social_persona": _affective(0.03, {"lm": SIDE, "consistency": SIDE}, "persona"),
            "b_policy": CONTROL["b_policy"],
            "b_meta": CONTROL["b_meta"],
            "b_err_calibration": {**ERRORS["b_err_calibration"], "sub_bases": ["meta", "policy", "abstraction"]},
        },
    },
    "feedback_isolated": {
        "sub_bases": {"ssl": 0.30, "preference": 0.12, "policy": 0.12, "value": 0.08, "critique": 0.12},
        "bundles": {
            "b_ssl": _own("ssl", 0.30, "lm", "logic"),
            "b_fb_preference": _own("preference", 0.12, "preference", role="signal"),
            "b_fb_reward": _own("policy", 0.12, "policy", "entropy", "kl", role="signal"),
            "b_fb_value": _own("value", 0.08, "value", "advantage", role="signal"),
            "b_fb_critique": _own("critique", 0.12, "meta_correctness", "calibration", role="signal"),
        },
    },
    # The support of each semantic bundle is a part of a cognitive bundle's support, shared with that bundle.
    "hierarchical": {
        "sub_bases": {
            "mem": 0.25,
            "mem_animals": 0.05,
            "logic": 0.15,
            "logic_programming": 0.05,
            "abstraction": 0.10,
            "abstraction_law": 0.05,
        },
        "bundles": {
            "b_mem_global": {**COGNITIVE["b_mem_global"], "sub_bases": ["mem", "mem_animals"]},
            "b_logic_global": {**COGNITIVE["b_logic_global"], "sub_bases": ["logic", "logic_programming"]},
            "b_abstraction": {**COGNITIVE["b_abstraction"], "sub_bases": ["abstraction", "abstraction_law"]},
            "b_sem_animals": {**SEMANTIC["b_sem_animals"], "sub_bases": ["mem_animals"]},
            "b_sem_programming": {**SEMANTIC["b_sem_programming"], "sub_bases": ["logic_programming"]},
            "b_sem_law": {**SEMANTIC["b_sem_law"], "sub_bases": ["abstraction_law"]},
        },
    },
    "cognitive_semantic_split": {
        "sub_bases": {"mem": 0.30, "logic": 0.20, "abstraction": 0.15, "temporal": 0.10, "semantic": 0.15},
        "bundles": {
            **COGNITIVE,
            **{name: {**spec, "sub_bases": ["semantic"]} for name, spec in SEMANTIC.items()},
        },
    },
    "taxonomy": {
        "sub_bases": COGNITIVE_SUB_BASES,
        "bundles": {**COGNITIVE, **CONTROL, **SEMANTIC, **ERRORS, **RL},
    },
}
"""The presets by name, for `BundleConfig(preset=...)`. `print(model.bundle_report())` shows the bundles of one.

- "single_adapter": one bundle that every signal updates. The control for one common adapter.
- "all_overlap": text, policy and value in three bundles that share 80% of their support.
- "ssl_rl_separate": text and RL in orthogonal halves of the basis, and a bundle for each RL signal.
- "feedback_isolated": text, preferences, reward, value and critique, each in its own part of the basis.
- "full_modular": memory, logic, abstraction, temporal, meta, policy, six topics and three kinds of error.
- "taxonomy": "full_modular" with a bundle for PPO's value and one for its advantage and curiosity.
- "cognitive_semantic_split": cognitive and topic bundles in orthogonal parts of the basis.
- "hierarchical": each topic bundle lies inside the support of a cognitive one.
- "affective_social": bundles for emotion, tone, empathy, norms and persona beside memory, policy and meta.
- "baseline": no bundle; the base model itself is trained. The control for plain fine-tuning.
"""
