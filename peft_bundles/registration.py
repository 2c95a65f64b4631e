"""Add BUNDLE to `PeftType`. PEFT has no plug-ins, and its enum of types is closed (huggingface/peft#2273)."""

from __future__ import annotations

import warnings

from peft.utils import PeftType


def add_peft_type(name: str) -> None:
    """Add a type of adapter to PEFT's enum, if the enum does not have it."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    vars(member).update(_name_=name, _value_=name, _sort_order_=len(PeftType), __objclass__=PeftType)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


add_peft_type("BUNDLE")
# PEFT asks every model that it wraps for this name, of which transformers 5 warns; users can do nothing about it.
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
