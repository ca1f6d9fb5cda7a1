"""Commands that the README prints, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def curl_command(mark: str = "curl") -> str:
    """Return the curl command as printed after `mark`."""
    found = re.search(rf"<!-- {mark}:.*?-->\n```sh\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, f"the README has lost its {mark} command"
    return found[1]
