"""A run that kills itself: `python -m faulty_run EVENTS <arguments of pipelines.run>`.

Counts what changes the disk for others to see (renames and links) and kills its whole process
group, workers included, right before the EVENTS-th: the moments at which a torn table would show.
"""

import os
import signal
import sys


def watch(left: int) -> None:
    def wrap(change):
        def changed(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.killpg(0, signal.SIGKILL)
            return change(*arguments, **options)

        return changed

    for name in ("replace", "rename", "symlink", "link"):
        setattr(os, name, wrap(getattr(os, name)))


if __name__ == "__main__":
    watch(int(sys.argv[1]))
    from pipelines.run import main

    raise SystemExit(main(sys.argv[2:]))
