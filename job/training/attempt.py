"""Calls of a user's code, whose errors are told in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from job.errors import GammaslimError, UsageError, is_out_of_memory, located

if TYPE_CHECKING:
    from collections.abc import Callable


def attempt(
    message: str, work: Callable[..., Any], *args: Any, kind: type[GammaslimError] = UsageError
) -> Any:
    """Return ``work(*args)``; raises ``kind``, with the line of the user's code, if it fails.

    Errors of memory are raised as they are.
    """
    try:
        return work(*args)
    except GammaslimError:
        raise
    except Exception as error:  # user code may raise anything
        if is_out_of_memory(error):
            raise
        raise kind(f"{message}: {located(error)}") from error
