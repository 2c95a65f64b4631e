"""Make BUNDLE known to PEFT, whose `PeftType` is a closed enum without plug-ins (facts: huggingface/peft#2273)."""

from __future__ import annotations

from peft.utils import PeftType


def add_peft_type(name: str) -> None:
    """Add a member to PEFT's enum of adapter types; does nothing if it is there (a later PEFT, a second import)."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    vars(member).update(_name_=name, _value_=name, _sort_order_=len(PeftType), __objclass__=PeftType)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


add_peft_type("BUNDLE")
