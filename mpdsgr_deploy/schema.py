"""Typed documents: TOML and JSON files that pydantic models check, with errors that say what to write instead."""

import json
import tomllib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mpdsgr_deploy.errors import InputError

M = TypeVar("M", bound=BaseModel)


def _fraction(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            return value  # for which pydantic raises an error
    return value


Number = Annotated[float, BeforeValidator(_fraction), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
UnitInterval = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """The base of all sections. Unknown keys and wrong types are errors, and values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises InputError if it cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}") from None


def override(values: dict[str, Any], overrides: Sequence[str], *, example: str) -> None:
    """Set values in nested tables by overrides `section.key=value`, in place.

    A value is TOML, or else taken as a string. Raises InputError for an override of another form, for which it shows
    `example`, and for one in which a section is a value.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        *sections, name = key.strip().split(".")
        if not (equals and sections and all((*sections, name))):
            raise InputError(f"--set {text!r}: write it as section.key=value, for example {example}")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise InputError(f"--set {text!r}: {section!r} must be a section")
        try:
            table[name] = tomllib.loads(f"x = {value.strip()}")["x"]
        except tomllib.TOMLDecodeError:
            table[name] = value.strip()


def to_toml(values: dict[str, Any], table: str = "") -> str:
    """Return nested tables of strings, numbers, booleans and lists as TOML. Tables in a list are written inline.

    table: the dotted name of `values`; "" for the whole document.
    """
    entries = {key: value for key, value in values.items() if not isinstance(value, dict)}
    blocks = [f"{key} = {_inline(value)}\n" for key, value in entries.items()]
    head = f"[{table}]\n" if table and (entries or not values) else ""
    parts = [head + "".join(blocks)] if head or entries else []
    inner = {key: value for key, value in values.items() if key not in entries}
    return "\n".join(parts + [to_toml(value, f"{table}.{key}" if table else key) for key, value in inner.items()])


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def read_json(path: Path, *, otherwise: str) -> Any:
    """Read a JSON file. Raises InputError, which ends in the advice `otherwise`, if it is missing or damaged."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {otherwise}") from None
    return _from_json(text, str(path), otherwise)


def _from_json(text: str | bytes, source: str, otherwise: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{source} is damaged (not JSON); {otherwise}") from None


def read_document(path: Path, model: type[M], *, otherwise: str) -> M:
    """Read a JSON file of this package as `model`. otherwise: advice on how to get a valid file.

    Raises InputError if it is missing, and as `parse_document` does.
    """
    return _document(read_json(path, otherwise=otherwise), model, str(path), otherwise)


def parse_document(text: str, model: type[M], source: str, *, otherwise: str) -> M:
    """Return JSON that this package wrote as `model`. source: what errors call it; otherwise: how to get valid JSON.

    Raises InputError if it is damaged, has no schema_version or one above the model's default, or does not fit the
    model.
    """
    return _document(_from_json(text, source, otherwise), model, source, otherwise)


def _document(values: Any, model: type[M], source: str, otherwise: str) -> M:
    version = model.model_fields["schema_version"].default
    written = values.get("schema_version") if isinstance(values, dict) else None
    if type(written) is not int or written < 1:
        raise InputError(f"{source} has no valid schema_version; {otherwise}")
    if written > version:
        raise InputError(
            f"{source} has schema version {written}, and this mpdsgr-deploy reads {version}; upgrade mpdsgr-deploy"
        )
    return parse(model, values, source)


def parse(model: type[M], values: Any, source: str) -> M:
    """Return `values` as `model`. Raises InputError, in one line with `source` and the keys, if they do not fit it."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {'; '.join(_explain(model, e) for e in error.errors())}") from None


def _explain(model: type[BaseModel], error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path) or "the document"
    if error["type"] == "extra_forbidden":
        section: Any = model
        for part in path[:-1]:
            fields = getattr(section, "model_fields", {})
            section = fields[part].annotation if part in fields else None
        allowed = getattr(section, "model_fields", None)  # None below a list or a table with free keys
        return f"unknown key {key!r}" + (f"; allowed here: {', '.join(allowed)}" if allowed else "")
    message = "must be a list" if error["type"] == "tuple_type" else error["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}, got {error['input']!r}" if path[1:] else f"{key}: {message}"
