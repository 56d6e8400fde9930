"""members: an embedder is opened once a process, and again when its file has changed."""

import os
from pathlib import Path

import numpy as np
import pytest

from cdp.embedding import BackboneEmbedder
from cdp.errors import DataError
from cdp.models import build_backbone, save_model
from cdp.restoration import build_restorer, restore_faces, save_restorer
from pipelines.config import MemberSettings
from pipelines.members import open_embedder, open_view

pytestmark = pytest.mark.torch

FACES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)


def write_model(path: Path, seed: int, changed_ns: int) -> np.ndarray:
    """Write a backbone with a given time of change; its vectors of `FACES`."""
    backbone = build_backbone("plain", input_px=16, embedding_dim=8, width=0.5, seed=seed)
    save_model(path, backbone)
    os.utime(path, ns=(changed_ns, changed_ns))
    return BackboneEmbedder(backbone, device="cpu").embed(FACES)[0]


def test_an_embedder_is_kept_until_its_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    before = write_model(path, 0, 1_000)
    opened = open_embedder(path, "cpu")
    assert open_embedder(path, "cpu") is opened
    np.testing.assert_array_equal(opened.embed(FACES)[0], before)
    after = write_model(path, 1, 2_000)
    np.testing.assert_array_equal(open_embedder(path, "cpu").embed(FACES)[0], after)
    assert not np.array_equal(before, after)


def test_a_file_without_a_model_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"no model")
    with pytest.raises(DataError, match="safetensors model expected"):
        open_embedder(path, "cpu")


class Root:
    """The part of a data set that finds files."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def locate(self, path: str) -> Path:
        return self.place / path


def test_a_member_sees_restored_faces(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    plain = write_model(path, 0, 1_000)
    restorer = build_restorer(8, 1)
    save_restorer(tmp_path / "restorer.safetensors", restorer)
    member = MemberSettings(
        name="base", checkpoint="base.safetensors", restore="restorer.safetensors"
    )
    found = open_view(Root(tmp_path), member, path, "cpu").embed(FACES)[0]
    expected = open_embedder(path, "cpu").embed(restore_faces(restorer, FACES))[0]
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, plain)
    without = member.model_copy(update={"restore": None})
    unrestored = open_view(Root(tmp_path), without, path, "cpu").embed(FACES)[0]
    np.testing.assert_array_equal(unrestored, plain)


def test_vectors_cannot_be_restored() -> None:
    with pytest.raises(ValueError, match="restore is for members that see pictures"):
        MemberSettings(name="base", features="base", restore="restorer.safetensors")
