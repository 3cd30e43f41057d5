"""The small stand-in for llama.cpp of tests/source, and a second pin: the same a release later."""

from __future__ import annotations

from source.conftest import apex, series, world

__all__ = ["apex", "series", "world"]
