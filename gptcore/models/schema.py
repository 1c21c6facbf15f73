"""Checked, frozen specifications: dataclasses that know their TOML section and refuse what they don't know.

A ``Spec`` subclass is a frozen dataclass whose annotations are the schema. Types are checked on construction
(a list becomes a tuple, an int becomes a float where a float is wanted), names and types are checked by
``from_dict``, and every error names the key as the user wrote it, ``model.attention.num_heads``.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union

from gptcore.errors import UserError, unknown_name

if typing.TYPE_CHECKING:
    from typing_extensions import Self


class Spec:
    """Base of every specification; ``section`` is its place in the configuration file."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            value = _checked(getattr(self, name), hint, _key(self.section, name))
            object.__setattr__(self, name, value)
        self.validate()

    def validate(self) -> None:
        """Raises ``UserError`` where values don't fit together; called after the types are right."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the specification from nested plain values; refuses an unknown key by its nearest name."""
        if not isinstance(values, Mapping):
            raise UserError(f"{cls.section}: expected a table of keys, got {_describe(values)}")
        hints = _hints(cls)
        arguments = {}
        for name, value in values.items():
            if name not in hints:
                known = [_key(cls.section, known) for known in hints]
                raise unknown_name("key", _key(cls.section, name), known)
            nested = _nested(hints[name])
            arguments[name] = nested.from_dict(value) if nested and not isinstance(value, nested) else value
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values for TOML or JSON; what is None (derived from the other values) is left out."""
        result: dict[str, Any] = {}
        for name in _hints(type(self)):
            value = getattr(self, name)
            if isinstance(value, Spec):
                result[name] = value.to_dict()
            elif value is not None:
                result[name] = [_plain(item) for item in value] if isinstance(value, tuple) else value
        return result

    def merged(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with the nested ``overrides`` laid over it, checked as ``from_dict`` checks."""
        return type(self).from_dict(_merge(self.to_dict(), overrides))


def at_least(section: str, low: float, **values: float | None) -> None:
    """Raises ``UserError`` for the first of ``values`` that is below ``low`` or not finite; None passes.

    ``section`` is prefixed to the name, as in ``"data."``.
    """
    for name, value in values.items():
        if value is not None and not low <= value < float("inf"):
            raise UserError(f"{section}{name}: expected {low} or more, got {value}")


def _key(section: str, name: str) -> str:
    """A key as the user wrote it; the outermost specification has no section."""
    return f"{section}.{name}" if section else name


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Spec) else value


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in overrides.items():
        inner = result.get(name)
        nested = isinstance(value, Mapping) and isinstance(inner, Mapping)
        result[name] = _merge(inner, value) if nested else value  # type: ignore[arg-type]
    return result


def _hints(cls: type) -> dict[str, Any]:
    """Field name to resolved annotation, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _nested(hint: Any) -> type[Spec] | None:
    """The specification that a field holds, if it holds one (or None)."""
    options = (option for option in _options(hint) if isinstance(option, type))
    return next((option for option in options if issubclass(option, Spec)), None)


def _checked(value: Any, hint: Any, where: str) -> Any:
    """``value`` if it fits the annotation, converted where no information is lost; an error otherwise."""
    for option in _options(hint):
        converted = _convert(value, option)
        if converted is not _MISFIT:
            return converted
    choices = [str(c) for option in _options(hint) for c in _literal_choices(option)]
    if choices and isinstance(value, str):
        raise unknown_name(where, value, choices)
    expected = " or ".join(_name(option) for option in _options(hint) if option is not type(None))
    raise UserError(f"{where}: expected {expected}, got {_describe(value)}")


_MISFIT = object()


def _convert(value: Any, option: Any) -> Any:
    """``value`` as one alternative of an annotation, or ``_MISFIT``."""
    origin = typing.get_origin(option)
    if origin is Literal:
        return value if isinstance(value, str) and value in typing.get_args(option) else _MISFIT
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return _MISFIT
        items = [_convert_any(item, typing.get_args(option)[0]) for item in value]
        return _MISFIT if any(item is _MISFIT for item in items) else tuple(items)
    if option is float:
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if numeric else _MISFIT
    if option is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _MISFIT
    if isinstance(option, type) and issubclass(option, Spec) and isinstance(value, Mapping):
        return option.from_dict(value)
    return value if isinstance(value, option) else _MISFIT


def _convert_any(value: Any, hint: Any) -> Any:
    results = (_convert(value, option) for option in _options(hint))
    return next((result for result in results if result is not _MISFIT), _MISFIT)


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _literal_choices(option: Any) -> tuple[Any, ...]:
    if typing.get_origin(option) is tuple:
        option = typing.get_args(option)[0]
    return typing.get_args(option) if typing.get_origin(option) is Literal else ()


def _name(option: Any) -> str:
    choices = _literal_choices(option)
    if choices:
        kind = "a list of" if typing.get_origin(option) is tuple else "one of"
        return f"{kind} {', '.join(map(repr, choices))}"
    if typing.get_origin(option) is tuple:
        item = typing.get_args(option)[0]
        is_table = isinstance(item, type) and issubclass(item, Spec)
        return "a list of tables" if is_table else f"a list of {_name(item)}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(
        option, f"a {getattr(option, '__name__', option)}"
    )


def _describe(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
