"""Settings of a model or a scheduler, read from its config.json and written to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all of them: subclasses' fields are those of the published file, with its defaults.

    `title` is the word for it in messages. Checks are in `__post_init__`, which raises ValueError.
    """

    title: ClassVar[str] = "model"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Config from the content of a file; keys starting with `_` are notes and dropped, lists become tuples.

        Raises:
            ValueError: listing the keys that are not fields.
        """
        kept = {key: _as_tuple(value) for key, value in values.items() if not key.startswith("_")}
        if unknown := sorted(kept.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"unknown fields in the {cls.title} config: {', '.join(unknown)}")
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for the file."""
        return asdict(self)


def check_choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(sorted(map(str, allowed)))}; got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a whole number from 1 up."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 up")


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value
