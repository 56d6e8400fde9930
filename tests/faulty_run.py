"""Runs that kill themselves: `python -m faulty_run`, one order a line on standard input.

    {"kind": "change", "count": 7, "arguments": ["--config", ...], "out": "/somewhere/out"}

Each order is a run of its own in a process group of its own, forked from this warm process, so that
two hundred of them take minutes; the answer is its exit code, negative for a signal. The whole
group, workers included, gets SIGKILL

- change: right before the count-th rename or link, what others can see of a disk;
- step: right before the count-th step of an optimizer;
- moment: `count` seconds after the start;
- never: not at all.
"""

import importlib
import json
import os
import signal
import sys
import threading
import traceback


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
    elif kind == "step":
        from torch.optim import Optimizer

        kill_before(Optimizer, "zero_grad", left)
    elif kind == "moment":
        timer = threading.Timer(count, kill_group)
        timer.daemon = True
        timer.start()


def run(kind: str, count: float, arguments: list[str], out: str) -> int:
    from pipelines.run import main

    os.setsid()
    told = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(told, 1)
    os.dup2(told, 2)
    sys.stdout.reconfigure(line_buffering=True)
    arm(kind, count)
    return main(arguments)


def obey(order: dict) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
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
    for name in ("distributed", "torch", "cdp.clusterer", "cdp.recognizer", "pipelines.run"):
        importlib.import_module(name)
    for line in sys.stdin:
        print(obey(json.loads(line)), flush=True)
