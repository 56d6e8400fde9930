"""curves: TensorBoard reads each value of the history, once."""

from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from pipelines.training.curves import CURVES, write_curves


def read_events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of all event files: length, its checksum, the event, its checksum, and again."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            data = data[16 + size :]
    return found


def make_history(epochs: int) -> list[dict[str, float]]:
    return [
        {"epoch": e, "step": 10 * e, "loss": 4 / e, "learning_rate": 0.1, "accuracy": e / 8,
         "seconds": 1.0}
        for e in range(1, epochs + 1)
    ]  # fmt: skip


def test_curves_are_whole_after_each_epoch(tmp_path) -> None:
    place = tmp_path / "curves"
    for epochs in (1, 3):
        write_curves(place, make_history(epochs))
        found = read_events(place)
        assert sorted(found) == sorted(CURVES)
        expected = [(10, 4.0), (20, 2.0), (30, 1.3333)]
        assert [(step, round(value, 4)) for step, value in found["loss"]] == expected[:epochs]
    assert found["accuracy"][2] == (30, 0.375)
