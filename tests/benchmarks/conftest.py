"""What the tests of the benchmarks share."""

import importlib

import pytest


@pytest.fixture
def module(monkeypatch, repository):
    """Imports a module of `benchmarks/`, which is a directory of scripts and no package."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "quality"))
    return importlib.import_module
