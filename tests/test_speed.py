"""The speed comparison: that it times everything there is, and that its arithmetic is right."""

import pytest
from msgspec.structs import asdict

from common.report import tables
from common.report.schema import Task
from comparison import speed
from comparison.contenders import batch_of


def test_every_contender_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "REPETITIONS", 2)
    monkeypatch.setattr(speed, "RECIPE", Task(1, 12, 8, training=True))
    monkeypatch.setattr(speed, "LENGTHS", (Task(3, 5, 8), Task(3, 12, 8)))
    tasks = [Task(3, 12, 8), Task(3, 12, 8, bidirectional=True, backward=False)]
    found = speed.measure(tasks, lambda line: None)
    for task in tasks:
        rows = {r.contender: r for r in found.rows if asdict(r).items() >= asdict(task).items()}
        assert {"torch loop", "torch scan", "jax scan", "nn.GRU packed"} < rows.keys()
        assert {"flax.linen RNN", "flax.nnx RNN"} < rows.keys()
        assert rows[speed.REFERENCE].ratio == 1
        for row in rows.values():
            low, high = row.quartiles
            assert 0 < low <= row.tokens_per_second <= high
            assert 0 < row.peak_fraction < 1
    assert {"nn.GRU padded", "torch loop"} <= {row.contender for row in found.recipe}
    if {"torch fused", "jax fused"} < rows.keys():
        asked = {(name, T) for name in ("torch fused", "jax fused") for T in (5, 12)}
        assert {(row.contender, row.T) for row in found.lengths} == asked
    assert all(row.nanoseconds_per_token > 0 for row in found.lengths)
    assert [len(table.rows) for table in tables.tasks(found)] == [len(found.rows) // 2] * 2
    assert len(tables.all_tasks(found).rows) == len(found.rows)


def test_rows_follow_from_the_seconds() -> None:
    task = Task(4, 30, 16)
    words = batch_of(4, 30).words
    rows = speed._rows(task, {speed.REFERENCE: [4.0, 2.0, 3.0], "ours": [1.0, 1.0, 9.0]}, 1e9)
    ours = next(row for row in rows if row.contender == "ours")
    assert ours.tokens_per_second == words
    assert ours.ratio == 3
    assert ours.quartiles == (pytest.approx(words / 5), words)


def test_operations_of_the_products() -> None:
    # 10 words, 4 distinct, H 2: recurrent 2 * 10 * 6 * 2 = 240, inputs 2 * 4 * 6 * 300 = 14,400.
    forward = speed._flops(Task(1, 10, 2, backward=False), 10, 4)
    both = speed._flops(Task(1, 10, 2, bidirectional=True), 10, 4)
    assert forward == 240 + 14_400
    assert both == 2 * (3 * 240 + 2 * 14_400)


def test_a_batch_is_real_reviews_of_about_the_length_asked_for() -> None:
    batch = batch_of(16, 50)
    assert batch.tokens.shape == (50, 16)
    assert batch.lengths.max() == 50
    assert batch.lengths.min() >= 37
    assert len(batch.distinct) < batch.words
