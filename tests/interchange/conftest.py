"""Fixtures: the package diffusers, where it is installed."""

import pytest


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed: requirements-dev.txt")
