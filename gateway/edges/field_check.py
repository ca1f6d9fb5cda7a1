"""Reads the bodies of requests by the table of fields (`request_fields`).

A field that is not in the table is refused with the nearest name that is honoured, and a refused field passes only with
a value that changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import msgspec
from msgspec import Raw

from kvasir.gateway.edges.request_fields import FIELDS, Place
from kvasir.gateway.text.json_input import read_by
from kvasir.protocol.errors import BadRequest

MAX_VALUE_BYTES = 65_536  # of a field that is honoured, but for
_MAX_BYTES = {"messages": 8 << 20, "prompt": 8 << 20, "content": 8 << 20, "documents": 1 << 20, "tools": 1 << 20}
_MAX_BYTES |= {"input": 8 << 20, "instructions": 4 << 20, "system": 4 << 20}
_MAX_BYTES |= {"tool_calls": 4 << 20, "reasoning": 4 << 20, "reasoning_content": 4 << 20}


class FieldCheck:
    """Checks the fields of one kind of object: a field that would change the answer is honoured or refused."""

    def __init__(self, place: Place) -> None:
        self._rows = {name: row for row in FIELDS if place in row.places for name in row.names.split()}
        self.honoured = [name for name, row in self._rows.items() if row.verdict == "honoured"]
        names = [(name, Raw, None) for name in self._rows]
        self._type = msgspec.defstruct(place, names, forbid_unknown_fields=True)

    def with_harmless(self, honoured: type[msgspec.Struct], *others: tuple[Any, ...]) -> Any:
        """Return `honoured` with the harmless fields added, undecoded, and `others` as `defstruct` takes them."""
        harmless = [(name, Raw, None) for name, row in self._rows.items() if row.verdict == "harmless"]
        name = honoured.__name__
        return msgspec.defstruct(
            name, [*others, *harmless], bases=(honoured,), kw_only=True, forbid_unknown_fields=True
        )

    def honoured_of(self, raw: Raw | bytes, where: str = "") -> dict[str, Raw]:
        """Return the honoured fields of the object `raw`, undecoded. `where`: what its names are shown after.

        Raises:
            BadRequest: an unknown field, a refused one that would change the answer, or a value that is large (it
                would take long to decode); `param` names it.
            msgspec.DecodeError: no JSON object.
        """
        try:
            values = msgspec.json.decode(raw, type=self._type)
        except msgspec.ValidationError as error:
            found = re.search(r"unknown field `(.*?)`$", str(error), re.DOTALL)
            if found is None:
                raise
            name = found[1][:80]  # to compare a long one would take long
            near = get_close_matches(name, self.honoured, 1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out; docs/api.md lists those there are"
            param = where + name
            raise BadRequest(f"{param} is not known here: {hint}", param=param) from None
        kept = {}
        for name, row in self._rows.items():
            value, param = getattr(values, name), where + name
            if value is None or row.verdict == "harmless":
                continue
            if row.verdict == "honoured":
                most = _MAX_BYTES.get(name, MAX_VALUE_BYTES)
                if len(value) > most:
                    raise BadRequest(f"{param} has {len(value)} bytes, {most} are allowed", param=param)
                kept[name] = value
            elif len(value) > 64 or msgspec.json.decode(value) not in (None, *row.off):
                raise BadRequest(f"{param} is not supported here: {row.note}; leave it out", param=param)
        return kept


def decode_body(
    fields: FieldCheck,
    decoder: msgspec.json.Decoder[Any],
    raw: bytes,
    check: Callable[[dict[str, Any]], None] = lambda kept: None,
) -> Any:
    """Return the typed body: at once if all its fields are honoured or harmless, else by the table. `check` does for
    objects inside the body what `fields` does for it.

    Raises:
        BadRequest: no valid JSON, not of its type, or as `FieldCheck.honoured_of`.
    """

    def by_the_table() -> Any:
        kept: dict[str, Any] = fields.honoured_of(raw)
        check(kept)
        return decoder.decode(msgspec.json.encode(kept))

    try:
        if len(raw) <= MAX_VALUE_BYTES:
            return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # the table says better what is wrong
    return read_by(by_the_table, decoder.type)
