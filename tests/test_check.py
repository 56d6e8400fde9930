"""check: every kind of mistake in files, features and models is named before a run costs time."""

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper
from PIL import Image

from pipelines import check
from pipelines.run import main as run

pytestmark = [pytest.mark.torch]
SIDE = 12


def draw_person(person: int, image: int) -> np.ndarray:
    """A pattern in red and green that is the person's; the blue one is another in each image."""
    rng = np.random.default_rng(person)
    own = np.random.default_rng([person, image])
    pattern = rng.integers(40, 216, (4, 4, 3))
    pattern[:, :, 2] = own.integers(40, 216, (4, 4))
    noise = own.normal(size=(SIDE, SIDE, 3)) * 12
    return np.clip(np.kron(pattern, np.ones((3, 3, 1))) + noise, 0, 255).astype(np.uint8)


def save_model(path, mean: float, scale: float, order: list[int]) -> None:
    """A model whose vectors are pixels, after a step that saturates outside the range it wants."""
    want = [helper.make_node("Mul", ["image", "scale"], ["wide"]),
            helper.make_node("Add", ["wide", "mean"], ["pixel"]),
            helper.make_node("Gather", ["pixel", "order"], ["rgb"], axis=1),
            helper.make_node("Mul", ["rgb", "weight"], ["weighted"]),
            helper.make_node("Sub", ["weighted", "middle"], ["centred"]),
            helper.make_node("Tanh", ["centred"], ["flat"]),
            helper.make_node("Flatten", ["flat"], ["embedding"])]  # fmt: skip

    def constant(name, value):
        kind = TensorProto.INT64 if value.dtype == np.int64 else TensorProto.FLOAT
        return helper.make_tensor(name, kind, value.shape, value.ravel())

    weight = np.array([1.0, 0.5, 0.02], np.float32).reshape(1, 3, 1, 1) / 60
    constants = [constant("scale", np.full(1, scale, np.float32)),
                 constant("mean", np.full(1, mean, np.float32)),
                 constant("order", np.array(order, np.int64)), constant("weight", weight),
                 constant("middle", 127 * weight)]  # fmt: skip
    shape = ["n", 3, SIDE, SIDE]
    graph = helper.make_graph(
        want, "g", [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 3 * SIDE * SIDE])],
        constants,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
              path)  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """Eight labelled people, a pile, models of their own folder, a manifest and a config."""
    root, models = tmp_path / "data", tmp_path / "models"
    models.mkdir()
    for person in range(8):
        for image in range(4):
            folder = root / ("staff" if person < 6 else "pile") / f"p{person}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_person(person, image)).save(folder / f"{image}.png")
    save_model(models / "signed_bgr.onnx", 127.5, 127.5, [2, 1, 0])
    save_model(tmp_path / "elsewhere.onnx", 0.0, 255.0, [0, 1, 2])
    (models / "unit.onnx").symlink_to(tmp_path / "elsewhere.onnx")

    def write(base, **manifest):
        described = {"name": "m", "kind": "images", "size_px": SIDE, "labelled": {"root": "staff"},
                     "unlabelled": {"root": "pile"}, **manifest}  # fmt: skip
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(described))
        members = [{"name": "second", "onnx": "unit.onnx"}]
        config = {"data": "data.yaml", "knn": {"k": 3},
                  "committee": {"base": base, "members": members}}  # fmt: skip
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        return ["--config", str(tmp_path / "c.yaml"), "--data-root", str(root), "--models-dir",
                str(models)]  # fmt: skip

    write.root, write.out = root, tmp_path
    return write


def test_a_model_is_shown_what_separates_people(place, capsys):
    arguments = place({"name": "first", "onnx": "signed_bgr.onnx"})
    assert check.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "labelled: 24 images of 6 people" in printed
    assert "first is shown BGR in -1..1: it separates the labelled people better so" in printed
    assert "second is shown RGB in" in printed
    assert "checked: nothing to object to" in printed


def test_a_wrong_preset_is_named(place, capsys):
    arguments = place({"name": "first", "onnx": "signed_bgr.onnx", "preset": "sface"})
    assert check.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "warning: member first is probably shown the wrong pixels: RGB in 0..255" in printed
    assert "BGR in -1..1" in printed
    assert "checked: 1 warnings" in printed


def test_mistakes_of_files_are_named(place, capsys):
    (place.root / "staff" / "p0" / "@eaDir").mkdir()
    (place.root / "staff" / "p0" / "2023").mkdir()
    (place.root / "staff" / "p0" / "0.png").rename(place.root / "staff" / "p0" / "2023" / "0.png")
    (place.root / "staff" / "P1 ").mkdir()
    Image.fromarray(draw_person(1, 9)).save(place.root / "staff" / "P1 " / "9.png")
    for number in range(9):
        wide = np.hstack([draw_person(7, number), draw_person(8, number)])
        Image.fromarray(wide).save(place.root / "pile" / f"{number}.png")
    (place.root / "pile" / "a.psd").write_bytes(b"8BPS" + bytes(99))
    assert check.main(place({"name": "first", "onnx": "signed_bgr.onnx"})) == 0
    printed = capsys.readouterr().out
    assert "1 images lie in deeper folders: the first folder is the person" in printed
    assert "left out: a folder in which a server or desktop keeps files" in printed
    assert "'P1 ', 'p1'" in printed
    assert "warning: unlabelled: 9 of 17 pictures looked at are not square" in printed
    assert "warning: Photoshop is not read" in printed
    assert "folders are no people" in printed


def test_errors_stop_a_run_at_its_head(place, capsys):
    arguments = place({"name": "first", "onnx": "gone.onnx"})
    assert check.main(arguments) == 2
    assert "no file" in capsys.readouterr().err
    arguments = place({"name": "first", "onnx": "signed_bgr.onnx", "output": "x"})
    assert run([*arguments, "--runs-dir", str(place.out / "runs"), "--until", "embed",
                "--workers", "1"]) == 2  # fmt: skip
    printed = capsys.readouterr()
    assert "one output (n, d) named 'x' expected, found: embedding" in printed.err
    assert not (place.out / "runs" / "c" / "ingest").exists()


def test_features_out_of_order_are_noticed(tmp_path, capsys):
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(10), 5)
    vectors = rng.normal(size=(10, 16))[person] + 0.2 * rng.normal(size=(50, 16))
    for split in ("l", "u"):
        folder = tmp_path / split / "features"
        folder.mkdir(parents=True)
        (tmp_path / split / "list.txt").write_text("".join(f"{i}\n" for i in range(50)))
        vectors.astype(np.float32).tofile(folder / "good.bin")
        rng.permutation(vectors).astype(np.float32).tofile(folder / "mixed.bin")
    (tmp_path / "l" / "meta.txt").write_text("".join(f"{p}\n" for p in person))
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "f",
                "kind": "features",
                "labelled": {"root": "l"},
                "unlabelled": {"root": "u"},
            }
        )
    )
    committee = {"base": {"name": "good", "features": "good"},
                 "members": [{"name": "mixed", "features": "mixed"}]}  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": "data.yaml", "committee": committee}))
    assert check.main(["--config", str(tmp_path / "c.yaml"), "--data-root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "view good, labelled: 50 x 16 float32" in printed
    assert "warning: view mixed: one labelled person's vectors are nearer" in printed
    assert "warning: view good" not in printed
