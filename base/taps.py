"""How taps of teachers are named."""

from __future__ import annotations

from typing import Any, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class TapRef(str):
    """A tap of an entry of `stores`: `<store>.<tap>`, under which a batch and the recipe have what a teacher says.

    Beside a dense tap stand, under names of their own, the cells that have a source (`valid`) and, in a batch, the
    cells that the store holds (`present`).
    """

    @classmethod
    def of(cls, store: str, tap: str) -> Self:
        """The tap of a store."""
        return cls(f"{store}.{tap}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError where the text has not both parts."""
        store, dot, tap = text.partition(".")
        if not (store and dot and tap):
            raise ValueError(f"'{text}' must be <store>.<tap>, such as lidar.boxes")
        return cls(text)

    @property
    def store(self) -> str:
        """The entry of `stores`."""
        return self.partition(".")[0]

    @property
    def tap(self) -> str:
        """The tap's name in the store."""
        return self.partition(".")[2]

    @property
    def valid(self) -> str:
        """Name of the cells that have a source, bool [B, 1, H, W]."""
        return f"{self}.valid"

    @property
    def present(self) -> str:
        """Name of the cells that the store holds, bool [B, H, W]."""
        return f"{self}.present"

    def beside(self, tap: str) -> Self:
        """Another tap of the same store."""
        return self.of(self.store, tap)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(str)
        return core_schema.no_info_after_validator_function(cls.parse, core_schema.str_schema(), serialization=written)
