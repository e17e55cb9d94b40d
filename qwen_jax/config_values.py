"""From nested mappings to frozen dataclasses, strictly, and the checks their fields use.

Holds no knob: those are in `config.py` and `config_alignment.py`.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


def require(condition: bool, field: str, value: Any, fix: str) -> None:
    """Raises a ValueError with field, value and fix unless the condition holds."""
    if not condition:
        raise ValueError(f"{field} = {value!r}: {fix}")


def build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """An instance of the dataclass `cls` from a mapping; `prefix` is the dotted name of it.

    Raises:
      ValueError: an unknown key (the nearest legal one is named), a missing key, a wrong type or a
        number that is not finite.
    """
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ValueError(f"{prefix}{key}: unknown key; {advice}")
    missing = [key for key in hints if key not in values]
    if missing:
        raise ValueError(f"missing keys: {', '.join(prefix + key for key in missing)}")
    return cls(**{key: _convert(hints[key], values[key], prefix + key) for key in hints})


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Checks one value against its annotation; ints pass for floats, bools never for numbers."""
    if isinstance(kind, types.UnionType):  # a group or None
        if value is None:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} = {value!r}: expected a group of settings")
        return build(kind, value, name + ".")
    if isinstance(kind, types.GenericAlias):  # tuple[str, ...]
        if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} = {value!r}: expected a tuple of strings")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(
            f"{name} = {value!r}: expected {kind.__name__}, got {type(value).__name__}"
        )
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} = {value!r}: must be a finite number")
    return value


def require_choice(field: str, value: str, legal: tuple[str, ...]) -> None:
    """Raises a ValueError with the nearest legal value unless the value is legal."""
    near = difflib.get_close_matches(value, legal, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    require(value in legal, field, value, f"{hint}legal: {', '.join(legal)}")
