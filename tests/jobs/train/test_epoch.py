"""The plan of an epoch, without files: what it holds, in which order, and that ranks share it evenly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.train.epoch import REAL, Mixture, length, order


def mixture(synthetic: list[int], real: list[int], shares: dict[int, float] | None = None) -> Mixture:
    """So many synthetic and real images of each class; seven of the synthetic ones in a shard."""
    label_N = np.concatenate([np.repeat(np.arange(len(counts)), counts) for counts in (synthetic, real)])
    mixed = np.random.default_rng(0).permutation(sum(synthetic)) // 7
    shard_N = np.concatenate([mixed, np.full(sum(real), REAL)])
    return Mixture(label_N, shard_N, len(synthetic), shares or {})


def epoch_of(
    chosen: Mixture, ranks: int = 1, last: str = "wrap", batch: int = 4, **changes
) -> list[np.ndarray]:
    """The rows of each rank."""
    settings = {"rng_seed": 3, "epoch": 0, "window": 20} | changes
    each = length(chosen.size, ranks, batch, last)
    return [order(chosen, rank=rank, ranks=ranks, each=each, **settings) for rank in range(ranks)]


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(sum),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_every_image_once_and_as_many_on_each_rank(counts, ranks, batch, window, epoch):
    chosen = mixture(counts, counts[::-1])
    wrapped = epoch_of(chosen, ranks, "wrap", batch, window=window, epoch=epoch)
    assert len({len(rows) for rows in wrapped}) == 1
    seen = Counter(np.concatenate(wrapped).tolist())
    assert set(seen) == set(range(2 * sum(counts)))
    assert sum(seen.values()) - len(seen) < ranks  # repeated

    if chosen.size < ranks * batch:
        assert length(chosen.size, ranks, batch, "drop") == 0
        return
    pieces = epoch_of(chosen, ranks, "drop", batch, window=window, epoch=epoch)
    assert {len(rows) % batch for rows in pieces} == {0}
    dropped = np.concatenate(pieces)
    assert len(set(dropped.tolist())) == len(dropped) > chosen.size - ranks * batch


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_the_share_of_real_images_is_that_of_each_class(share):
    """n·p / (1 - p) real ones beside n synthetic ones, be they repeated or too many for one epoch."""
    chosen = mixture([90, 30, 9], [5, 60, 1], dict.fromkeys(range(3), share))
    rows = np.concatenate(epoch_of(chosen, ranks=1))
    for c, n in enumerate([90, 30, 9]):
        real = (chosen.shard_N[rows] == REAL) & (chosen.label_N[rows] == c)
        assert real.sum() == round(n * share / (1 - share))
    synthetic = rows[chosen.shard_N[rows] != REAL]
    assert sorted(synthetic.tolist()) == list(range(129))


def test_real_images_take_turns_over_epochs():
    chosen = mixture([9], [7], {0: 0.25})  # three of seven in an epoch
    shown: Counter[int] = Counter()
    for epoch in range(12):
        (rows,) = epoch_of(chosen, epoch=epoch)
        shown.update(rows[chosen.shard_N[rows] == REAL].tolist())
        counts = [shown[row] for row in range(9, 16)]
        assert sum(counts) == 3 * (epoch + 1)
        assert max(counts) - min(counts) <= 1


def test_shares_at_their_ends_and_classes_that_lack_a_kind():
    chosen = mixture([4, 4, 4, 0, 0], [3, 3, 0, 3, 3], {0: 0.0, 1: 1.0, 2: 1.0, 3: 0.0, 4: 0.5})
    assert chosen.synthetic_C.tolist() == [4, 0, 4, 0, 0]
    assert chosen.real_C.tolist() == [0, 3, 0, 0, 3]
    (rows,) = epoch_of(chosen)
    assert Counter(chosen.label_N[rows].tolist()) == {0: 4, 1: 3, 2: 4, 4: 3}


def test_the_order_is_the_seeds_the_epochs_and_the_ranks():
    chosen = mixture([100], [20])
    (first,), (again,) = epoch_of(chosen), epoch_of(chosen)
    assert first.tolist() == again.tolist()
    for other in ({"epoch": 1}, {"rng_seed": 4}):
        assert first.tolist() != epoch_of(chosen, **other)[0].tolist()
    left, right = epoch_of(chosen, ranks=2)
    assert not set(left.tolist()) & set(right.tolist())


def test_a_rank_reads_few_shards_and_a_window_fewer():
    """Half of the 144 shards for each of two ranks, and one of them for both; a window of 70: at most 12."""
    chosen = mixture([1008], [])
    left, right = (chosen.shard_N[rows] for rows in epoch_of(chosen, ranks=2, window=70))
    assert len(set(left)) + len(set(right)) <= 144 + 1
    for start in range(0, len(left), 70):
        assert len(set(left[start : start + 70])) <= 12


def test_a_window_is_shuffled():
    """Within it neither shards nor their order can be told: neighbours are mostly of different shards."""
    chosen = mixture([700], [])
    (rows,) = epoch_of(chosen, window=700)
    shards = chosen.shard_N[rows]
    assert (shards[1:] == shards[:-1]).mean() < 0.05  # 1 in 100 by chance
    assert abs(np.corrcoef(rows, np.arange(700))[0, 1]) < 0.15
