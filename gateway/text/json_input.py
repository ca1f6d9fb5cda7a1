"""JSON that clients send, decoded; what is wrong with it in their words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Raw

from kvasir.protocol.errors import BadRequest

_PLACE = re.compile(r"(.*?)(?: - at `(key` in `)?\$(.*)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(\w+)`")


def read_json(raw: bytes | str | Raw, kind: Any, param: str = "") -> Any:
    """Return the JSON `raw` as a `kind`. `param`: the field that it is the value of; "": the body.

    Raises:
        BadRequest: no valid JSON, or not of that kind; `param` names the place.
    """
    return read_by(lambda: msgspec.json.decode(raw, type=kind), param)


def read_by(decode: Callable[[], Any], param: str = "") -> Any:
    """Return what `decode` makes of JSON; as `read_json` otherwise."""
    what = param or "the body"
    try:
        return decode()
    except msgspec.ValidationError as error:
        found = _PLACE.fullmatch(str(error))
        assert found is not None
        message, of_key, path = found.groups("")
        where = f"{param}{path}".lstrip(".")
        if field := _FIELD.fullmatch(message):
            where = f"{where}.{field[2][:80]}".lstrip(".")
            what = "is missing, and required" if field[1].startswith("missing") else "is not known here; leave it out"
            raise BadRequest(f"{where} {what}", param=where) from None
        shown = f"a key of {where}" if of_key else where
        raise BadRequest(f"{shown}: {message}" if where else message, param=where or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{what} is no valid JSON: {error}", param=param or None) from None
    except RecursionError:
        raise BadRequest(f"{what} is nested too deeply", param=param or None) from None
