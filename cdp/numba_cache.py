"""Where numba keeps compiled code when neither the code nor the home folder can be written.

matplotlib, which keeps a list of fonts below the home folder, is given a folder in the same way.

The contract:
- numba looks beside each module, then below the user's cache folder; where both are read-only it
  refuses to compile. `choose_folder` then names a folder for temporary files in NUMBA_CACHE_DIR,
  which processes started later inherit. A folder that the user named stays.
- The folder belongs to this user alone: what lies in it is run.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

VARIABLE = "NUMBA_CACHE_DIR"
FONTS_VARIABLE = "MPLCONFIGDIR"


def choose_folder() -> None:
    """Set NUMBA_CACHE_DIR where numba would find no folder to write to; call it before numba."""
    if VARIABLE in os.environ or _can_write(os.path.dirname(__file__)):
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if _can_write(cache):
        return
    try:
        os.environ[VARIABLE] = _make_own_folder("cdp-numba")
    except OSError:
        return  # nothing can be written anywhere: numba's own message follows


def choose_font_folder() -> None:
    """Set MPLCONFIGDIR where matplotlib could not write below the home folder; else each process
    would list all fonts anew and say so on the terminal."""
    home = os.path.expanduser("~")
    places = [
        os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config"),
        os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"),
    ]
    if FONTS_VARIABLE not in os.environ and not all(map(_can_write, places)):
        with suppress(OSError):  # nothing can be written anywhere: matplotlib says so
            os.environ[FONTS_VARIABLE] = _make_own_folder("cdp-matplotlib")


def _make_own_folder(name: str) -> str:
    """A folder for temporary files that belongs to this user alone, the same in each process.

    Raises
    ------
    OSError
        No folder for temporary files can be written.
    """
    import tempfile

    own = os.path.join(tempfile.gettempdir(), f"{name}-{os.getuid()}")
    return own if _is_mine(own) else tempfile.mkdtemp(prefix=f"{name}-")


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
