"""Class-balanced resampling, against mmdet3d's CBGSDataset and by counting; samples with and without labels, mixed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.sampler import ClassBalance, LabelMix, StepBatches

# Labels of 60 samples: class 0 is nearly everywhere, class 1 in a third, class 7 in one; some samples hold nothing.
LABELS = [[0, 0, 1] if n % 3 == 0 else [0] if n % 10 else [] for n in range(60)]
LABELS[17] = [7, 0, 7]


def test_as_many_draws_per_class_as_mmdet3d() -> None:
    from mmdet3d.datasets import CBGSDataset

    present = [0, 1, 7]

    class Samples:
        def __len__(self) -> int:
            return len(LABELS)

        def get_cat_ids(self, index: int) -> set[int]:
            return {present.index(label) for label in LABELS[index]}

    peer = object.__new__(CBGSDataset)
    peer._metainfo = {"classes": present}
    theirs = peer._get_sample_indices(Samples())
    balance = ClassBalance(LABELS)
    ours = balance.order(seed=3, epoch=0)
    # int() of a quotient that is whole may be one less there.
    assert len(theirs) <= len(ours) == len(balance) <= len(theirs) + len(present)
    # Only sample 17 holds class 7, so it is a third of the epoch, and a few draws for class 0 more.
    assert abs(Counter(ours.tolist())[17] - Counter(theirs)[17]) < 10
    assert len(ours) / 3 <= Counter(ours.tolist())[17] < len(ours) / 3 + 10


def test_classes_are_shown_equally_often_when_samples_hold_one_each() -> None:
    """Nine of ten samples hold class 0; half of what is drawn does, each sample about equally often."""
    balance = ClassBalance([[1] if n % 10 == 0 else [0] for n in range(1000)])
    drawn = np.concatenate([balance.order(0, epoch) for epoch in range(200)])
    assert len(balance) == 1000
    assert (drawn % 10 == 0).sum() == len(drawn) / 2
    rare = np.bincount(drawn, minlength=1000)[::10]
    assert rare.mean() == 1000  # 200 epochs of 500 draws over 100 samples
    assert np.abs(rare - 1000).max() < 5 * np.sqrt(1000), "uniform within a class"


@given(st.integers(0, 5), st.integers(0, 5))
def test_an_order_is_a_function_of_seed_and_epoch(seed: int, epoch: int) -> None:
    balance, again = ClassBalance(LABELS), ClassBalance([labels[::-1] for labels in LABELS])
    order = balance.order(seed, epoch)
    assert np.array_equal(order, again.order(seed, epoch))
    assert not np.array_equal(order, balance.order(seed, epoch + 1))
    assert not np.array_equal(order, balance.order(seed + 1, epoch))
    assert not {n for n, labels in enumerate(LABELS) if not labels} & set(order.tolist())


def test_an_order_is_mixed() -> None:
    """The draws for one class do not come in a row: every quarter of an epoch holds a quarter of each class."""
    order = ClassBalance([[n % 2] for n in range(2000)]).order(0, 0)
    quarters = (order % 2).reshape(4, -1).mean(1)
    assert np.abs(quarters - 0.5).max() < 0.1


def test_steps_follow_the_balanced_order_on_every_rank_and_after_a_resume() -> None:
    balance = ClassBalance(LABELS)
    steps = len(balance) // 8
    one = list(StepBatches(60, 8, 2, seed=1, order=balance))
    assert len(one) == 2 * steps == len(StepBatches(60, 8, 2, seed=1, order=balance))
    shown = [key.item for keys in one[steps:] for key in keys]
    assert shown == balance.order(1, 1)[: 8 * steps].tolist()
    assert [key.position for keys in one[:steps] for key in keys] == list(range(8 * steps)), "each draw has its own key"
    ranks = [list(StepBatches(60, 8, 2, seed=1, rank=rank, world=2, order=balance)) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == one
    assert list(StepBatches(60, 8, 2, seed=1, first=steps + 3, order=balance)) == one[steps + 3 :]


def test_samples_without_objects_cannot_be_balanced() -> None:
    with pytest.raises(ValueError, match="none of 3 samples holds an object"):
        ClassBalance([[], [], []])


@given(
    labelled=st.lists(st.booleans(), min_size=2, max_size=50).filter(lambda known: any(known) and not all(known)),
    share=st.floats(0.0, 1.0),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_every_step_has_its_share_of_labels(labelled: list[bool], share: float, batch_size: int, seed: int) -> None:
    count, steps = round(share * batch_size), len(labelled) // batch_size
    if not 0 < count < batch_size:
        with pytest.raises(ValueError, match=rf"a share of .* is {count} of a step of {batch_size}"):
            LabelMix(labelled, share, batch_size)
        return
    mix = LabelMix(labelled, share, batch_size)
    assert len(mix) == len(labelled)
    order = mix.order(seed, 0)
    assert len(order) == steps * batch_size
    known = np.array(labelled)[order].reshape(steps, batch_size)
    assert (known.sum(1) == count).all()
    for kind in (True, False):  # each kind is shown evenly: nothing again before all of it was shown
        shown = Counter(item for item in order.tolist() if labelled[item] == kind)
        members = [item for item, value in enumerate(labelled) if value == kind]
        times = [shown[item] for item in members]
        assert max(times) - min(times) <= 1
    assert np.array_equal(order, mix.order(seed, 0))


def test_steps_follow_the_mix_on_every_rank() -> None:
    labelled = [n % 4 == 0 for n in range(56)]
    mix = LabelMix(labelled, 0.5, 4)
    one = list(StepBatches(56, 4, 3, seed=1, order=mix))
    assert len(one) == 3 * 14
    for step in one:
        assert sum(labelled[key.item] for key in step) == 2
    ranks = [list(StepBatches(56, 4, 3, seed=1, rank=rank, world=2, order=mix)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == one
    assert any(labelled[key.item] for rank in ranks for key in rank[0])
    assert not np.array_equal(mix.order(1, 0), mix.order(1, 1))
    assert not np.array_equal(mix.order(1, 0), mix.order(2, 0))


@pytest.mark.parametrize(("labelled", "which"), [([True] * 4, "labelled"), ([False] * 4, "without labels")])
def test_one_kind_cannot_be_mixed(labelled: list[bool], which: str) -> None:
    with pytest.raises(ValueError, match=f"all 4 samples are {which}: there is nothing to mix"):
        LabelMix(labelled, 0.5, 2)
