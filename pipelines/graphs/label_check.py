"""The check of the labels, as a part of the stage knn: which images to train on, and who is known.

The contract:
- Enters: the embeddings of both splits. Leaves: the table `label_issues`, the labelled people for
  `propagate` to find among the unlabelled images, and the images that the graphs leave out.
- The images that the mediator is trained on are checked together, the others in parts of whole
  people: two labels of one person are found where both are in one part.
- Unlabelled images that show a labelled person are trained on too (`cdp.mediator.believed_rows`).
- An image whose name a reviewer confirmed is trained on and is no issue.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.decisions import find_keys
from pipelines.files import save_arrays
from pipelines.graphs.view import View, list_embedded
from pipelines.stage import Work
from pipelines.tables import SPLITS, read_view

if TYPE_CHECKING:
    import pandas as pd

    from cdp.label_check import LabelledPeople

LABEL_ISSUES = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("path", pa.string()),
        ("issue", pa.string()),
        ("identity", pa.string()),
        ("seems", pa.string()),
        ("probability", pa.float32()),
    ]
)
ASSIGNMENTS = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("path", pa.string()),
        ("identity", pa.string()),
        ("probability", pa.float32()),
    ]
)
ADOPTED = pa.schema([("sample_id", pa.int64()), ("identity", pa.string())])
PEOPLE = "labelled_people.safetensors"
"""The labelled people: `LabelledPeople.from_state(load_file(...))`, beside `label_issues`."""
FOUND = "found_people.npz"
"""Whom each unlabelled image shows by itself, beside `PEOPLE`: `FoundPeople.from_state`, and `ids`.
Not there where labelled people were added after the unlabelled images were searched."""


@dataclass(frozen=True)
class CheckedLabels:
    """What the check leaves of both splits.

    trained, adopted : ascending sample ids of the labelled images, and of the unlabelled ones, to
    train on. person : (t + a,) int64, the people of both. left_out : (u,) bool, the unlabelled
    images that may show a labelled person, by ascending sample id.
    """

    trained: np.ndarray
    adopted: np.ndarray
    person: np.ndarray
    left_out: np.ndarray
    facts: dict[str, Any]


def check_splits(
    work: Work,
    chosen: np.ndarray,
    members: list[str],
    unlabelled: list[View],
    *,
    compared: bool = True,
) -> CheckedLabels:
    """Check the labels of the `chosen` images, and look for their people in the other split.

    chosen : ascending sample ids. unlabelled : the other split, one view a member.
    compared : whether images unlike those of the other split are left out.
    """
    samples = work.read(
        "ingest.samples", columns=["sample_id", "path", "split", "identity", "sha256"]
    ).to_pandas()
    kept = _list_kept(work, samples[samples.split == SPLITS[0]])
    samples = samples.set_index("sample_id")
    tables = [work.locate("embed.embeddings", f"{SPLITS[0]}/{member}") for member in members]
    found = work.scratch / "label_check.npz"
    people = work.directory / PEOPLE
    identity = samples.identity[samples.split == SPLITS[0]].sort_index()
    confirmed = np.isin(chosen, kept)
    distinct = work.config.knn.near_equal
    job = (tables, unlabelled, chosen, identity, confirmed,
            distinct, compared, work.seed, found, people)  # fmt: skip
    for _ in work.engine.map(check_views, [job], label="knn checks the labels"):
        pass
    stored = np.load(found, allow_pickle=False)
    issues = {name.removeprefix("issue."): stored[name] for name in stored if "issue." in name}
    ids = stored["ids"][issues["row"]]
    doubted = ~np.isin(ids, kept)
    ids, issues = ids[doubted], {name: column[doubted] for name, column in issues.items()}
    seems = [name or None for name in issues["seems"].tolist()]
    work.write(
        "label_issues",
        {
            "sample_id": ids,
            "path": samples.path[ids].to_numpy(),
            "issue": issues["issue"],
            "identity": issues["label"],
            "seems": pa.array(seems, pa.string()),
            "probability": issues["probability"].astype(np.float32),
        },
    )
    second = issues["issue"] == "second_label"
    person = stored["person"]
    adopted = stored["adopted"]
    if len(adopted):
        adopted = unlabelled[0].read_ids()[adopted]
    names = np.unique(identity.to_numpy())[person[len(person) - len(adopted) :]]
    work.write("adopted", {"sample_id": adopted, "identity": names})
    return CheckedLabels(
        chosen[stored["trained"]],
        adopted,
        person,
        stored["left_out"],
        {
            "wrong_names": int((~second).sum()),
            "wrong_share": round(float(stored["wrong_share"]), 4),
            "second_labels": len(np.unique(issues["label"][second])),
            "shared_images": int(stored["left_out"].sum()),
            "adopted": len(adopted),
            "unlike": int(stored["unlike"]),
            "labelled_checked": len(chosen),
        },
    )


def _list_kept(work: Work, labelled: pd.DataFrame) -> np.ndarray:
    """Sample ids of the labelled images whose name a reviewer confirmed."""
    confirmed = {key for each in work.decisions for key in each.groups[0]}
    if not confirmed:
        return np.empty(0, np.int64)
    keys = np.array(find_keys(labelled), object)
    return labelled.sample_id.to_numpy()[[key in confirmed for key in keys]]


def check_views(
    tables: list[Path],
    unlabelled: list[View],
    chosen: np.ndarray,
    identity: Any,
    confirmed: np.ndarray,
    distinct: bool,
    compared: bool,
    seed: int,
    target: Path,
    people: Path,
) -> None:
    """Check the labels of one set of images, and look for their people among others.

    tables : embeddings of the labelled split. unlabelled : views of the others. identity :
    Series of all labelled images' names by ascending sample id. confirmed : (r,) bool, chosen
    images whose labels are right. distinct : whether of near-equal images one is trained on.
    compared : whether images unlike the others are left out.
    target : the result, as arrays. people : a file for the labelled people.
    """
    import pandas as pd
    from safetensors.numpy import save_file

    from cdp.label_check import check_labels, list_issues
    from cdp.mediator.believed_rows import choose_believed

    if target.exists() and people.exists():
        return
    ids = list_embedded(tables[0])
    code, names = identity.factorize(sort=True)
    number = code[np.searchsorted(identity.index, ids)].astype(np.int64)
    rows = np.searchsorted(ids, chosen)
    views = [read_view([table])[1] for table in tables]
    trained = choose_believed(
        [view[rows] for view in views],
        number[rows],
        [view.map_vectors() for view in unlabelled],
        unlabelled[0].read_graph(),
        distinct=distinct,
        confirmed=confirmed,
        compared=compared,
        seed=seed,
        threads=1,
    )
    check = trained.check
    listed = [list_issues(check, number[rows], rows, names.to_numpy())]
    state: dict[str, np.ndarray] = {}
    if check.people is not None:
        person, believed = number.copy(), np.ones(len(ids), bool)
        person[rows], believed[rows] = check.person, check.believed
        parts = divide_people(number, rows)
        for part in parts:
            other = check_labels([view[part] for view in views], number[part], seed=seed)
            person[part], believed[part] = other.person, other.believed
            listed.append(list_issues(other, number[part], part, names.to_numpy()))
        everybody = check.people.extend(views, person, believed) if parts else check.people
        state = everybody.state()
        if trained.found is not None and not parts:
            shown = unlabelled[0].read_ids()
            save_arrays(people.with_name(FOUND), ids=shown, **trained.found.state())
        _find_names(listed, everybody, views, names.to_numpy())
    issues = pd.concat([part for part in listed if len(part)] or listed, ignore_index=True)
    draft = people.with_suffix(".draft")
    save_file(state, draft)
    draft.replace(people)
    columns = {
        f"issue.{name}": issues[name].to_numpy(kind)
        for name, kind in (("row", np.int64), ("probability", np.float32))
    }
    columns |= {
        f"issue.{name}": issues[name].fillna("").to_numpy("U")
        for name in ("issue", "label", "seems")
    }
    save_arrays(
        target,
        ids=ids,
        trained=trained.labelled,
        adopted=trained.adopted,
        person=trained.identity,
        left_out=trained.left_out,
        wrong_share=np.array(check.wrong_share),
        unlike=np.array(trained.unlike),
        **columns,
    )


def divide_people(number: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """The rows that are not chosen, in parts of whole people and about `LABELLED_ROWS` rows.

    number : (n,) int64, the person of each row. chosen : ascending rows.
    """
    from cdp.mediator.curriculum import LABELLED_ROWS

    rest = np.setdiff1d(np.arange(len(number)), chosen)
    order = rest[np.argsort(number[rest], kind="stable")]
    first = np.flatnonzero(np.diff(number[order], prepend=-1))
    wanted = np.arange(LABELLED_ROWS, len(order), LABELLED_ROWS)
    cuts = np.unique(first[np.minimum(np.searchsorted(first, wanted), len(first) - 1)])
    return [np.sort(part) for part in np.split(order, cuts) if len(part)]


def _find_names(
    listed: list[pd.DataFrame],
    people: LabelledPeople,
    views: list[np.ndarray],
    names: np.ndarray,
) -> None:
    """Look among all labelled people for the images that seem to be nobody of their part."""
    from cdp.label_check.people import BELIEVED

    for issues in listed:
        unknown = np.flatnonzero(issues.seems.isna())
        if len(unknown):
            rows = issues.row.to_numpy(np.int64)[unknown]
            found = people.find([view[rows] for view in views])
            sure = found.probability > BELIEVED
            issues.loc[unknown[sure], "seems"] = names[found.label[sure]]
