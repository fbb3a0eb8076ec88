"""The batches of pre-training: order, sampling, shares, augmentation, negatives, dose."""

from itertools import chain, combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import batches
from common.hashing import hamming
from common.store import Selection, Store

CPU = torch.device("cpu")


def flags(**changed):
    """The flags of pretrain.py that decide its batches."""
    defaults = {"sample": "kept", "neighbours": 1, "batch_size": 16, "seed": 5}
    defaults |= {"mask_negatives": None, "mask_random": False, "loss_groups": 1}
    return SimpleNamespace(**defaults | changed)


def selection(n, kept=None, volumes=4):
    """n slices of one pixel, which is their index; hashes of neighbours differ in a bit or two."""
    bits = np.logical_xor.accumulate(np.random.default_rng(0).random((n, 64)) < 0.02, axis=0)
    hashes = np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)
    slices = np.arange(n).astype(np.uint8)[:, None, None]
    groups = np.array_split(np.arange(n), volumes)
    store = Store(None, slices, hashes, [str(i) for i in range(volumes)], groups)
    kept = np.arange(n) if kept is None else np.sort(kept)
    nearest = np.abs(np.arange(n)[:, None] - kept).argmin(axis=1)
    return Selection(store, kept, kept[nearest], "digest")


def stream(chosen, args, start=0, **processes):
    return batches.stream(chosen, args, batches.steps(chosen, args, start), CPU, **processes)


def taken(chosen, args, start, steps, **processes):
    """The slices of some steps, as lists of their indices."""
    coming = stream(chosen, args, start, **processes)
    return [next(coming).slices.flatten().tolist() for _ in range(steps)]


def first_batch(chosen, args):
    """(first batch, indices of its slices)."""
    return next(stream(chosen, args)), next(batches.steps(chosen, args, 0))[1]


@pytest.mark.parametrize("neighbours", [1, 5])
@pytest.mark.parametrize("n, batch_size", [(100, 16), (7, 16), (64, 16), (101, 3)])
def test_an_epoch_holds_every_slice_once_and_can_be_entered_anywhere(n, batch_size, neighbours):
    chosen = selection(200, np.random.default_rng(0).permutation(200)[:n])
    args = flags(batch_size=batch_size, neighbours=neighbours)
    per_epoch = -(-n // batch_size)
    both = taken(chosen, args, 0, 2 * per_epoch)
    for epoch in (both[:per_epoch], both[per_epoch:]):
        assert sorted(chain(*epoch)) == chosen.kept.tolist()
        sizes = [len(batch) for batch in epoch]
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    for start in (1, per_epoch - 1, per_epoch + 1):
        assert taken(chosen, args, start, 2) == taken(chosen, args, 0, start + 2)[start:]
    shares = [taken(chosen, args, 0, per_epoch, rank=rank, world=2) for rank in range(2)]
    for batch, first, second in zip(both[:per_epoch], *shares, strict=True):
        assert first + second == batch[: len(batch) // 2 * 2]


@pytest.mark.parametrize("neighbours, together", [(1, 0.01), (4, 3 / 4), (16, 15 / 16)])
def test_the_order_is_one_of_shuffled_runs_of_its_own_in_every_epoch_and_seed(neighbours, together):
    """`together`: the share of slices that are followed by their neighbour in the volume."""
    chosen = selection(2000)

    def order(seed, epoch):
        args = flags(neighbours=neighbours, seed=seed)
        return np.concatenate(batches.epoch_batches(chosen, args, epoch))

    orders = [order(*which) for which in ((0, 0), (1, 0), (0, 1), (2**31, 0))]
    volume = chosen.store.volume_index
    for slices, other in combinations(orders, 2):
        assert (np.diff(slices) == 1).mean() == pytest.approx(together, abs=0.01)
        assert abs(np.corrcoef(slices, np.arange(2000))[0, 1]) < 0.25
        assert (other == slices).mean() < 0.05
        ends = [set(one[:-1][np.diff(one) != 1]) for one in (slices, other)]
        assert ends[0] != ends[1] and ends[0] > set(np.flatnonzero(np.diff(volume)))
    assert np.array_equal(orders[0], order(0, 0))


def test_clusters_draw_one_member_of_each_anew_every_epoch():
    chosen = selection(200, np.arange(0, 200, 9))

    def members(seed, epoch):
        return batches.epoch_slices(chosen, "clusters", seed, epoch).tolist()

    epochs = [members(1, epoch) for epoch in range(60)]
    for drawn in epochs:
        assert sorted(chosen.representative[drawn]) == chosen.kept.tolist()
    assert epochs[7] == members(1, 7) not in (epochs[6], members(2, 7), members(2, 6))
    assert batches.epoch_slices(chosen, "all", 1, 0).tolist() == list(range(200))
    counts = np.bincount(list(chain(*epochs)), minlength=200)
    assert counts.min() > 0 and counts[10:190].max() < 25  # of 60, 1 in 9: none is preferred
    # in z order, which runs of neighbours need, also where clusters lie between each other
    mixed = chosen._replace(kept=np.arange(9), representative=np.arange(200) % 9)
    assert (np.diff(batches.epoch_slices(mixed, "clusters", 1, 0)) > 0).all()


def test_augmentation_depends_on_seed_step_and_rank_and_differs_between_views():
    """PyTorch's generator takes 32 bits of its seed: once, all seeds had the same crops."""
    chosen = selection(64)

    def drawn(seed, step, rank):
        batch = next(stream(chosen, flags(seed=seed), step, rank=rank, world=2))
        assert batch.augmentation.shape[1] == 2 * len(batch.slices) == 16
        return batch.augmentation

    which = [(0, 3, 0), (1, 3, 0), (0, 4, 0), (0, 3, 1), (1, 2, 0), (1, 2, 1), (2**31, 3, 0)]
    draws = [drawn(*one) for one in which]
    assert torch.equal(draws[0], drawn(0, 3, 0)) and len(draws[0][0].unique()) == 16
    views = [view for draw in draws for view in draw.chunk(2, dim=1)]
    for first, second in combinations(views, 2):
        assert not torch.isclose(first, second).all(dim=1).any()
    own = [batches.DRAW_MEMBERS, batches.ORDER, batches.AUGMENT, batches.DROP_NEGATIVES]
    assert len({*own, batches.HOLD_OUT}) == 5  # streams of random numbers


def slow_near_duplicates(chosen, indices, bits):
    """Two different slices of one volume whose hashes differ by at most `bits`."""
    hashes, volume = chosen.store.hashes, chosen.store.volume_index

    def near(a, b):
        return a != b and volume[a] == volume[b] and hamming(hashes[a], hashes[b]) <= bits

    return np.array([[near(a, b) for b in indices] for a in indices])


@pytest.mark.parametrize("bits", [0, 4, 64])
@pytest.mark.parametrize("neighbours", [1, 8])
def test_mask_and_dose(neighbours, bits):
    """The dose counts the near-duplicates (6 bits) that are still negatives."""
    chosen, args = selection(100), {"neighbours": neighbours, "batch_size": 25}
    plain, indices = first_batch(chosen, flags(**args))
    near, excluded = (slow_near_duplicates(chosen, indices, b) for b in (6, bits))
    assert plain.excluded is None and plain.dose == near.sum() / 25 > 0
    of_five = [next(stream(chosen, flags(**args), rank=rank, world=5)) for rank in range(5)]
    assert {share.dose for share in of_five} == {plain.dose}  # of the whole batch, in each
    masked, _ = first_batch(chosen, flags(**args, mask_negatives=bits))
    assert np.array_equal(masked.excluded.numpy(), excluded)
    assert masked.dose == (near & ~excluded).sum() / 25


def test_the_control_of_a_mask_drops_as_many_negatives_at_random():
    """Anew in every step and seed, none preferred, and never the slice itself."""
    chosen = selection(100)
    args = {"neighbours": 8, "batch_size": 25, "mask_negatives": 6, "mask_random": True}
    batch, indices = first_batch(chosen, flags(**args))
    near = slow_near_duplicates(chosen, indices, 6)
    excluded = batch.excluded.numpy()
    assert np.array_equal(excluded.sum(1), near.sum(1)) and batch.dose > 0
    assert batch.dose == (near & ~excluded).sum() / 25

    hashes, volumes = chosen.store.hashes[indices], chosen.store.volume_index[indices]

    def control(seed, step):
        return batches.excluded_negatives(hashes, volumes, flags(**args, seed=seed), step)

    assert np.array_equal(control(5, 0), excluded)
    drawn = np.mean([control(seed, step) for seed in range(20) for step in range(20)], axis=0)
    expected = np.where(np.eye(25), 0, near.sum(1, keepdims=True) / 24)
    assert np.abs(drawn - expected).max() < 0.12
    for first, second in combinations([control(1, 0), control(1, 1), control(2, 0)], 2):
        assert not np.array_equal(first, second)


def test_loss_groups_and_masks_are_parts_of_the_global_batch():
    """Runs stay together, so that a part's negatives are those of a batch of its size."""
    chosen = selection(96)
    args = flags(batch_size=24, neighbours=6, loss_groups=2, mask_negatives=6)
    alone, indices = first_batch(chosen, args)
    halves = np.arange(24) < 12
    expected = (halves[:, None] != halves) | slow_near_duplicates(chosen, indices, 6)
    assert np.array_equal(alone.excluded.numpy(), expected)
    for rank in range(3):
        share = next(stream(chosen, args, rank=rank, world=3))
        assert len(share.slices) == 8 and torch.equal(share.excluded, alone.excluded)
        assert share.dose == alone.dose == 0
    # parts of a batch that they do not divide are near-equal: none is of a slice alone
    excluded = batches.excluded_negatives(np.zeros(25), np.zeros(25), flags(loss_groups=2), 0)
    assert (~excluded).sum(1).tolist() == 13 * [13] + 12 * [12]
