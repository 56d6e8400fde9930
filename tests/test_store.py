"""What is published is whole; what is damaged is found."""

import json
import multiprocessing
import os

import numpy as np
import pyarrow as pa
import pytest

from cdp.errors import StageError
from pipelines.files import FileDigests, open_atomically
from pipelines.store import Published, Store
from pipelines.tables import read_vectors, vector_column, write_table

SCHEMA = pa.schema([("sample_id", pa.int64()), ("value", pa.float32())])


def publish(store, fingerprint="f" * 64, value=1.0):
    work = store.open_work("toy", fingerprint, fresh=False)
    write_table(work / "table.parquet", {"sample_id": [0, 1], "value": [value, 2.0]}, SCHEMA)
    manifest = {
        "fingerprint": fingerprint,
        "facts": {"rows": 2},
        "schemas": {"table": {"sample_id": "int64", "value": "float"}},
    }
    return store.publish("toy", work, manifest)


def test_a_published_table_is_read_back_through_the_run(tmp_path):
    store = Store(tmp_path)
    store.link("mine", publish(store))
    published = store.open_run("mine", "toy")
    assert published.read("table").to_pydict() == {"sample_id": [0, 1], "value": [1.0, 2.0]}
    assert published.find_damage(rehash=True) is None
    assert (tmp_path / "mine" / "toy" / "table.parquet").is_file()


def test_publishing_again_replaces_the_link_and_drops_the_old_attempt(tmp_path):
    store = Store(tmp_path)
    first = publish(store)
    store.link("mine", first)
    second = publish(store, value=5.0)
    assert first.directory.is_dir()
    store.link("mine", second)
    assert not first.directory.exists()
    assert store.open_run("mine", "toy").read("table")["value"][0].as_py() == 5.0


def test_an_attempt_another_run_points_at_is_kept(tmp_path):
    store = Store(tmp_path)
    first = publish(store)
    store.link("mine", first)
    store.link("theirs", first)
    store.link("mine", publish(store))
    assert first.directory.is_dir()


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "rehash", "expected"),
    [
        (lambda path: path.unlink(), False, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), False, "bytes, published with"),
        (flip_a_bit, True, "no longer has the SHA-256"),
    ],
)
def test_damage_names_the_file(tmp_path, damage, rehash, expected):
    published = publish(Store(tmp_path))
    damage(published.path("table"))
    assert expected in published.find_damage(rehash=rehash)
    assert "table.parquet" in published.find_damage(rehash=rehash)


def test_a_manifest_cut_short_is_no_publication(tmp_path):
    published = publish(Store(tmp_path))
    manifest = published.directory / "manifest.json"
    text = manifest.read_text()
    for cut in (0, 1, len(text) // 2, len(text) - 3):
        manifest.write_text(text[:cut])
        assert Published.open("toy", published.directory) is None
    manifest.write_text(json.dumps([1]))
    assert Published.open("toy", published.directory) is None


def test_a_manifest_vouches_for_itself(tmp_path):
    published = publish(Store(tmp_path))
    manifest = published.directory / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content))  # other blanks, the same values
    assert Published.open("toy", published.directory).find_damage(rehash=True) is None
    manifest.write_text(json.dumps({**content, "facts": {"rows": 3}}))
    altered = Published.open("toy", published.directory)
    assert altered.find_damage() is None
    assert f"{manifest} differs from what was published" in altered.find_damage(rehash=True)


def test_a_table_of_another_schema_is_refused(tmp_path):
    published = publish(Store(tmp_path))
    other = pa.schema([("sample_id", pa.string()), ("value", pa.float32())])
    write_table(published.path("table"), {"sample_id": ["a"], "value": [1.0]}, other)
    with pytest.raises(StageError, match="sample_id is string, its stage declares int64"):
        published.read("table")


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), open_atomically(path) as draft:  # noqa: PT012
        draft.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_vectors_survive_parts_bit_for_bit(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(25, 7)).astype(np.float32)
    schema = pa.schema([("embedding", pa.list_(pa.float32(), 7))])
    for number, row in enumerate(range(0, 25, 10)):
        column = vector_column(vectors[row : row + 10])
        path = tmp_path / "view.parquet" / f"part-{number:05d}.parquet"
        write_table(path, {"embedding": column}, schema)
    np.testing.assert_array_equal(read_vectors(tmp_path / "view.parquet", "embedding"), vectors)


def hold(root, ready, release):
    with Store(root).lock("run mine", wait=False):
        ready.set()
        release.wait(30)


def test_a_second_process_sees_who_holds_the_lock_and_a_dead_one_frees_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, release))
    process.start()
    assert ready.wait(30)
    with (
        pytest.raises(StageError, match=f"run mine is in use by process {process.pid}"),
        Store(tmp_path).lock("run mine", wait=False),
    ):
        pass
    process.kill()
    process.join()
    with Store(tmp_path).lock("run mine", wait=False):
        pass


def test_digests_are_remembered_until_a_file_changes(tmp_path):
    path, index = tmp_path / "image", tmp_path / "files.json"
    path.write_bytes(b"one")
    os.utime(path, ns=(1, 1))
    digests = FileDigests(index)
    before = digests.digest(path)
    digests.save()
    assert FileDigests(index).digest(path) == before
    path.write_bytes(b"two")
    assert FileDigests(index).digest(path) != before
    os.utime(path, ns=(1, 1))
    assert FileDigests(index, rehash=True).digest(path) != before


def test_tree_digest_knows_names_and_contents_not_the_root(tmp_path):
    def grow(root, names):
        root.mkdir()
        for name in names:
            (root / name).write_text(name)
        return FileDigests(tmp_path / "files.json").digest_tree(root, names)

    assert grow(tmp_path / "a", ["x", "y"]) == grow(tmp_path / "b", ["y", "x"])
    assert grow(tmp_path / "c", ["x"]) != grow(tmp_path / "d", ["x", "y"])


def test_a_file_that_cannot_be_read_counts_as_such_until_it_can(tmp_path):
    def digest():
        return FileDigests(tmp_path / "files.json").digest_tree(tmp_path, ["kept", "gone"])

    (tmp_path / "kept").write_text("kept")
    (tmp_path / "gone").symlink_to("nowhere")
    first = digest()
    assert digest() == first
    (tmp_path / "nowhere").write_text("here")
    assert digest() != first


def test_drafts_of_dead_writers_are_dropped_and_those_of_the_living_kept(tmp_path):
    store = Store(tmp_path)
    store.link("mine", publish(store))
    dead = multiprocessing.get_context("spawn").Process(target=os.getpid)
    dead.start()
    dead.join()
    for place in (tmp_path / "mine" / f".run.json.draft-{dead.pid}",
                  store.root / f".files.json.draft-{dead.pid}",
                  store.root / f".files.json.draft-{os.getpid()}"):  # fmt: skip
        place.write_text("half")
    store.drop_left("mine")
    assert [path.name for path in tmp_path.rglob(".*.draft-*")] == [
        f".files.json.draft-{os.getpid()}"
    ]
