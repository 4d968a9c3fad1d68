"""Where a part of a run finds itself."""

import os
import socket

from opd.errors import RunError


def enter(folder: str) -> None:
    """Let paths of the recipe begin where the command was run. Raises RunError on a node that has no such folder."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise RunError(
            f"{socket.gethostname()} cannot enter '{folder}', where this run was started ({error.strerror}); start it in a folder "
            "that all nodes share"
        ) from None
