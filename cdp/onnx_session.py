"""ONNX sessions: a model of unknown origin, opened on the CPU within bounds.

The contract:
- A model is one file of at most `MODEL_BYTES`, without weights in other files and without operators
  but onnxruntime's own; all sessions of a process share `ARENA_BYTES` of memory.
- A session computes deterministically with the threads it is given, and no thread spins.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from cdp.errors import DataError

MODEL_BYTES = 1 << 30
_STARTS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS: fetch the model with `git lfs pull`"),
    (b"PK\x03\x04", "it is an archive or a PyTorch checkpoint: unpack it, or export it to ONNX"),
    (b"<", "it is a page, not a model: download the file itself"),
)
"""First bytes of files that are taken for models, and what to do."""
_CAUSES = (
    (
        "external data",
        "its weights lie in another file, which is not read. Write one file: "
        "onnx.save(onnx.load(old), new)",
    ),
    ("opset", "its opset is newer than this onnxruntime knows. Export it with opset 17"),
    (
        "ir version",
        "its IR version is newer than this onnxruntime knows. Set model.ir_version = 8 and save "
        "it, or export it with opset 17",
    ),
)
"""Words of onnxruntime's messages, and what to do."""
ARENA_BYTES = 4 << 30


@cache
def _bound_memory() -> None:
    """Register, once a process, the arena that all sessions share."""
    import onnxruntime

    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    place = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    bounds = onnxruntime.OrtArenaCfg({"max_mem": ARENA_BYTES})
    onnxruntime.create_and_register_allocator(place, bounds)


def open_session(model: bytes, threads: int, name: str) -> Any:
    """Open a model.

    Parameters
    ----------
    model : bytes
        The file.
    threads : int
        Of one run of the model.
    name : str
        Used in messages.

    Returns
    -------
    session : onnxruntime.InferenceSession

    Raises
    ------
    DataError
        Too large, no ONNX model, or one that leaves its bounds.
    """
    import onnxruntime

    if len(model) > MODEL_BYTES:
        raise DataError(f"{name}: {len(model)} bytes, at most {MODEL_BYTES} expected")
    _bound_memory()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # an error is raised too; its message need not come twice
    # A waiting thread that spins takes the core from the process beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Weights in other files would be looked for here, where nothing can be.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", f"{os.devnull}/nothing"
    )
    try:
        return onnxruntime.InferenceSession(
            model, sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise DataError(f"{name}: an ONNX model expected, {_explain(model, error)}") from error


def _explain(model: bytes, error: Exception) -> str:
    """Why a model cannot be opened, and what to do where that is known."""
    if not model:
        return "and the file is empty"
    known = next((advice for start, advice in _STARTS if model.startswith(start)), None)
    if known is not None:
        return f"and {known}"
    text = str(error)
    for words, advice in _CAUSES:
        if words in text.lower():
            return f"and {advice}"
    return f"onnxruntime says: {text.splitlines()[0][:200]}"
