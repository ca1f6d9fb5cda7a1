"""What the SDK raises: `KvasirError` and its leaves. `code` is stable, `param` names the request field at fault."""

from kvasir.protocol.errors import (
    AuthenticationFailed,
    BadRequest,
    ConfigurationError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidMessage,
    KvasirError,
    Overloaded,
    PermissionDenied,
    PromptTooLong,
    RequestFailed,
    TooLarge,
    Unavailable,
    UnknownModel,
)

__all__ = [
    "AuthenticationFailed",
    "BadRequest",
    "ConfigurationError",
    "ConnectionLost",
    "DeadlineExceeded",
    "InvalidMessage",
    "KvasirError",
    "Overloaded",
    "PermissionDenied",
    "PromptTooLong",
    "RequestFailed",
    "TooLarge",
    "Unavailable",
    "UnknownModel",
]
