"""What the SDK raises: `KvasirError` and its leaves. `code` is stable, `param` names the request field at fault."""

from kvasir.protocol.errors import (
    AuthenticationFailed,
    BadRequest,
    BudgetExceeded,
    ConfigurationError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidMessage,
    KvasirError,
    Overloaded,
    PermissionDenied,
    PromptTooLong,
    RateLimited,
    RequestFailed,
    TooLarge,
    Unavailable,
    UnknownModel,
)

__all__ = [
    "AuthenticationFailed",
    "BadRequest",
    "BudgetExceeded",
    "ConfigurationError",
    "ConnectionLost",
    "DeadlineExceeded",
    "InvalidMessage",
    "KvasirError",
    "Overloaded",
    "PermissionDenied",
    "PromptTooLong",
    "RateLimited",
    "RequestFailed",
    "TooLarge",
    "Unavailable",
    "UnknownModel",
]
