"""What people touch: the client SDK (`from kvasir import Client, AsyncClient`) and the command line.

Every room of the repository is installed inside this one package (`kvasir.protocol`, `kvasir.gateway`, ...), so that a
user's own `protocol.py` or `worker.py` never stands in the way; in the repository they are links beside this file.
The SDK's names are loaded when they are first asked for: gateway and worker processes never load them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvasir import errors
    from kvasir._answers import Chunk, Completion
    from kvasir._requests import Options
    from kvasir.async_client import AsyncClient, AsyncStream
    from kvasir.client import Client, Stream
    from kvasir.protocol.client_messages import (
        ChatMessage,
        ModelCard,
        ReasoningPart,
        TextPart,
        ToolCall,
        ToolCallPart,
        Usage,
    )
    from kvasir.protocol.errors import KvasirError

    __version__: str

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatMessage",
    "Chunk",
    "Client",
    "Completion",
    "KvasirError",
    "ModelCard",
    "Options",
    "ReasoningPart",
    "Stream",
    "TextPart",
    "ToolCall",
    "ToolCallPart",
    "Usage",
    "__version__",
    "errors",
]

_HOMES = {
    "AsyncClient": "async_client",
    "AsyncStream": "async_client",
    "ChatMessage": "protocol.client_messages",
    "Chunk": "_answers",
    "Client": "client",
    "Completion": "_answers",
    "KvasirError": "protocol.errors",
    "ModelCard": "protocol.client_messages",
    "Options": "_requests",
    "ReasoningPart": "protocol.client_messages",
    "Stream": "client",
    "TextPart": "protocol.client_messages",
    "ToolCall": "protocol.client_messages",
    "ToolCallPart": "protocol.client_messages",
    "Usage": "protocol.client_messages",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("kvasir.errors")
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'kvasir' has no attribute {name!r}")
    return getattr(import_module(f"kvasir.{_HOMES[name]}"), name)


def _version() -> str:
    metadata = import_module("importlib.metadata")
    try:
        return str(metadata.version("kvasir-gateway"))
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


def __dir__() -> list[str]:
    return sorted(__all__)
