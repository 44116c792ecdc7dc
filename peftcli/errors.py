"""What a run may end with: one exception class per documented exit code.

A user's mistake is a `UserError`: its message alone is shown, never a traceback. Everything else
that escapes is our mistake and shows one.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

# of disks: full, over quota, too large a file, read-only, broken, gone from the network
OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


class UserError(ValueError):
    """Something the user can put right. The message says what was given, what is allowed, and what
    to change.
    """

    exit_code = 1


class ConfigError(UserError):
    """A key, a value or an argument is wrong."""

    exit_code = 2


class NotApplicable(ConfigError):  # noqa: N818 - a property of the method
    """The method does not apply to this model: nothing to train there, or no place for it."""


class DataError(UserError):
    """A data file, an adapter or a checkpoint is missing, broken or of the wrong kind."""

    exit_code = 3


class OutOfMemory(UserError):  # noqa: N818
    """The device has not enough memory for the step."""

    exit_code = 4


class NonFinite(UserError):  # noqa: N818
    """Loss or gradients are not finite; nothing of them reached the weights."""

    exit_code = 5


class Stopped(UserError):  # noqa: N818
    """A signal asked the run to stop; a checkpoint was written and the run can be resumed."""

    exit_code = 75


class RankEnded(UserError):  # noqa: N818
    """A rank of the run ended early, with the message and the exit code that it left."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def first_sentence(error: Exception) -> str:
    """What a library's error says first, for a message of ours."""
    text = " ".join(str(error).split())
    return re.split(r"(?<=[.!?]) ", text)[0] or type(error).__name__


def nearest(given: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The entries of `allowed` that look most like `given`, best first; empty where nothing is
    close.
    """
    return difflib.get_close_matches(given, list(allowed), n=count, cutoff=0.5)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """' Did you mean X or Y?', or nothing where no entry of `allowed` is close to `given`."""
    near = nearest(given, allowed)
    return f" Did you mean {' or '.join(near)}?" if near else ""
