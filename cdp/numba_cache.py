"""Where numba keeps compiled code when neither the code nor the home folder can be written.

The contract:
- numba looks beside each module, then below the user's cache folder; where both are read-only it
  refuses to compile. `choose_folder` then names a folder for temporary files in NUMBA_CACHE_DIR,
  which processes started later inherit. A folder that the user named stays.
- The folder belongs to this user alone: what lies in it is run.
"""

from __future__ import annotations

import os
import stat

VARIABLE = "NUMBA_CACHE_DIR"


def choose_folder() -> None:
    """Set NUMBA_CACHE_DIR where numba would find no folder to write to; call it before numba."""
    if VARIABLE in os.environ or _can_write(os.path.dirname(__file__)):
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if _can_write(cache):
        return
    import tempfile

    try:
        own = os.path.join(tempfile.gettempdir(), f"cdp-numba-{os.getuid()}")
        os.environ[VARIABLE] = own if _is_mine(own) else tempfile.mkdtemp(prefix="cdp-numba-")
    except OSError:
        return  # nothing can be written anywhere: numba's own message follows


def _can_write(folder: str) -> bool:
    """Whether a folder, or the nearest one above it that exists, can be written."""
    while not os.path.isdir(folder):
        above = os.path.dirname(folder)
        if above == folder:
            return False
        folder = above
    return os.access(folder, os.W_OK | os.X_OK)


def _is_mine(folder: str) -> bool:
    """Make a folder, or check that nobody else can write to the one there is."""
    try:
        os.mkdir(folder, 0o700)
        return True
    except FileExistsError:
        found = os.lstat(folder)
        mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        return mine and not found.st_mode & 0o077
