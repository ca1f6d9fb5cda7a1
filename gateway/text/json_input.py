"""JSON that clients send, decoded; what is wrong with it in their words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Raw, inspect

from kvasir.protocol.errors import BadRequest

_PLACE = re.compile(r"(.*?)(?: - at `(key` in `)?\$(.*)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(\w+)`")
_CHOICE = re.compile(r"Invalid enum value (.*)", re.DOTALL)
_STEP = re.compile(r"\.(\w+)|\[\d+\]")


def read_json(raw: bytes | str | Raw, kind: Any, param: str = "") -> Any:
    """Return the JSON `raw` as a `kind`. `param`: the field that it is the value of; "": the body.

    Raises:
        BadRequest: no valid JSON, or not of that kind; `param` names the place.
    """
    return read_by(lambda: msgspec.json.decode(raw, type=kind), kind, param)


def read_by(decode: Callable[[], Any], kind: Any, param: str = "") -> Any:
    """Return what `decode` makes of JSON, a `kind`; as `read_json` otherwise."""
    what = param or "the body"
    try:
        return decode()
    except msgspec.ValidationError as error:
        raise _refusal(str(error), kind, param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{what} is no valid JSON: {error}", param=param or None) from None
    except RecursionError:
        raise BadRequest(f"{what} is nested too deeply", param=param or None) from None


def _refusal(text: str, kind: Any, param: str) -> BadRequest:
    """Return what msgspec says is wrong with the field `param`, a `kind`: what, where, and what would be right."""
    found = _PLACE.fullmatch(text)
    assert found is not None
    message, of_key, path = found.groups("")
    where = f"{param}{path}".lstrip(".")
    if field := _FIELD.fullmatch(message):
        where = f"{where}.{field[2][:80]}".lstrip(".")
        what = "is missing, and required" if field[1].startswith("missing") else "is not known here; leave it out"
        return BadRequest(f"{where} {what}", param=where)
    if choice := _CHOICE.fullmatch(message):
        known = ", ".join(_choices(inspect.type_info(kind), [step[1] for step in _STEP.finditer(path)]))
        message = f"{choice[1][:80]} is none of those known here: {known}"
    shown = f"a key of {where}" if of_key else where
    return BadRequest(f"{shown}: {message}" if where else message, param=where or None)


def _choices(kind: inspect.Type, path: list[str | None]) -> Iterator[str]:
    """Return the texts that are allowed at `path` of a `kind`: names of fields, None for an item."""
    match kind:
        case inspect.UnionType(types):
            for each in types:
                yield from _choices(each, path)
        case inspect.LiteralType(values) if not path:
            yield from map(repr, values)
        case inspect.ListType(item_type) if path and path[0] is None:
            yield from _choices(item_type, path[1:])
        case inspect.StructType(fields=fields) if path:
            for field in fields:
                if field.encode_name == path[0]:
                    yield from _choices(field.type, path[1:])
