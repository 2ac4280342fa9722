"""A newer server's answers, made of recorded ones: unknown words and unknown fields wherever there may be some."""

from typing import Any

from pydantic import BaseModel

from protocol.assignments import Assignment
from protocol.base import OPEN_WORD, OpenEnum, ResponseModel

WORD = "word_of_tomorrow"
FIELD = "field_of_tomorrow"


def newer(value: Any, raw: Any, *, acted_on: bool = False) -> Any:
    """Return the JSON `raw`, which was read as `value`, as a newer server says it.

    Args:
        acted_on: what is not a message of the server's own gets no fields: a device would have to act on them.
    """
    if isinstance(value, OpenEnum):
        return WORD
    if isinstance(value, BaseModel):
        return _newer_model(value, raw, acted_on=acted_on or isinstance(value, Assignment))
    if isinstance(value, dict):
        return {
            WORD if isinstance(key, OpenEnum) else key: newer(value[key], each, acted_on=acted_on)
            for key, each in zip(value, raw.values(), strict=True)
        }
    if isinstance(value, list):
        return [newer(one, other, acted_on=acted_on) for one, other in zip(value, raw, strict=True)]
    return raw


def _newer_model(value: BaseModel, raw: dict[str, Any], *, acted_on: bool) -> dict[str, Any]:
    changed = dict(raw)
    for name, field in type(value).model_fields.items():
        key = field.alias or name
        if key in raw:
            word = OPEN_WORD in field.metadata
            changed[key] = WORD if word else newer(getattr(value, name), raw[key], acted_on=acted_on)
    if isinstance(value, ResponseModel) or not acted_on:
        changed[FIELD] = {"a": [1]}
    return changed
