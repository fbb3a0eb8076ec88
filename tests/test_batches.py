"""The batches of pre-training: order, sampling, shares, augmentation, negatives, dose."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import batches
from common.hashing import hamming
from common.store import Selection, Store

CPU = torch.device("cpu")


def flags(**changed):
    """pretrain.py's flags that batches.py reads."""
    defaults = {
        "sample": "kept",
        "neighbours": 1,
        "batch_size": 16,
        "mask_negatives": None,
        "mask_random": False,
        "loss_groups": 1,
        "seed": 5,
    }
    return SimpleNamespace(**defaults | changed)


def selection(n, kept=None, volumes=4, slices=None, seed=0):
    """n slices of one pixel, which is their row; hashes of neighbours differ in a bit or two."""
    rng = np.random.default_rng(seed)
    bits = np.logical_xor.accumulate(rng.random((n, 64)) < 0.02, axis=0)
    hashes = np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)
    if slices is None:
        slices = np.arange(n, dtype=np.uint8)[:, None, None]
    groups = np.array_split(np.arange(n), volumes)
    store = Store(None, slices, hashes, [str(i) for i in range(volumes)], groups, 0)
    kept = np.arange(n) if kept is None else np.sort(kept)
    nearest = np.abs(np.arange(n)[:, None] - kept).argmin(axis=1)
    return Selection(store, kept, kept[nearest], "digest")


def taken(chosen, args, start, steps, **processes):
    """The slices of some steps, as lists of rows."""
    stream = batches.stream(chosen, args, start, CPU, **processes)
    return [next(stream).slices.flatten().tolist() for _ in range(steps)]


@pytest.mark.parametrize("neighbours", [1, 5])
@pytest.mark.parametrize("n, batch_size", [(100, 16), (7, 16), (64, 16), (101, 3)])
def test_an_epoch_holds_every_slice_once_and_can_be_entered_anywhere(n, batch_size, neighbours):
    chosen = selection(200, np.random.default_rng(0).permutation(200)[:n])
    args = flags(batch_size=batch_size, neighbours=neighbours)
    per_epoch = -(-n // batch_size)
    found = taken(chosen, args, 0, 2 * per_epoch)
    for epoch in (found[:per_epoch], found[per_epoch:]):
        assert sorted(sum(epoch, [])) == chosen.kept.tolist()
        sizes = [len(batch) for batch in epoch]
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert n < 20 or found[:per_epoch] != found[per_epoch:]
    for start in (1, per_epoch - 1, per_epoch + 1):
        assert taken(chosen, args, start, 2) == taken(chosen, args, 0, start + 2)[start:]
    shares = [taken(chosen, args, 0, per_epoch, rank=rank, world=2) for rank in range(2)]
    for batch, first, second in zip(found, *shares):
        assert first + second == batch[: len(batch) // 2 * 2]


def test_the_order_is_uniform_and_the_same_for_a_set_beyond_memory():
    """Neighbours meet in a batch as seldom as chance lets them, however large the slices are."""
    n, batch_size, reach = 4000, 50, 5
    args = flags(batch_size=batch_size)
    large = np.broadcast_to(np.uint8(0), (n, 4096, 4096))  # 67 GB, were it not one byte
    orders = [
        [rows.tolist() for rows in batches.epoch_batches(selection(n, slices=slices), args, 3)]
        for slices in (None, large)
    ]
    assert orders[0] == orders[1]
    met = 0
    for rows in orders[0]:
        distance = np.abs(np.subtract.outer(rows, rows))
        np.fill_diagonal(distance, n)
        met += (distance.min(axis=1) <= reach).sum()
    expected = 1 - (1 - 2 * reach / n) ** (batch_size - 1)
    assert met / n == pytest.approx(expected, abs=0.02)


def test_runs_are_neighbours_of_one_volume_and_others_in_every_epoch():
    chosen = selection(103)
    volume = chosen.store.volume_index
    cuts = []
    for epoch in range(2):
        rng = np.random.default_rng(epoch)
        runs = batches.cut_into_runs(np.arange(103), volume, 8, rng)
        assert np.concatenate(runs).tolist() == list(range(103))
        assert all(len(set(volume[run])) == 1 for run in runs if len(run))
        sizes = Counter(len(run) for run in runs)
        assert max(sizes) == 8 and sizes[8] >= 103 // 8 - 4
        cuts.append([run.tolist() for run in runs])
    assert cuts[0] != cuts[1]


def test_clusters_draw_one_member_of_each_anew_every_epoch():
    chosen = selection(200, np.arange(0, 200, 9))
    members = chosen.representative
    seen = []
    for epoch in range(60):
        rows = batches.epoch_rows(chosen, "clusters", 1, epoch)
        assert sorted(members[rows]) == chosen.kept.tolist()
        seen.append(rows.tolist())
    assert set(sum(seen, [])) == set(range(200)) and seen[0] != seen[1]
    assert seen[7] == batches.epoch_rows(chosen, "clusters", 1, 7).tolist()
    assert seen[7] != batches.epoch_rows(chosen, "clusters", 2, 7).tolist()
    counts = np.bincount(sum(seen, []))
    interior = counts[10:190]
    assert interior.max() < 25  # of 60 epochs, 1 in 9: no member is preferred


def test_sample_all_trains_on_every_row():
    chosen = selection(50, np.arange(0, 50, 7))
    assert batches.batches_per_epoch(chosen, flags(sample="all")) == 4
    found = taken(chosen, flags(sample="all"), 0, 4)
    assert sorted(sum(found, [])) == list(range(50))


def test_augmentation_depends_on_seed_step_and_rank():
    """PyTorch's generator takes 32 bits of its seed: once, all seeds and ranks had the same crops."""
    chosen = selection(64)

    def drawn(seed, step, rank):
        stream = batches.stream(chosen, flags(seed=seed), step, CPU, rank=rank, world=2)
        return next(stream).augmentation

    reference = drawn(0, 3, 0)
    assert torch.equal(reference, drawn(0, 3, 0))
    for other in (drawn(1, 3, 0), drawn(0, 4, 0), drawn(0, 3, 1), drawn(2**31, 3, 0)):
        assert not torch.isclose(reference, other).all(dim=1).any()


def slow_near_duplicates(chosen, rows, bits):
    hashes, volume = chosen.store.hashes, chosen.store.volume_index
    found = np.zeros((len(rows), len(rows)), bool)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            near = hamming(hashes[a], hashes[b]) <= bits
            found[i, j] = a != b and volume[a] == volume[b] and near
    return found


@pytest.mark.parametrize("bits", [0, 6, 64])
def test_near_duplicates_are_those_of_a_double_loop(bits):
    chosen = selection(60, volumes=3)
    rows = np.random.default_rng(1).permutation(60)[:40]
    hashes, volume = chosen.store.hashes[rows], chosen.store.volume_index[rows]
    found = batches.near_duplicates(hashes, volume, bits)
    assert np.array_equal(found, slow_near_duplicates(chosen, rows, bits))


@pytest.mark.parametrize("neighbours", [1, 8])
def test_mask_and_dose(neighbours):
    """The dose counts near-duplicates that are still negatives; the control leaves others out."""
    chosen = selection(100)

    def first(**mask):
        args = flags(neighbours=neighbours, batch_size=25, **mask)
        [(_, rows)] = [next(batches.steps(chosen, args, 0))]
        return next(batches.stream(chosen, args, 0, CPU)), slow_near_duplicates(chosen, rows, 6)

    plain, near = first()
    assert plain.excluded is None and plain.dose == near.sum() / 25 > 0
    masked, _ = first(mask_negatives=6)
    assert np.array_equal(masked.excluded.numpy(), near) and masked.dose == 0
    control, _ = first(mask_negatives=6, mask_random=True)
    excluded = control.excluded.numpy()
    assert np.array_equal(excluded.sum(1), near.sum(1)) and not excluded.diagonal().any()
    assert not np.array_equal(excluded, near)
    assert control.dose == (near & ~excluded).sum() / 25


def test_loss_groups_are_equal_parts_of_the_batch():
    """Runs stay together, so that a part's negatives are those of a batch of its size."""
    chosen = selection(96)
    args = flags(batch_size=24, neighbours=6, loss_groups=2, mask_negatives=6)
    [(_, rows)] = [next(batches.steps(chosen, args, 0))]
    excluded = next(batches.stream(chosen, args, 0, CPU)).excluded.numpy()
    halves = np.arange(24) < 12
    expected = (halves[:, None] != halves) | slow_near_duplicates(chosen, rows, 6)
    assert np.array_equal(excluded, expected)


def test_the_mask_of_processes_is_that_of_the_global_batch():
    chosen = selection(96)
    args = flags(batch_size=24, neighbours=6, mask_negatives=6)
    alone = next(batches.stream(chosen, args, 0, CPU))
    for rank in range(3):
        share = next(batches.stream(chosen, args, 0, CPU, rank=rank, world=3))
        assert len(share.slices) == 8 and torch.equal(share.excluded, alone.excluded)
