"""Images without a cluster in a review: the reason of each, and pictures of rejected files."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cdp.types import PairTable
from pipelines.data.reasons import name_reason
from pipelines.review.left_out import PAGE, RejectedFiles, UnlabelledImages

NAMES = [f"{letter}.jpg" for letter in "abcdefgh"]


def list_images(voted=False):
    label = np.array([0, 0, -1, -1, -1, -1, -1, -1])
    published = np.array([0, 0, -1, -1, -1, 1, 1, -1])
    pairs = PairTable(np.array([0, 0, 1, 2, 3]), np.array([1, 2, 2, 3, 7]))
    score = np.array([0.99, 0.3, 0.4, 0.2, 0.8], np.float32)
    rejected = np.array([5])
    return UnlabelledImages(
        label, published, rejected, pairs, score, threshold=0.5, voted=voted
    )  # fmt: skip


def test_every_image_without_a_label_has_its_reason():
    images = list_images()
    assert {each["key"]: each["count"] for each in images.count()} == {
        "rejected": 1, "alone": 1, "none": 1, "below": 1, "outweighed": 2
    }  # fmt: skip
    assert images.explain(2, NAMES) == (
        "its best pair, with b.jpg, is 40 % likely one person; the cut is at 50 %"
    )
    assert "with h.jpg, is 80 % likely" in images.explain(3, NAMES)
    assert "outweigh" in images.explain(7, NAMES)
    assert images.explain(4, NAMES) == "in no candidate pair"
    assert images.explain(5, NAMES) == "rejected in the review"
    assert images.explain(6, NAMES) == "left alone by a decision of the review"
    assert "has the cosine 0.400; the cut is at 0.500" in list_images(True).explain(2, NAMES)


def test_they_are_found_by_reason_and_by_name():
    images = list_images()
    assert images.list_rows("", "", NAMES).tolist() == [3, 7, 2, 4, 5, 6]
    assert images.list_rows("outweighed", "", NAMES).tolist() == [3, 7]
    assert images.list_rows("", "C.JPG", NAMES).tolist() == [2]
    assert images.list_rows("nothing", "", NAMES).tolist() == []


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("too small: 12 x 14 px, at least 16 wanted", "too small"),
        ("same bytes as people/x/1.jpg", "same bytes as another"),
        ("the same file is under the names A and B: neither", "the same file under two names"),
        ("set aside in review, decision 7", "set aside in review"),
        ("42", "other"),
    ],
)
def test_reasons_are_grouped_without_names_and_numbers(reason, kind):
    assert name_reason(reason) == kind


def test_rejected_files_come_in_pages():
    class Run:
        rejected = pd.DataFrame({
            "path": [f"{number}.jpg" for number in range(100)],
            "reason": ["too small: 3 px", *["cannot be read"] * 99],
        })  # fmt: skip
        rejected_thumbnails = {"0.jpg": b"webp"}  # noqa: RUF012

    files = RejectedFiles(Run)
    page = files.list_page("", "", PAGE)
    assert (page["total"], len(page["images"])) == (100, PAGE)
    assert page["images"][0]["number"] == PAGE
    assert [each["count"] for each in page["reasons"]] == [99, 1]
    (small,) = files.list_page("too small", "", 0)["images"]
    assert small == {"number": 0, "name": "0.jpg", "reason": "too small: 3 px", "picture": True}
    assert files.list_page("", "nothing", 0)["images"] == []


def test_rejected_files_that_can_be_decoded_get_a_picture(tmp_path):
    import pyarrow.parquet as pq

    from pipelines.data.dataset import Dataset
    from pipelines.data.manifest import DataManifest
    from pipelines.stages.thumbnails import make_rejected

    folder = tmp_path / "data" / "unlabelled"
    folder.mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(folder / "small.png")
    Image.new("RGB", (4000, 2), "red").save(folder / "narrow.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    manifest = DataManifest(name="x", kind="images", size_px=48,
                            unlabelled={"root": "unlabelled", "layout": "pile"})  # fmt: skip
    names = ("small.png", "narrow.png", "broken.jpg", "gone.png", "../../etc/passwd")
    paths = [f"unlabelled/{name}" for name in names]
    make_rejected(Dataset(manifest, tmp_path / "data"), paths, tmp_path / "rejected.parquet")
    found = pq.read_table(tmp_path / "rejected.parquet").to_pydict()
    assert found["path"] == ["unlabelled/small.png", "unlabelled/narrow.png"]
    assert all(image.startswith(b"RIFF") for image in found["image"])
