"""A setting that chooses a method: its name, or a mapping of its settings."""

from __future__ import annotations

from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from schemas.errors import UserError
from schemas.settings import Settings
from stages import registry


class MethodSettings:
    """Pydantic annotation: the settings of a method of one kind, chosen by the key `tag`.

    Accepts a mapping, or the bare name of a method for its defaults. A user's own class is named by its
    import path and brings its own settings class.
    """

    def __init__(self, kind: str, tag: str = "method", default: str | None = None):
        self.kind, self.tag, self.default = kind, tag, default

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {n: handler(registry.resolve(self.kind, n).Config) for n in registry.names(self.kind)}

        def chosen(value: Any, built_in: Any) -> Any:
            """The settings, by the class that the tag names; `built_in` is there for the JSON schema."""
            if isinstance(value, Settings):
                return value
            if isinstance(value, str):
                value = {self.tag: value}
            if isinstance(value, dict) and self.default:
                value = {self.tag: self.default, **value}
            if not isinstance(value, dict) or not isinstance(value.get(self.tag), str):
                known = {"tag": self.tag, "allowed": ", ".join(choices), "given": shortened(value)}
                raise PydanticCustomError(
                    "said", "must name a {tag}, as in {{tag}: NAME}, given {given}; allowed: {allowed}", known
                )
            try:
                cls = registry.resolve(self.kind, value[self.tag])
            except UserError as error:
                raise PydanticCustomError("said", "{reason}", {"reason": str(error)}) from error
            return cls.Config.model_validate(value)

        return core_schema.no_info_wrap_validator_function(
            chosen,
            core_schema.tagged_union_schema(choices, discriminator=self.tag),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value.model_dump(mode="json")
            ),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        """A mapping for one of the methods, its bare name, or a mapping for a class of the user's own."""
        mappings: list[Any] = handler(schema)["oneOf"]
        if not self.default:
            mappings = [{"allOf": [mapping, {"required": [self.tag]}]} for mapping in mappings]
        path = {"type": "string", "pattern": ".:."}
        own = {"type": "object", "required": [self.tag], "properties": {self.tag: path}}
        return {"anyOf": [*mappings, own, {"enum": registry.names(self.kind)}, path]}


def shortened(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
