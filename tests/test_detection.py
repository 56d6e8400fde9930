"""detection: the cascade's arithmetic by hand, and drawn and real faces found where they are."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from cdp.errors import BackendError, ConfigError, DataError
from cdp.images import detection
from cdp.images.align import align_face
from cdp.images.decode import decode_image
from cdp.images.detection import (
    DetectionSettings,
    Detector,
    cut_boxes,
    make_square,
    shift_boxes,
    suppress,
)
from cdp.synthetic.identities import SyntheticFaces

TWO = np.array([[0, 0, 10, 10], [1, 1, 11, 11]], np.float32)  # they share 81 of 119: .681


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Two drawn faces of different sizes on grey, the larger one at the left."""
    drawn = SyntheticFaces(
        size_px=112, labelled_identities=3, unlabelled_identities=2, evaluation_identities=2,
        images_min=2, images_max=2, evaluation_images=2,
    ).draw(np.array([2, 4]))  # fmt: skip
    image = np.full((180, 260, 3), 120, np.uint8)
    image[30:142, 20:132] = drawn[0]
    image[60:124, 170:234] = cv2.resize(drawn[1], (64, 64), interpolation=cv2.INTER_AREA)
    return image


def test_suppression_by_hand() -> None:
    score = np.array([0.9, 0.8], np.float32)
    assert suppress(TWO, score, 0.7).tolist() == [0, 1]
    assert suppress(TWO, score, 0.5).tolist() == [0]
    assert suppress(TWO, score[::-1], 0.5).tolist() == [1]
    assert suppress(TWO, np.ones(2), 0.5).tolist() == [0]  # of a tie the first
    inner = np.array([[0, 0, 10, 10], [4, 4, 6, 6]], np.float32)  # 4 of 100, 4 of 4
    assert suppress(inner, score, 0.5).tolist() == [0, 1]
    assert suppress(inner, score, 0.5, smaller=True).tolist() == [0]
    assert suppress(TWO[:0], score[:0], 0.5).tolist() == []


def test_boxes_by_hand() -> None:
    shifted = shift_boxes(TWO[:1], np.array([[0.1, 0, -0.1, 0]], np.float32))
    np.testing.assert_allclose(shifted, [[1, 0, 9, 10]], atol=1e-6)
    np.testing.assert_allclose(make_square(shifted), [[0, 0, 10, 10]], atol=1e-6)
    np.testing.assert_allclose(make_square(np.array([[2.0, 0, 4, 10]])), [[-2, 0, 8, 10]])


def test_cuts_are_black_beyond_the_image() -> None:
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3) + 1
    boxes = np.array([[1, 1, 3, 3], [-1, -1, 1, 1], [4, 3, 6, 5], [9, 9, 11, 11], [2, 2, 2, 2]])
    cuts = cut_boxes(image, boxes.astype(float), 2)
    np.testing.assert_array_equal(cuts[0], image[1:3, 1:3])
    for cut, (row, column), place in ((cuts[1], (1, 1), (0, 0)), (cuts[2], (0, 0), (3, 4))):
        np.testing.assert_array_equal(cut[row, column], image[place])
        cut[row, column] = 0
        assert not cut.any()
    assert not cuts[3:].any()


def test_faces_are_found_where_they_are(detector: Detector, photo: np.ndarray) -> None:
    faces = detector.detect(photo)
    assert len(faces) == 2
    assert faces.turn == 0
    assert (np.diff(faces.score) <= 0).all()
    order = faces.box[:, 0].argsort()
    for row, (left, top, side) in zip(order, ((20, 30, 112), (170, 60, 64)), strict=True):
        eyes, mouth = faces.landmarks[row, :2], faces.landmarks[row, 3:]
        assert np.all((faces.landmarks[row] > (left, top)) & (faces.landmarks[row] < left + side))
        assert eyes[0, 0] < eyes[1, 0]
        assert mouth[0, 0] < mouth[1, 0]
        assert eyes[:, 1].max() < mouth[:, 1].min()
        assert 0.5 * side < faces.side_px[row] < 1.2 * side


def test_a_mirrored_photo_has_mirrored_landmarks(detector: Detector, photo: np.ndarray) -> None:
    face = photo[:, :150]
    there, back = detector.detect(face), detector.detect(face[:, ::-1].copy())
    mirrored = back.landmarks[0][[1, 0, 2, 4, 3]]
    mirrored[:, 0] = 149 - mirrored[:, 0]
    np.testing.assert_allclose(there.landmarks[0], mirrored, atol=2.5)


def test_half_pixels(detector: Detector, photo: np.ndarray) -> None:
    """Twice the size, looked for at twice the size: pixel p becomes 2 p + 1/2."""
    double = Detector(DetectionSettings(min_face_px=20))
    one = detector.detect(photo[:, :150])
    two = double.detect(cv2.resize(photo[:, :150], None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC))
    np.testing.assert_allclose(two.landmarks[0], 2 * one.landmarks[0] + 0.5, atol=0.05)
    np.testing.assert_allclose(two.box[0], 2 * one.box[0], atol=0.05)


class Enlarger:
    """Enlarges as the detector does, and counts what it was given."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, small: np.ndarray) -> np.ndarray:
        assert small.shape[1:] == (12, 12, 3)
        assert small.dtype == np.uint8
        self.seen += len(small)
        return np.stack([cv2.resize(each, (48, 48)) for each in small])


def test_small_candidates_alone_are_enlarged(photo: np.ndarray) -> None:
    settings = DetectionSettings(min_face_px=8, turns=False)
    face = photo[:, :150]
    sizes = {}
    for share in (1.0, 0.14):
        enlarger = Enlarger()
        shown = cv2.resize(face, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
        faces = pickle.loads(pickle.dumps(Detector(settings, enlarge=enlarger))).detect(shown)
        alone = Detector(settings).detect(shown)
        again = Detector(settings, enlarge=enlarger).detect(shown)
        np.testing.assert_array_equal(faces.score, again.score)
        sizes[share] = (enlarger.seen, np.array_equal(again.score, alone.score))
        # The face is found where it is found without.
        np.testing.assert_allclose(again.box[0], alone.box[0], atol=0.1 * alone.side_px[0] + 1)
    assert sizes[0.14][0] > 0
    assert not sizes[0.14][1]

    none = Detector(DetectionSettings(min_face_px=40), enlarge=lambda small: 1 / 0)
    assert len(none.detect(face)) == 1


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_turned_photos(detector: Detector, photo: np.ndarray, turn: int) -> None:
    face = photo[20:160, :150]
    upright = detector.detect(face)
    turned = np.rot90(face, -turn // 90).copy()
    found = detector.detect(turned)
    assert found.turn == turn
    np.testing.assert_array_equal(found.score, upright.score)
    # The same face is cut out of either photo.
    crops = [align_face(i, f.landmarks[0]) for i, f in ((face, upright), (turned, found))]
    assert np.abs(crops[0].astype(int) - crops[1]).mean() < 1
    corners = found.box[0].reshape(2, 2)
    inside = (found.landmarks[0] > corners[0]) & (found.landmarks[0] < corners[1])
    assert inside.all()
    still = Detector(DetectionSettings(turns=False, min_score=0.95))
    assert len(still.detect(turned)) == 0


def test_images_without_a_face_give_none(detector: Detector) -> None:
    rng = np.random.default_rng(0)
    for image in (
        np.zeros((80, 90, 3), np.uint8),
        np.full((1, 400, 3), 255, np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        rng.integers(0, 256, (60, 60, 3), dtype=np.uint8),
        np.zeros((10, 10, 3), np.uint8),
    ):
        faces = detector.detect(image)
        assert (len(faces), faces.landmarks.shape[1:]) == (0, (5, 2))
    with pytest.raises(DataError, match=r"\(h, w, 3\) uint8 expected, got \(4, 4\)"):
        detector.detect(np.zeros((4, 4), np.uint8))


def test_landmarks_in_given_boxes(detector: Detector, photo: np.ndarray) -> None:
    found = detector.detect(photo)
    given = detector.locate_landmarks(photo, found.box[::-1])
    np.testing.assert_array_equal(given.box, found.box[::-1])
    np.testing.assert_allclose(given.landmarks, found.landmarks[::-1], atol=4)
    assert len(detector.locate_landmarks(photo, np.empty((0, 4)))) == 0


def test_small_faces_are_left_out_on_request(photo: np.ndarray) -> None:
    faces = Detector(DetectionSettings(min_face_px=70)).detect(photo)
    assert len(faces) == 1
    assert faces.side_px[0] >= 70


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"min_face_px": 2}, "min_face_px: 4 or more"),
        ({"min_score": 1.5}, "between 0 and 1"),
        ({"longest_px": 3}, "longest_px of 12"),
    ],
)
def test_settings_out_of_range(changed: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DetectionSettings(**changed)


def test_a_detector_travels_to_another_process(photo: np.ndarray) -> None:
    detector = Detector(DetectionSettings(min_face_px=40))
    again = pickle.loads(pickle.dumps(detector))
    assert again.settings == detector.settings
    np.testing.assert_array_equal(again.detect(photo).box, detector.detect(photo).box)


def test_missing_and_other_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(detection, "PACKAGE", "no_such_package")
    with pytest.raises(BackendError, match=r"pip install 'cdp\[detect\]'"):
        Detector()
    (tmp_path / "other_nets").mkdir()
    (tmp_path / "other_nets" / "__init__.py").write_text("raise RuntimeError('was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(detection, "PACKAGE", "other_nets")
    with pytest.raises(BackendError, match=r"cannot read .*pnet\.onnx"):
        Detector()
    for name in ("pnet", "rnet", "onet"):
        (tmp_path / "other_nets" / f"{name}.onnx").write_bytes(b"something else")
    with pytest.raises(BackendError, match="not the network this version was written for"):
        Detector()


EXPECTED = {
    "group_6.jpg": (6, 0),
    "view.jpg": (0, 0),
    "mask.jpg": (1, 0),
    "turned_90_a.jpg": (1, 90),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_photos(data_root: Path, name: str) -> None:
    faces = Detector(DetectionSettings(min_score=0.9)).detect(
        decode_image((data_root / "photos/groups" / name).read_bytes())
    )
    assert (len(faces), faces.turn if len(faces) else 0) == EXPECTED[name]


@pytest.mark.long
def test_all_of_the_real_photos(data_root: Path, detector: Detector) -> None:
    found = {
        path.stem: detector.detect(decode_image(path.read_bytes()))
        for path in sorted((data_root / "photos/groups").iterdir())
    }
    assert found["turned_90_b"].turn == 90
    for name in ("profile", "blur", "drawing", "mask", "turned_90_b"):
        assert len(found[name]) == 1, name
    people = sorted((data_root / "photos/people").glob("*/*.jpg"))[::5]
    for share, settings in ((1.0, None), (0.3, None), (0.2, DetectionSettings(min_face_px=7))):
        each = Detector(settings)
        missed = 0
        for path in people:
            image = decode_image(path.read_bytes())
            small = cv2.resize(image, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
            missed += len(each.detect(small)) == 0
        assert missed == 0, share
