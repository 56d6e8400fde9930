"""extension points: necks and seeing losses train, resume to the bit, are saved and exported."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save
from test_training import PLAN, draw_people, train

from cdp.errors import ConfigError, DataError
from cdp.images.degradation import DEGRADATIONS, degrade
from cdp.models import BACKBONES, NECKS, build_backbone, pack_model, unpack_model
from cdp.models.auxiliary import AUXILIARIES, Seen, build_auxiliary
from cdp.models.heads import build_head
from cdp.models.necks.trunk_branch import WINDOWS, find_cells
from cdp.recognizer import FaceSet, Recognizer, RecognizerSpec, export_onnx, train_recognizer
from cdp.recognizer.onnx_export import measure_difference
from cdp.training.loop import _Trainer
from cdp.training.sets import TrainingSet

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.usefixtures("one_thread"),
]

ROOT = Path(__file__).parents[1]
SEEING = sorted(
    name
    for name, kind in AUXILIARIES.items()
    if "judge" in vars(kind) and name not in ("promotion", "gate")
)
SEEING_PLAN = dataclasses.replace(
    PLAN, epochs=2, batch_size=15, learning_rate=0.02, degradation=DEGRADATIONS["surveillance"]
)


def make_seeing(neck: str = "own", losses=(), head: str = "adaface", sets: int = 2):
    """A small backbone and two sets with these losses."""
    backbone = build_backbone("plain", input_px=16, embedding_dim=16, width=0.5, neck=neck)
    training_sets = []
    for number in range(sets):
        images, label = draw_people(5, 5, seed=number)
        added = tuple(
            (0.1, build_auxiliary(name, 16, 5, seed=number, backbone=backbone)) for name in losses
        )
        made = build_head(head, 16, 5, seed=number)
        training_sets.append(TrainingSet(made, images, label, auxiliaries=added))
    return backbone, training_sets


def list_losses(neck: str):
    """Every loss that can be trained with a neck."""
    return [name for name in SEEING if AUXILIARIES[name].neck in (None, neck)]


def collect_state(backbone, training_sets):
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    for number, each in enumerate(training_sets):
        state |= {f"head{number}.{k}": v for k, v in each.head.state_dict().items()}
        for place, (_, loss) in enumerate(each.auxiliaries):
            state |= {f"loss{number}.{place}.{k}": v for k, v in loss.state_dict().items()}
    return {key: value.clone().contiguous() for key, value in state.items()}


@pytest.mark.parametrize("neck", ["own", *sorted(NECKS)])
def test_resuming_ends_with_the_same_bits(neck: str) -> None:
    """With every loss that sees a map, a twin or parts, all at once."""
    states = []
    whole = make_seeing(neck, list_losses(neck))
    train(*whole, SEEING_PLAN, on_epoch=states.append)
    again = make_seeing(neck, list_losses(neck))
    train(*again, SEEING_PLAN, resume=load(save(states[0])))
    expected = collect_state(*whole)
    for key, value in collect_state(*again).items():
        assert torch.equal(value, expected[key]), key


SCRIPT = """
import sys
sys.path.insert(0, "tests")
import torch
from safetensors.torch import save_file
from test_extension_points import OTHERS, SEEING_PLAN, collect_state, list_losses
from test_extension_points import make_seeing, train, train_other
from cdp.training.distributed import join_team

torch.set_num_threads(1)
with join_team() as team:
    for neck in sys.argv[2:]:
        made = make_seeing(neck, list_losses(neck))
        train(*made, SEEING_PLAN)
        save_file(collect_state(*made), f"{sys.argv[1]}/{neck}{team.rank}.safetensors")
    for name in OTHERS:
        save_file(train_other(name), f"{sys.argv[1]}/{name}{team.rank}.safetensors")
"""

OTHERS = {
    "gate": ({"neck": "balanced", "losses": ["gate"], "head": "domain_balance"}, {}),
    "promotion": ({"losses": ["promotion"], "head": "softmax"}, {}),
    "pairs": (
        {"losses": ["batch_triplet"]},
        {"sampling": "identity", "images_per_identity": 2},
    ),
    "halves": ({"neck": "twofold"}, {"sampling": "bilateral"}),
    "reversed": ({"head": "ccl"}, {"sampling": "reversed"}),
    "parts": ({"losses": ["decorrelation"], "head": "subspheres"}, {}),
}
"""What asks the head or the order: options of `make_seeing`, and what differs in the plan."""


def train_other(name: str) -> dict:
    """The end of a training with one of them.

    Two steps: after four, a start that is nudged by 1e-7 is 3e-3 away where a maximum turns over.
    """
    options, changed = OTHERS[name]
    made = make_seeing(**options)
    train(*made, dataclasses.replace(SEEING_PLAN, batch_size=51, **changed))
    return collect_state(*made)


@pytest.mark.long
def test_two_processes_end_where_one_does_with_every_neck(tmp_path) -> None:
    """With every loss and neck: maps, twins and parts come from both processes. And with what asks
    the head or the order: gates, rare classes, pairs of a batch, mixtures."""
    necks = ["own", *sorted(NECKS)]
    path = tmp_path / "job.py"
    path.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(path), str(tmp_path), *necks], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = {}
    for neck in necks:
        alone = make_seeing(neck, list_losses(neck))
        train(*alone, SEEING_PLAN)
        ends[neck] = collect_state(*alone)
    ends |= {name: train_other(name) for name in OTHERS}
    for name, expected in ends.items():
        for rank in (0, 1):
            together = load_file(tmp_path / f"{name}{rank}.safetensors")
            for key, value in expected.items():
                np.testing.assert_allclose(
                    together[key].float(), value.float(), atol=2e-4, rtol=2e-3, err_msg=key
                )


@pytest.mark.parametrize("name", SEEING)
def test_every_loss_moves_the_network(name: str) -> None:
    """Its gradient reaches the trunk, and so the weights end elsewhere than without it."""
    neck = AUXILIARIES[name].neck or "own"
    plan = dataclasses.replace(SEEING_PLAN, epochs=1, gradient_clip=None)
    ends = []
    for losses in ((), (name,)):
        made = make_seeing(neck, losses, sets=1)
        history = train(*made, plan)
        assert np.isfinite(history[-1]["loss"])
        ends.append(made[0].state_dict()["trunk.0.0.weight"])
    assert not torch.equal(*ends)


def test_promotion_trains_with_its_heads() -> None:
    made = make_seeing("own", ["promotion"], head="softmax", sets=1)
    assert np.isfinite(train(*made, SEEING_PLAN)[-1]["loss"])


def test_a_twin_leaves_the_running_moments() -> None:
    moments = []
    for losses in ((), ("relation_distillation", "construction", "feature_diversity")):
        backbone, training_sets = make_seeing("own", losses, sets=1)
        trainer = _Trainer(backbone, training_sets, SEEING_PLAN, torch.device("cpu"))
        backbone.train()
        trainer._loss(*trainer.batches.load(0), 0)
        moments.append(backbone.trunk[0][1].running_mean.clone())
        assert backbone.trunk[0][1].momentum == 0.1
    assert torch.equal(*moments)
    assert moments[0].abs().max() > 0


def test_the_sharp_twin_is_the_image_undegraded() -> None:
    backbone, training_sets = make_seeing("own", ["relation_distillation"])
    trainer = _Trainer(backbone, training_sets, SEEING_PLAN, torch.device("cpu"))
    for step in (0, 1, 3):
        trainer.batches.load(step)
        sharp = trainer.batches.load_sharp(step)
        expected = []
        for each, order, count in zip(
            training_sets, trainer.batches.orders, trainer.counts, strict=True
        ):
            rows, seeds = order.take(step * count, count)
            faces = degrade(each.images[rows], seeds, DEGRADATIONS["none"], 16)
            mirrored = torch.from_numpy(seeds & 1).bool()[:, None, None, None]
            expected.append(torch.where(mirrored, faces.flip(3), faces))
        assert torch.equal(sharp, torch.cat(expected))


# ------------------------------------------------------------------------------------------- necks


@pytest.mark.parametrize("neck", sorted(NECKS))
@pytest.mark.parametrize("name", ["residual", "mixer"])
def test_necks_keep_the_contract(neck: str, name: str) -> None:
    backbone = build_backbone(name, input_px=16, embedding_dim=32, width=0.5, neck=neck)
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    norm = backbone(images).norm(dim=1)
    assert abs(norm.square().mean().item() - 32) < 1
    backbone.eval()
    with torch.no_grad():
        assert torch.equal(backbone(images[:4]), backbone(images[:4]))
        alone = torch.cat([backbone(image[None]) for image in images[:4]])
        np.testing.assert_allclose(backbone(images[:4]), alone, atol=1e-4)
    again, _ = unpack_model(*pack_model(backbone))
    assert again.spec == backbone.spec
    with torch.no_grad():
        np.testing.assert_allclose(again(images[:4]), backbone(images[:4]), atol=1e-5)


def test_old_weights_load() -> None:
    """A file written before there were necks names none."""
    backbone = build_backbone("plain", input_px=16, embedding_dim=16, width=0.5)
    tensors, metadata = pack_model(backbone)
    recipe = json.loads(metadata["cdp.backbone"])
    assert recipe.pop("neck") == "own"
    again, _ = unpack_model(tensors, {**metadata, "cdp.backbone": json.dumps(recipe)})
    assert again.spec == backbone.spec
    recipe["neck"] = "giraffe"
    with pytest.raises(DataError, match="unknown neck 'giraffe'"):
        unpack_model(tensors, {**metadata, "cdp.backbone": json.dumps(recipe)})


def test_weights_of_a_backbone_without_a_neck_are_as_before() -> None:
    """A neck is drawn after the family's own layers: the trunk of a seed stays the same."""
    own = build_backbone("residual", seed=3).state_dict()
    for neck in NECKS:
        other = build_backbone("residual", seed=3, neck=neck).state_dict()
        same = [torch.equal(other[k], v) for k, v in own.items() if k == "trunk.0.1.weight"]
        assert same == [True]


def check_export(name: str, neck: str) -> None:
    """The exported network gives its vectors within 1e-4, with moments that a batch has moved."""
    pytest.importorskip("onnxscript")
    backbone = build_backbone(name, input_px=16, embedding_dim=16, width=0.5, neck=neck)
    backbone(torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    recognizer = Recognizer(backbone, device="cpu")
    model = export_onnx(recognizer)
    assert measure_difference(recognizer, model, seed=1) < 1e-4


@pytest.mark.parametrize(
    ("name", "neck"),
    list(zip(["residual", "mixer", "separable", "inception"], sorted(NECKS), strict=True)),
)
def test_necks_are_exported(name: str, neck: str) -> None:
    check_export(name, neck)


@pytest.mark.long
@pytest.mark.parametrize("neck", ["own", *sorted(NECKS)])
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_every_neck_is_exported_on_every_backbone(name: str, neck: str) -> None:
    """No pair is refused: all families end in a map that every neck can read."""
    check_export(name, neck)


def test_subdecisions_are_weighted_and_dropped_by_seed() -> None:
    backbone = build_backbone("plain", input_px=16, embedding_dim=16, neck="subdecisions")
    images, seeds = torch.rand(6, 3, 16, 16) * 2 - 1, torch.arange(6)
    first = backbone.extract(images, seeds)
    assert first.parts.shape == (6, 3, 16)
    np.testing.assert_allclose(first.part_weight.sum(1).detach(), np.ones(6), rtol=1e-5)
    np.testing.assert_allclose(
        first.embedding.detach(),
        backbone.ending.final((first.part_weight[:, :, None] * first.parts).sum(1)).detach(),
        atol=1e-5,
    )
    assert torch.equal(first.parts, backbone.extract(images, seeds).parts)
    assert not torch.equal(first.parts, backbone.extract(images, seeds + 9).parts)
    backbone.eval()
    still = backbone.extract(images, seeds)
    assert torch.equal(still.parts, backbone.extract(images).parts)
    # equal layers without dropout are one layer, whatever the weights
    with torch.no_grad():
        for block in backbone.ending.blocks[1:]:
            block.weight.copy_(backbone.ending.blocks[0].weight)
        alike = backbone.extract(images)
        np.testing.assert_allclose(
            alike.embedding, backbone.ending.final(alike.parts[:, 0]), atol=1e-4
        )


def test_a_recognizer_with_neck_and_losses() -> None:
    images, label = draw_people(4, 4)
    spec = RecognizerSpec(
        "plain", input_px=16, embedding_dim=16, width=0.5, neck="subdecisions",
        auxiliaries={"consistency": {"weight": 0.1}, "spatial_diversity": {"channels": 8}},
    )  # fmt: skip
    plan = dataclasses.replace(SEEING_PLAN, epochs=1, batch_size=8)
    recognizer, _ = train_recognizer(
        FaceSet(images, label), spec=spec, plan=plan, device="cpu", progress=False
    )
    assert recognizer.backbone.spec.neck == "subdecisions"
    with pytest.raises(ConfigError, match="reads the neck 'subdecisions', got 'own'"):
        train_recognizer(
            FaceSet(images, label), spec=dataclasses.replace(spec, neck="own"), plan=plan,
            device="cpu", progress=False,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="unknown neck 'long'; choose one of: own, "):
        build_backbone("plain", neck="long")


def test_a_balancing_map_without_a_change_is_none() -> None:
    backbone = build_backbone("plain", input_px=16, embedding_dim=16, neck="balanced")
    images, neck = torch.rand(8, 3, 16, 16) * 2 - 1, backbone.ending
    with torch.no_grad():
        found = backbone.extract(images)
        plain = neck.flat(found.map)
        gate = 2 * torch.sigmoid(neck.gate(plain))
        np.testing.assert_allclose(found.gate, gate[:, 0], atol=1e-5)
        changed = neck.final(plain + gate * neck.change(plain))
        np.testing.assert_allclose(found.embedding, changed, atol=1e-4)
        neck.change[2].weight.zero_()
        neck.change[2].bias.zero_()
        np.testing.assert_allclose(backbone.extract(images).embedding, neck.final(plain), atol=1e-4)


def test_the_gate_follows_the_factor() -> None:
    backbone, (training_set,) = make_seeing("balanced", ["gate"], head="domain_balance", sets=1)
    (_, loss), head = training_set.auxiliaries[0], training_set.head
    head.factor.copy_(torch.tensor([0.5, 1, 2, 1, 1]))
    seen = Seen(torch.zeros(2, 16), torch.tensor([0, 2]), gate=torch.tensor([1.0, 1.5]), head=head)
    np.testing.assert_allclose(loss.look(seen), [0.25, 0.25])
    assert np.isfinite(train(backbone, [training_set], SEEING_PLAN)[-1]["loss"])
    with pytest.raises(ConfigError, match="needs the head domain_balance"):
        train(*make_seeing("balanced", ["gate"], head="cosface", sets=1), SEEING_PLAN)


def test_branches_look_at_their_windows() -> None:
    """On six cells: two rows for the eyes; a change elsewhere changes no branch."""
    assert [find_cells(6, share) for share in WINDOWS["eyes"]] == [slice(1, 4), slice(0, 6)]
    assert [find_cells(6, share) for share in WINDOWS["mouth"]] == [slice(4, 6), slice(1, 5)]
    assert find_cells(1, (0.68, 1.0)) == slice(0, 1)
    neck = build_backbone("plain", input_px=24, embedding_dim=16, neck="trunk_branch").eval().ending
    feature_map, early = torch.rand(1, 128, 3, 3), torch.rand(1, 64, 6, 6)
    with torch.no_grad():
        before = neck.look(feature_map, early, None).embedding
        early[:, :, 0] += 9  # above the eyes
        assert torch.equal(before, neck.look(feature_map, early, None).embedding)
        early[:, :, 5, 2] += 9
        assert not torch.equal(before, neck.look(feature_map, early, None).embedding)


def test_two_halves_are_two_layers_of_one_map() -> None:
    backbone = build_backbone("plain", input_px=16, embedding_dim=15, neck="twofold").eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        before = backbone(images)
        backbone.ending.halves[1].weight.zero_()
        after = backbone(images)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])
