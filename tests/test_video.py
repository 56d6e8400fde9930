"""Videos and folders of frames: read, tracked, and their tracks kept together by propagate."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from known_clusters import build_projection
from PIL import Image

import cdp
from cdp.errors import ConfigError
from cdp.images.decode import decode_image
from cdp.images.tracks import link_boxes, measure_overlap
from cdp.review.constraints import Constraints, find_conflict
from cdp.review.tracks import constrain_tracks, give_way
from cdp.synthetic.identities import SyntheticFaces
from pipelines.data.dataset import number_frames
from pipelines.data.layouts import video
from pipelines.data.layouts.tracks import FOLDERS, name_tracks
from pipelines.data.manifest import Entry
from pipelines.engine import Engine
from pipelines.review.session import ReviewSession, find_moved
from pipelines.run import main
from pipelines.stages.ingest import number_tracks

av = pytest.importorskip("av")
FRAMES, EVERY = 48, 4


def write_video(path: Path, frames: list[np.ndarray], codec: str = "mpeg4") -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 8_000_000
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> Path:
    """A video of 60 frames, frame i of the grey 4 i."""
    path = tmp_path_factory.mktemp("grey") / "grey.mkv"
    write_video(path, [np.full((48, 64, 3), 4 * i, np.uint8) for i in range(60)])
    return path


def test_frames_are_read_by_number_in_any_order(grey):
    members = list(video.list_members(grey))
    assert [member.frame for member in members] == list(range(60))
    for number in (0, 10, 59, 5):
        pixels = decode_image(video.read_member(grey, members[number].name))
        assert pixels.shape == (48, 64, 3)
        assert pixels.mean() == pytest.approx(4 * number, abs=6)


def test_a_video_that_ends_in_the_middle_loses_only_the_rest(grey, tmp_path):
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(grey.read_bytes()[: int(0.6 * grey.stat().st_size)])
    *whole, end = video.list_members(cut)
    assert 20 < len(whole) < 50
    assert f"ends at frame {len(whole)} of about 60" in end.fault
    assert decode_image(video.read_member(cut, whole[-1].name)).shape == (48, 64, 3)


@pytest.mark.parametrize(
    "data", [b"", b"no video at all", b"\x00\x00\x00\x18ftypmp42" + b"\0" * 99]
)
def test_what_is_no_video_is_a_fault(tmp_path, data):
    (tmp_path / "a.mp4").write_bytes(data)
    (member,) = video.list_members(tmp_path / "a.mp4")
    assert "cannot be read from frame 0 on" in member.fault
    assert str(tmp_path) not in member.fault


def test_without_pyav_a_video_says_what_is_missing(grey, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (member,) = video.list_members(grey)
    assert "pip install 'cdp[video]'" in member.fault


def test_frames_of_folders():
    names = ["c/f0010.jpg", "c/f9.jpg", "c/f0012.jpg", "c/cover.jpg", "d/4.png"]
    found = number_frames([Entry(name, "unlabelled", None) for name in names], 2)
    assert [(each.path, each.clip, each.frame) for each in found] == [
        ("c/f0010.jpg", "c", 10), ("c/f0012.jpg", "c", 12), ("c/cover.jpg", None, None),
        ("d/4.png", "d", 4)]  # fmt: skip


def test_overlap():
    box = np.array([[0, 0, 10, 10.0]])
    other = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [3, 3, 3, 3]], float)
    np.testing.assert_allclose(measure_overlap(box, other), [[1, 1 / 3, 0, 0]])


TRACKS = ["c/a/01.jpg", "c/a/02.jpg", "c/b/02.jpg", "d/a/02.jpg", "c/a/x.jpg", "7.jpg"]


def list_tracks(names, pattern, every=1):
    entries = [Entry(f"t/{name}", "unlabelled", None) for name in names]
    return name_tracks(entries, "t", pattern, every)


def test_each_folder_of_cut_faces_is_a_track():
    found = list_tracks(TRACKS, FOLDERS)
    number = number_tracks(found)
    assert number == {"t/c/a/01.jpg": 0, "t/c/a/02.jpg": 0, "t/c/b/02.jpg": 1, "t/d/a/02.jpg": 2}
    assert found[1].clip != found[2].clip  # frames of two tracks need not be one moment
    assert [each.path for each in list_tracks(TRACKS, FOLDERS, 2)] == [
        f"t/{name}" for name in TRACKS if name != "c/a/01.jpg"]  # fmt: skip


def test_clips_and_tracks_in_a_pattern():
    found = list_tracks(TRACKS, "{clip}/{track}/{frame}")
    assert [(each.clip, each.frame) for each in found[:4]] == [
        ("t:c", 1), ("t:c", 2), ("t:c", 2), ("t:d", 2)]  # fmt: skip
    assert len(set(number_tracks(found).values())) == 3
    flat = list_tracks(["cam_1_000120_t3.png", "cam_1_000125_t3.png", "cam_1_000125_t4.png"],
                       "{clip}_{frame}_t{track}")  # fmt: skip
    assert list(number_tracks(flat).values()) == [0, 0, 1]
    assert {each.clip for each in flat} == {"t:cam_1"}


def test_two_faces_of_one_picture_of_a_track_have_none():
    first, second = list_tracks(TRACKS[:2], FOLDERS)
    faces = [replace(first, path="t/c/a/01.jpg#0"), replace(first, path="t/c/a/01.jpg#1"), second]
    assert number_tracks(faces, 5) == {second.path: 5}


@pytest.mark.parametrize("pattern", ["{track}", "{frame}", "{track}{track}/{frame}", "{person}_*"])
def test_a_pattern_without_track_and_frame_is_refused(pattern):
    with pytest.raises(ConfigError, match=r"\{track\} and \{frame\} expected once each"):
        list_tracks(TRACKS, pattern)


def walk(start, step, frames):
    left = start + step * np.arange(frames)
    return np.stack([left, 0 * left, left + 40, 0 * left + 40], axis=1)


def test_two_faces_that_pass_far_from_each_other_are_two_tracks():
    box = np.concatenate([walk(0, 4, 10), walk(200, -4, 10)])
    track = link_boxes(np.tile(np.arange(0, 50, 5), 2), box)
    np.testing.assert_array_equal(track, np.repeat([0, 1], 10))


def test_faces_that_cross_are_not_exchanged():
    """Where two boxes lie over each other new tracks begin: no track holds both faces."""
    box = np.concatenate([walk(0, 6, 20), walk(120, -6, 20)])
    track = link_boxes(np.tile(np.arange(20), 2), box)
    assert not set(track[:20]) & set(track[20:])
    assert len(set(track)) > 2


def test_a_track_ends_where_the_face_is_away():
    frame = np.array([0, 1, 3, 10, 11, 2, 4, 5, 6, 7, 8, 9])
    box = np.tile([0.0, 0, 40, 40], (12, 1))
    box[5:] += 500
    track = link_boxes(frame, box)
    assert track[0] == track[1] == track[2]  # one frame without it is no end
    assert track[3] == track[4] != track[0]
    assert len(link_boxes(np.empty(0, np.int64), np.empty((0, 4)))) == 0


@pytest.fixture
def drawn():
    """Rows of 30 people of two views; 0..5 are a track of one, 6..11 a track that changes over."""
    random = np.random.default_rng(0)
    person = np.concatenate([[0] * 6, [1] * 3, [2] * 3, np.arange(3, 40)])
    centre = [random.normal(size=(40, width)) for width in (64, 48)]
    views = [rows[person] + 0.3 * random.normal(size=(len(person), rows.shape[1]))
             for rows in centre]  # fmt: skip
    track = np.full(len(person), -1)
    track[:6], track[6:12] = 0, 1
    frame = np.full(len(person), -1)
    frame[:6] = frame[6:12] = np.arange(6)
    return track, frame, views


def test_tracks_are_believed_where_the_views_agree(drawn):
    found = constrain_tracks(*drawn)
    assert [group.tolist() for group in found.same] == [
        [0, 1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11]]  # fmt: skip
    assert [(a.tolist(), b.tolist()) for a, b in found.apart] == [([0], [6]), ([0], [9])]
    assert find_conflict(found) is None


def test_reviewers_outrank_tracks(drawn):
    found = constrain_tracks(*drawn)
    decided = Constraints(found.count, apart=((np.array([0]), np.array([1])),),
                          rejected=np.array([7]))  # fmt: skip
    both = give_way(found, decided)
    assert find_conflict(both) is None
    assert [group.tolist() for group in both.same] == [[2, 3, 4, 5], [6, 8], [9, 10, 11]]


def draw_clip(people, brightness):
    """Frames of two drawn faces that move over a background; the light changes on the way."""
    random = np.random.default_rng(0)
    back = np.kron(random.integers(90, 140, (13, 26, 1)), np.ones((20, 20, 3))).astype(np.uint8)
    frames = []
    for number in range(FRAMES):
        canvas = back.astype(float)
        light = 1 + brightness * np.sin(np.pi * number / FRAMES)
        for place, face in enumerate(people):
            left = 10 + 250 * place + 2 * number
            top = 20 + 60 * place + number // 2
            canvas[top : top + 112, left : left + 112] = face * light
        frames.append(np.clip(canvas, 0, 255).astype(np.uint8))
    return frames


def check_cut_faces(place, run, samples, options):
    """The same faces as folders of cut faces: their tracks give the same labels as the video."""
    rows = samples[samples.track.notna()]
    crops = run.open_dataset(place).read_faces(rows.path.tolist())
    for row, pixels in zip(rows.itertuples(), crops, strict=True):
        clip = row.clip.rpartition("/")[2]
        path = place / "cut" / clip / f"{row.frame:06d}_{row.track:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    manifest = {"name": "cut", "kind": "images", "size_px": 48,
                "unlabelled": {"root": "cut", "layout": "tracks",
                               "pattern": "{clip}/{frame}_{track}"}}  # fmt: skip
    (place / "data.yaml").write_text(yaml.safe_dump(manifest))
    assert main([*options, "name=cut"]) == 0
    cut = cdp.open_run(place / "runs" / "cut")
    facts = [each.manifest("propagate")["facts"]["tracks"] for each in (run, cut)]
    assert facts[0] == facts[1]
    label = [each.labels.set_index("path").pseudo_label for each in (run, cut)]
    again = "cut/" + rows["clip"].str.rpartition("/")[2] + [
        f"/{frame:06d}_{track:02d}.png"
        for frame, track in zip(rows.frame.astype(int), rows.track.astype(int), strict=True)
    ]  # fmt: skip
    pairs = set(zip(label[0][rows.path], label[1][again], strict=True))
    assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs})


def check_review(directory, door, options):
    """What tracks say is seen in a review at once, and a rerun gives the same clusters."""
    assert main([*(each for each in options if each not in ("--until", "propagate")),
                 "--stage", "thumbnails"]) == 0  # fmt: skip
    session = ReviewSession(cdp.open_run(directory), "ada")
    assert session.followed
    assert session.count_pending() == 0
    track = door[door.track == door.track.min()].sort_values("frame").sample_id.tolist()
    session.decide("split", [track[:1], track[1:2]])
    label = dict(zip(session.sample_id.tolist(), session.label.tolist(), strict=True))
    assert label[track[0]] != label[track[1]]
    assert len({label[each] for each in track[2:]}) == 1
    assert main(options) == 0
    again = cdp.open_run(directory).labels.pseudo_label.to_numpy()
    assert not find_moved(again, session.label).any()


@pytest.mark.slow
@pytest.mark.torch
def test_a_video_through_the_pipeline_with_and_without_tracks(tmp_path, monkeypatch, capsys):
    def compute(engine, function, parts, *, label):
        return iter([function(*part) for part in parts])

    monkeypatch.setattr(Engine, "map", compute)
    faces = SyntheticFaces(
        size_px=112, labelled_identities=3, unlabelled_identities=2, evaluation_identities=2,
        images_min=2, images_max=2, evaluation_images=2,
    ).draw(np.array([2, 4]))  # fmt: skip
    folder = tmp_path / "cameras"
    folder.mkdir()
    write_video(folder / "door.mkv", draw_clip(faces, 0.4))
    whole = (folder / "door.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "m.onnx").write_bytes(build_projection(64, 0))
    (tmp_path / "n.onnx").write_bytes(build_projection(48, 1))
    manifest = {"name": "video", "kind": "images", "size_px": 48, "align": {"faces": "all"},
                "unlabelled": {"root": "cameras", "every": EVERY}}  # fmt: skip
    config = {
        "data": "data.yaml", "knn": {"k": 4, "near_equal": False}, "embed": {"reduce_px": None},
        "committee": {"base": {"name": "m", "onnx": "m.onnx"},
                      "members": [{"name": "n", "onnx": "n.onnx"}]},
        "mediate": {"method": "vote", "vote": {"min_similarity": 0.97}},
    }  # fmt: skip
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(manifest))
    (tmp_path / "video.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", str(tmp_path / "video.yaml"), "--data-root", str(tmp_path),
               "--runs-dir", str(tmp_path / "runs"), "--until", "propagate"]  # fmt: skip
    found = {}
    for tracks in ("true", "false"):
        assert main([*options, f"name=t{tracks}", f"propagate.tracks={tracks}"]) == 0, (
            capsys.readouterr().err
        )
        found[tracks] = cdp.open_run(tmp_path / "runs" / f"t{tracks}")
    samples = found["true"].read("ingest", "samples")
    door = samples[samples.path.str.startswith("cameras/door.mkv")]
    assert sorted(door.frame.unique()) == list(range(0, FRAMES, EVERY))
    assert door.track.nunique() == 2
    assert (door.groupby("track").frame.nunique() == FRAMES // EVERY).all()
    assert samples.path.str.startswith("cameras/cut.mkv").any()
    rejected = found["true"].read("ingest", "rejected").set_index("path").reason
    assert rejected.filter(like="cut.mkv/end").str.contains("ends at frame").all()
    label = {name: run.labels.set_index("sample_id").pseudo_label[door.sample_id].to_numpy()
             for name, run in found.items()}  # fmt: skip
    track = door.track.to_numpy()
    one, other = (set(label["true"][track == each]) for each in np.unique(track))
    assert len(one) == len(other) == 1
    assert one != other
    assert -1 not in one | other
    assert len({*label["false"].tolist()}) > 2 or -1 in label["false"]
    check_cut_faces(tmp_path, found["true"], samples, options)
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(manifest))
    check_review(found["true"].directory, door, [*options, "name=ttrue"])
    picture = decode_image(found["true"].open_dataset(tmp_path).read_bytes(
        "cameras/door.mkv/00000004.bmp"))  # fmt: skip
    assert picture.shape == (260, 520, 3)
    assert Image.fromarray(picture).size == (520, 260)
