"""Tests of evaluation use the tasks that tests of tasks use, and a cache of their own."""

from tests.tasks.conftest import _own_cache, pairs, rte, stsb

__all__ = ["_own_cache", "pairs", "rte", "stsb"]
