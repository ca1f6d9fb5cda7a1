"""What people touch: the client SDK (`from kvasir import Client, AsyncClient`) and the command line."""

import importlib.util as _importlib_util
import os as _os
from pathlib import Path as _Path


def _require_own_protocol() -> None:
    """Refuse to go on if `protocol` is somebody else's module: its name is flat, and the current folder comes first.

    Looks at files only, so that nothing of the other module is executed.
    """
    own = _Path(__file__).resolve().parent.parent / "protocol"
    try:
        spec = _importlib_util.find_spec("protocol")
    except (ImportError, ValueError):  # ValueError: a module without a spec was put into sys.modules by hand
        spec = None
        found = "a module without a file"
    else:
        found = "nothing" if spec is None else str(spec.origin or list(spec.submodule_search_locations or ()))
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    parts = ("client_messages.py", "codec.py", "errors.py", "tokens.py")
    if any(all(_os.path.exists(_os.path.join(folder, part)) for part in parts) for folder in folders):
        return
    raise ImportError(
        f"kvasir needs its own package `protocol` (installed at {own}), but `import protocol` finds {found}. "
        "Rename that module, or start Python where it does not come first (python -P leaves the script's folder out); "
        "if nothing was found, install kvasir-gateway again.",
        name="protocol",
    )


_require_own_protocol()

from kvasir import errors  # noqa: E402
from kvasir._session import Chunk, Completion, Options  # noqa: E402
from kvasir.async_client import AsyncClient, AsyncStream  # noqa: E402
from kvasir.client import Client, Stream  # noqa: E402
from protocol.client_messages import ModelCard, Usage  # noqa: E402
from protocol.errors import KvasirError  # noqa: E402

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Chunk",
    "Client",
    "Completion",
    "KvasirError",
    "ModelCard",
    "Options",
    "Stream",
    "Usage",
    "errors",
]
