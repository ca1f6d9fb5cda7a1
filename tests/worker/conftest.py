"""A model for tests to which it does not matter what a model says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model_helpers import make_reference, save_reference


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small random model, many times quicker than the bundled one."""
    return save_reference(make_reference("llama"), tmp_path_factory.mktemp("tiny"))
