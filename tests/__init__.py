"""Tests mirror the packages; benchmarks live in tests/bench."""
