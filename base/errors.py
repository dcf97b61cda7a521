"""The one error that the command line prints without a traceback."""

from __future__ import annotations


class PipelineError(Exception):
    """Something the user can act on: the message names the thing, the value, what is allowed and what to do."""
