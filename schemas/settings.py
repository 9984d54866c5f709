"""The base of every piece of configuration: frozen, and closed to keys that it does not know."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Configuration of one thing. Lives beside its owner; each field says its unit and its source."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, content: Any) -> Any:
        """`extra` refuses them too, but does not say which there are."""
        for key in content if isinstance(content, dict) else ():
            if key not in cls.model_fields:
                allowed = ", ".join(sorted(cls.model_fields))
                raise PydanticCustomError(
                    "said", "unknown key {key}; allowed: {allowed}", {"key": repr(key), "allowed": allowed}
                )
        return content

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1, and `yes` is true in YAML."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise PydanticCustomError("said", "must be a number, given {given}", {"given": repr(value)})
        return value
