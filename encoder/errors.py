"""Errors of the encoder; each class owns its exit code.

EncoderError       1   encoding failed; the message says what to do
└── TowerError     2   the directory is no tower, or is not allowed, damaged, or not the one that was asked for
"""

from __future__ import annotations


class EncoderError(Exception):
    """Base of everything that the encoder raises on purpose. The message is for a person."""

    exit_code = 1


class TowerError(EncoderError, ValueError):
    """The tower cannot be used as it is: choose another directory, or mend this one."""

    exit_code = 2
