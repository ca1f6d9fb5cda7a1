"""Incremental detokenisation: the tokens of an answer to text that stays, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from kvasir.gateway.text.stop_strings import StopStrings


class Detokenizer:
    """Token ids of one answer, a few at a time, to text that will not change any more.

    Holds back incomplete characters, and whatever could be the beginning of a stop string. `stopped` is set once a
    stop string was found; the text then ends before it and later tokens are ignored. The pushes together give exactly
    `ModelText.decode` of all ids, cut at the first stop string (after it with `keep_stop`). Text of the first
    `min_tokens` tokens is no stop string. `end_token_ids`: for its user, who does not push them.
    """

    __slots__ = (
        *("_held", "_keep_stop", "_num_free", "_rest", "_stops", "_token_bytes"),
        *("end_token_ids", "stop_string", "stopped"),
    )

    def __init__(
        self,
        token_bytes: list[bytes],
        stop: tuple[str, ...],
        end_token_ids: tuple[int, ...],
        *,
        keep_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._token_bytes = token_bytes
        self.end_token_ids = end_token_ids
        self._rest = b""  # the beginning of a character
        self._stops = StopStrings(stop) if stop else None
        self._keep_stop = keep_stop
        self._num_free = min_tokens if stop else 0  # tokens still to come that end nothing
        self._held = ""
        self.stopped = False
        self.stop_string: str | None = None  # that was found

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` complete."""
        if self.stopped:
            return ""
        if self._num_free:
            return self._push_free(token_ids)
        token_bytes = self._token_bytes
        data = self._rest + b"".join([token_bytes[token_id] for token_id in token_ids if token_id < len(token_bytes)])
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[num_used:]
        return self._until_stop(self._stops, text) if self._stops else text

    def _push_free(self, token_ids: Sequence[int]) -> str:
        """Push tokens; a stop string in the first `_num_free` of them ends nothing."""
        stops, num_free = self._stops, self._num_free
        self._stops, self._num_free = None, 0
        text = self.push(token_ids[:num_free])
        self._stops, self._num_free = stops, max(0, num_free - len(token_ids))
        return text + (self.push(token_ids[num_free:]) if len(token_ids) > num_free else "")

    def finish(self) -> str:
        """Return what was held back: the answer ends here."""
        if self.stopped:
            return ""
        rest, self._rest = self._rest.decode("utf-8", "replace"), b""
        text = self._until_stop(self._stops, rest) if self._stops else rest
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _until_stop(self, stops: StopStrings, text: str) -> str:
        """Return the part of held + `text` that is sure to stay; keep the rest."""
        num_before = len(self._held)
        found = stops.push(text)
        text = self._held + text
        if found is not None:
            self.stopped = True
            self._held = ""
            end = num_before + found[0]
            begin = end - found[1]
            self.stop_string = text[begin:end]
            return text[: end if self._keep_stop else begin]
        num_sure = len(text) - stops.num_open
        self._held = text[num_sure:]
        return text[:num_sure]
