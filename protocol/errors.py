"""Every error that Kvasir raises or sends: one root, few leaves, one table of HTTP statuses.

An error's message is one sentence or two: what is wrong, which one, what now. `code` is stable and travels on every
wire (`ErrorInfo`), so that a client gets back the class that the gateway raised.
"""

from __future__ import annotations

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An error on the wire. `param` names the offending field, `retry_after_s` says when trying again makes sense."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class KvasirError(Exception):
    """Root of all errors. `code` is stable, `param` names a request field if one is at fault."""

    code = "internal_error"
    http_status = 500

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def info(self) -> ErrorInfo:
        """Return the error as it travels on the wire."""
        return ErrorInfo(self.code, self.message, self.param, self.retry_after_s)


class BadRequest(KvasirError):
    """The request itself is wrong: sending it again cannot help."""

    code = "invalid_request"
    http_status = 400


class InvalidMessage(BadRequest):
    """Bytes that are no message of ours: not MessagePack, unknown fields, over-long lists, wrong types."""

    code = "invalid_message"


class PromptTooLong(BadRequest):
    """Prompt plus answer do not fit the model's window or the workers' KV pool."""

    code = "context_length_exceeded"


class AuthenticationFailed(KvasirError):
    """No key, an unknown or a revoked key, or a disabled tenant."""

    code = "invalid_api_key"
    http_status = 401


class PermissionDenied(KvasirError):
    """A known tenant asks for what it may not have."""

    code = "permission_denied"
    http_status = 403


class UnknownModel(KvasirError):
    """No model of that name is served here."""

    code = "model_not_found"
    http_status = 404


class NotFound(KvasirError):
    """No such tenant, key, prefix or path."""

    code = "not_found"
    http_status = 404


class MethodNotAllowed(KvasirError):
    """This path takes another HTTP method."""

    code = "method_not_allowed"
    http_status = 405


class Conflict(KvasirError):
    """It exists already, or somebody else holds it."""

    code = "conflict"
    http_status = 409


class TooLarge(KvasirError):
    """A body or frame above its bound."""

    code = "too_large"
    http_status = 413


class Overloaded(KvasirError):
    """A queue is full: try again after `retry_after_s`."""

    code = "overloaded"
    http_status = 429


class RateLimited(KvasirError):
    """The caller has reached one of its limits: try again after `retry_after_s`."""

    code = "rate_limit_exceeded"
    http_status = 429


class BudgetExceeded(KvasirError):
    """The caller's budget is used up; `retry_after_s` is when its window ends."""

    code = "insufficient_quota"
    http_status = 429


class Unavailable(KvasirError):
    """No worker can take the request now (starting, lost, draining)."""

    code = "unavailable"
    http_status = 503


class DeadlineExceeded(KvasirError):
    """The request's deadline passed before it was finished."""

    code = "deadline_exceeded"
    http_status = 504


class RequestFailed(KvasirError):
    """The request was tried and failed for good: workers died under it (poison) or the engine refused it."""

    code = "request_failed"
    http_status = 500


class ConnectionLost(KvasirError):
    """The gateway cannot be reached, or went away in mid-stream (client side)."""

    code = "connection_lost"
    http_status = 502


class ConfigurationError(KvasirError):
    """A setting, socket, file or folder that does not allow a start."""

    code = "configuration_error"


class ModelError(ConfigurationError):
    """A model folder that cannot be served: missing or truncated files, unsupported architecture, too big."""

    code = "model_error"


class StoreError(ConfigurationError):
    """The tenant store cannot be read or written, or has a newer schema."""

    code = "store_error"


def _leaves(root: type[KvasirError]) -> dict[str, type[KvasirError]]:
    found = {root.code: root}
    for leaf in root.__subclasses__():
        found.update(_leaves(leaf))
    return found


BY_CODE: dict[str, type[KvasirError]] = _leaves(KvasirError)
"""The table: stable code -> class; the class carries the HTTP status."""


def from_info(info: ErrorInfo) -> KvasirError:
    """Return the error that `info` stands for; an unknown code (a newer peer) becomes the root class."""
    error = BY_CODE.get(info.code, KvasirError)(info.message, param=info.param, retry_after_s=info.retry_after_s)
    error.code = info.code
    return error
