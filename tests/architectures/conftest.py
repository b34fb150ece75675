"""One workshop for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.architectures.workshop import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("architectures")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MERGELAB_CACHE", str(folder / "cache"))
        yield Workshop(folder)
