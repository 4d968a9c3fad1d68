"""Every error that a user can meet, one line each: the problem, the record, got and expected, the remedy.

Each is an `OpdError` and also the standard exception that a caller would expect, and each survives pickling.
"""

import re

# C0 and C1 controls but tab and newline, lone surrogates, bidirectional overrides
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def without_controls(text: str) -> str:
    """The text with U+FFFD for characters that control a terminal or its writing direction; tabs and newlines stay."""
    return _CONTROL.sub("\ufffd", text)


def one_line(text: str) -> str:
    """The text in one line that is safe to print."""
    return without_controls(" ".join(text.split()))


_MAX_REASON = 200  # characters of somebody's error message


def describe_error(error: BaseException) -> str:
    """The kind of an error and the beginning of its message, safe to print."""
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be read)"
    shown = one_line(text[: 4 * _MAX_REASON])[:_MAX_REASON]
    return type(error).__name__ + (f": {shown}" if shown else "")


class OpdError(Exception):
    """Base of all errors that the user can fix; the command line prints one line and exits with 2."""


class ConfigError(OpdError, ValueError):
    """A recipe or an override that cannot be read, or that asks for something that makes no sense."""


class DataError(OpdError, ValueError):
    """A prompt record or a task that cannot be used; names the file and the line."""


class RewardError(DataError):
    """A reward that raised, or that is no number in [0, 1]; names the prompt and the sample."""


class ModelError(OpdError, ValueError):
    """A model, adapter or tokenizer that cannot be loaded or does not fit the others."""


class CheckError(OpdError, RuntimeError):
    """A start-up check that failed: training would follow wrong numbers."""


class ScoreError(OpdError, ArithmeticError):
    """A teacher's score, a loss or a gradient that is not a number; names the sample."""


class RunError(OpdError, OSError):
    """A run folder that exists, is missing, cannot be written, or does not hold what it should."""


class StalledError(RunError):
    """A run that cannot continue. Its steps are saved, and it can be resumed when the cause is fixed."""


class CallbackError(OpdError, ValueError):
    """A callback that is no callback, or that returned a value that a run cannot use."""
