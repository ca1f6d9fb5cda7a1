"""Commands that the README prints, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def curl_command() -> str:
    """Return the curl command as printed."""
    found = re.search(r"<!-- curl:.*?-->\n```sh\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, "the README has lost its curl command"
    return found[1]
