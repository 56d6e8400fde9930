"""The stage knn searches a view in parts: the lists do not depend on them."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.config import KnnSettings
from pipelines.graphs import search
from pipelines.stages.embed import describe_embeddings
from pipelines.tables import vector_column, write_table

pytestmark = pytest.mark.nmslib
ROWS = 5000


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "part-00000.parquet"
    vectors = np.random.default_rng(0).normal(size=(ROWS, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    columns = {
        "sample_id": 3 * np.arange(ROWS),
        "embedding": vector_column(vectors),
        "norm": np.ones(ROWS, np.float32),
    }
    write_table(path, columns, describe_embeddings(16))
    return path


def search_all(embeddings, folder, settings):
    """The number of parts, and the table of lists."""
    search.build_view([embeddings], folder / "index", settings, 0)
    parts = search.list_parts(settings, ROWS)
    for number, rows in enumerate(parts):
        search.query_part(folder / "index", settings.k, rows, folder / f"part-{number:05d}.parquet")
    return len(parts), pq.read_table(sorted(folder.glob("part-*.parquet")))


def test_an_exact_view_has_one_part_and_the_lists_of_many(embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "PART_SIZE", 1500)
    folders = [tmp_path / "one", tmp_path / "many"]
    for folder in folders:
        folder.mkdir()
    one, whole = search_all(embeddings, folders[0], KnnSettings())
    monkeypatch.setattr(search, "_WHOLE", ROWS - 1)
    many, in_parts = search_all(embeddings, folders[1], KnnSettings())
    assert (one, many) == (1, 4)
    assert whole.num_rows == ROWS
    assert whole.equals(in_parts)


def test_an_approximate_view_has_several_parts(embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "PART_SIZE", 1500)
    settings = KnnSettings(options={"exact_limit": 0})
    parts, table = search_all(embeddings, tmp_path, settings)
    assert parts == 4
    assert table.num_rows == ROWS
