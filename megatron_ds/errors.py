"""What a user may do wrong, and how we say so: one message, no traceback, an exit code that scripts can read."""

from __future__ import annotations

from collections.abc import Sequence

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_FAULT = 5
EXIT_RESUBMIT = 75
"""Saved and wants to be resubmitted (EX_TEMPFAIL of sysexits.h)."""
EXIT_TERMINATED = 128 + 15
"""Told to stop with nowhere to save to: resubmitting it would start over for ever."""


class UserError(Exception):
    """A mistake that the user can mend: what it is about, what was found, what was expected, one way out."""

    exit_code = EXIT_FAULT

    def __init__(self, subject: str, found: str = "", expected: str = "", fix: str = ""):
        self.subject, self.found, self.expected, self.fix = subject, found, expected, fix
        super().__init__(self.render())

    def render(self) -> str:
        lines = [self.subject]
        for label, text in (("found", self.found), ("expected", self.expected), ("fix", self.fix)):
            if text:
                lines.append(f"    {label + ':':10}{text}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.subject, self.found, self.expected, self.fix)


class ConfigError(UserError):
    """A flag, or several flags together, ask for something impossible."""

    exit_code = EXIT_CONFIG


class ConfigErrors(ConfigError):
    """All broken rules of one command line at once."""

    def __init__(self, errors: Sequence[ConfigError]):
        self.errors = tuple(errors)
        super().__init__("\n".join(error.render() for error in self.errors))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errors,)


class DataError(UserError):
    """A dataset or tokenizer file is missing, damaged or does not fit the model."""

    exit_code = EXIT_DATA


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit the model."""

    exit_code = EXIT_CHECKPOINT


class RunFault(UserError):
    """Something broke while training: a lost rank, a full disk, a non-finite loss."""

    exit_code = EXIT_FAULT
