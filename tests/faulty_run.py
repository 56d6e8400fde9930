"""Runs that are made to fail: `python -m faulty_run [SIZE PLACE]`, one order a line on its input.

    {"kind": "change", "count": 7, "arguments": ["--config", ...], "out": "/somewhere/out"}

Each order is a run of its own in a process group of its own, forked from this warm process, so that
two hundred of them take minutes; the answer is its exit code, negative for a signal. A line with a
list of orders makes these runs at the same time; the answer is the list of their exit codes.

- never: nothing happens to it;
- change: SIGKILL to the whole group, workers included, before the count-th rename or link, which is
  what others can see of a disk;
- publish: the same before the count-th stage is published;
- step: the same before the count-th step of an optimizer;
- moment: the same `count` seconds after the start;
- limit: no file may grow beyond `count` bytes;
- unprivileged: permissions hold, for root too;
- mount: no run, but `mount` with these arguments.

With SIZE and PLACE, all of them see a file system of SIZE of their own at PLACE. The first line of
the output is "ready", or why there can be no such file system.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of <sched.h>
DROP_RIGHT, RIGHTS = 24, (1, 2)  # PR_CAPBSET_DROP; CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
SET_RIGHTS_VERSION = 0x20080522
NEEDED = ("distributed", "torch", "torch._dynamo", "matplotlib.backends.backend_svg", "scipy.stats",
          "sklearn.manifold", "pandas", "pyarrow.parquet", "cdp.clusterer", "cdp.recognizer",
          "cdp.training", "pipelines.pages.figures", "pipelines.run")  # fmt: skip
"""What a run imports, its optimizer and its report included: here once for all of them."""


def kill_group() -> None:
    os.killpg(0, signal.SIGKILL)


def kill_before(owner, name: str, left: list[float]) -> None:
    """Replace a function by one that counts its calls and does not come to the last."""
    original = getattr(owner, name)

    def counted(*arguments, **options):
        left[0] -= 1
        if left[0] <= 0:
            kill_group()
        return original(*arguments, **options)

    setattr(owner, name, counted)


def arm(kind: str, count: float) -> None:
    left = [count]
    if kind == "change":
        for name in ("replace", "rename", "symlink", "link"):
            kill_before(os, name, left)
    elif kind == "publish":
        from pipelines.store import Store

        kill_before(Store, "publish", left)
    elif kind == "step":
        from torch.optim import Optimizer

        kill_before(Optimizer, "zero_grad", left)
    elif kind == "moment":
        timer = threading.Timer(count, kill_group)
        timer.daemon = True
        timer.start()
    elif kind == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(count), int(count)))
    elif kind == "unprivileged" and os.geteuid() == 0:
        give_up_rights()


def give_up_rights() -> None:
    """Root's rights over other people's permissions, for this process and those it starts."""
    system = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(SET_RIGHTS_VERSION, 0)
    held = (ctypes.c_uint32 * 6)()
    for right in RIGHTS:
        if system.prctl(DROP_RIGHT, right, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "cannot give up a right")
    if system.capget(header, held):
        raise OSError(ctypes.get_errno(), "cannot read the rights")
    for position in range(3):  # effective, permitted, inheritable; the first 32 rights
        for right in RIGHTS:
            held[position] &= ~(1 << right)
    if system.capset(header, held):
        raise OSError(ctypes.get_errno(), "cannot set the rights")


def mount_own(size: str, place: str) -> str:
    """A file system of this process's own; "ready", or why not."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS):
        return f"no mounts of one's own: {os.strerror(ctypes.get_errno())}"
    for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={size}", "own", place]):
        done = subprocess.run(["mount", *command], capture_output=True, text=True)
        if done.returncode:
            return f"mount {' '.join(command)}: {done.stderr.strip()}"
    return "ready"


def run(kind: str, count: float, arguments: list[str], out: str) -> int:
    from pipelines.run import main

    os.setsid()
    output = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)
    arm(kind, count)
    return main(arguments)


def obey(order: dict | list[dict]) -> int | list[int]:
    if isinstance(order, list):
        return [wait(child) for child in [begin(each) for each in order]]
    if order["kind"] == "mount":
        return subprocess.run(["mount", *order["arguments"]], stdout=sys.stderr).returncode
    return wait(begin(order))


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begin(order: dict) -> int:
    """The id of the process of one run."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = run(**order)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    print(mount_own(*sys.argv[1:]) if sys.argv[1:] else "ready", flush=True)
    for name in NEEDED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(obey(json.loads(line)), flush=True)
