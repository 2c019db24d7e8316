"""Collections of garbage are rare while something is loaded, and as before afterwards."""

from __future__ import annotations

import gc

import pytest

from pymistral import ModelBuilder
from pymistral.errors import ModelLoadError
from pymistral.garbage import rare_collections


def test_thresholds_come_back_when_the_last_one_leaves():
    before = gc.get_threshold()
    first, second = rare_collections(), rare_collections()
    first.__enter__()
    second.__enter__()
    rarely = gc.get_threshold()
    assert rarely[0] > before[0]
    first.__exit__(None, None, None)
    assert gc.get_threshold() == rarely
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_a_model_that_cannot_be_loaded_leaves_them_as_they_were(tmp_path):
    before = gc.get_threshold()
    with pytest.raises(ModelLoadError):
        ModelBuilder(str(tmp_path / "missing.gguf")).load()
    assert gc.get_threshold() == before
