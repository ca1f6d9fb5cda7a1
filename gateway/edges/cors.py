"""What lets pages of other origins call the HTTP routes from a browser (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from __future__ import annotations

import re
from collections.abc import Collection

from kvasir.gateway.http.parser import HttpRequest
from kvasir.gateway.http.response import HttpResponse

Headers = list[tuple[str, str]]
_NAMES = re.compile(r"[A-Za-z0-9, -]{1,2048}")
_EXPOSED = "x-request-id, x-kvasir-worker, request-id, retry-after, retry-after-ms"


class Cors:
    """`origins`: those that may call, such as `https://chat.example.org`; `*` is all of them."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)

    def headers(self, request: HttpRequest) -> Headers:
        """Return what every answer to `request` has to say."""
        if not self._origins:
            return []
        if "*" in self._origins:
            return [("access-control-allow-origin", "*"), ("access-control-expose-headers", _EXPOSED)]
        origin = request.headers.get("origin", "")
        if origin not in self._origins:
            return [("vary", "origin")]
        allowed = [("access-control-allow-origin", origin), ("access-control-expose-headers", _EXPOSED)]
        return [*allowed, ("vary", "origin")]

    def preflight(self, request: HttpRequest) -> HttpResponse | None:
        """Return the answer to a browser that asks what it may send; None if it does not ask, or may not."""
        if request.method != "OPTIONS" or "access-control-request-method" not in request.headers:
            return None
        headers = self.headers(request)
        if not any(name == "access-control-allow-origin" for name, _ in headers):
            return None
        wanted = request.headers.get("access-control-request-headers", "")
        if _NAMES.fullmatch(wanted):
            headers.append(("access-control-allow-headers", wanted))
        headers += [("access-control-allow-methods", "GET, HEAD, POST"), ("access-control-max-age", "600")]
        return HttpResponse(204, headers=headers)
