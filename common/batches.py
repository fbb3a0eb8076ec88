"""The batches of pre-training: which slices, in which order, with which augmentation and negatives.

Everything is a function of the seed and the step alone, so that a run can be entered anywhere and
goes on as if it had never stopped. The slices are read ahead, in the background, from the store's
memory map: the order is the same for every set, however large.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from common.hashing import NEAR_DUPLICATE, near_duplicates
from common.simclr import draw_augmentation

READERS = 4  # threads; several, so that a cold disk has several reads to work on
AHEAD = 8  # batches

# What the random numbers of an epoch or a step are for: each purpose has a stream of its own.
DRAW_MEMBERS, ORDER, AUGMENT, DROP_NEGATIVES, HOLD_OUT = 1, 2, 3, 4, 5


class Batch(NamedTuple):
    """One process's share of a batch of B slices, b of them its own."""

    slices: torch.Tensor  # uint8 [b, height, width]
    augmentation: torch.Tensor  # float32 [parameters, 2b], see simclr.draw_augmentation
    excluded: torch.Tensor | None  # bool [B, B]: pairs of slices that are no negatives
    dose: float  # near-duplicate negatives that a slice of the batch meets on average


def stream(selection, args, batches, device, rank=0, world=1):
    """Yield, on the device, the Batch of each (step, indices of its slices), such as of `steps`.

    selection: store.Selection. args: pretrain.py's, of which mask_negatives, mask_random,
    loss_groups and seed are used. All processes get equally many slices, for which up to world - 1
    slices of a batch sit out. For a GPU readers pin a Batch, so that nobody waits for its copy.
    """
    volume_index = selection.store.volume_index

    def load(step, indices):
        indices = indices[: len(indices) - len(indices) % world]
        share = np.array_split(indices, world)[rank]
        hashes, volumes = selection.store.hashes[indices], volume_index[indices]
        excluded = excluded_negatives(hashes, volumes, args, step)
        met = near_in_volume(hashes, volumes, NEAR_DUPLICATE)
        if excluded is not None:
            met &= ~excluded
            excluded = torch.from_numpy(excluded)
        rng = np.random.default_rng([args.seed, step, AUGMENT, rank])
        augmentation = draw_augmentation(2 * len(share), rng)
        slices = torch.from_numpy(selection.store.slices[share])
        tensors = slices, augmentation, excluded
        if device.type == "cuda":
            tensors = [t if t is None else t.pin_memory() for t in tensors]
        return *tensors, float(met.sum() / len(indices))

    def on_device(loaded):
        *tensors, dose = loaded.result()
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in tensors), dose)

    with ThreadPoolExecutor(READERS) as pool:
        coming = deque()
        for step, indices in batches:
            coming.append(pool.submit(load, step, indices))
            if len(coming) == AHEAD:
                yield on_device(coming.popleft())
        yield from map(on_device, coming)


def steps(selection, args, start):
    """Yield (step, indices of the slices in its batch) from step `start` on, without end."""
    _, per_epoch = epoch_size(selection, args)
    for epoch in count(start // per_epoch):
        for i, indices in enumerate(epoch_batches(selection, args, epoch)):
            step = epoch * per_epoch + i
            if step >= start:
                yield step, indices


# --- The order of an epoch.


def hold_out(selection, share, seed):
    """(selection to train on, selection held out or None): whole volumes, one draw for a store.

    In each of them slices of the other have no representative: -1.
    """
    if share == 0:
        return selection, None
    n = len(selection.store.volumes)
    drawn = np.random.default_rng([seed, 0, HOLD_OUT]).permutation(n)[: max(1, round(share * n))]
    held = np.isin(selection.store.volume_index, drawn)
    kept, representative = selection.kept, selection.representative
    return tuple(
        selection._replace(kept=kept[part[kept]], representative=np.where(part, representative, -1))
        for part in (~held, held)
    )


def epoch_size(selection, args):
    """(slices, batches) of an epoch."""
    slices = len(epoch_slices(selection, args.sample, seed=0, epoch=0))
    return slices, math.ceil(slices / args.batch_size)


def epoch_batches(selection, args, epoch):
    """The batches of an epoch, arrays of indices: near-equal, large first, at most batch_size."""
    slices = epoch_slices(selection, args.sample, args.seed, epoch)
    rng = np.random.default_rng([args.seed, epoch, ORDER])
    runs = cut_into_runs(slices, selection.store.volume_index[slices], args.neighbours, rng)
    order = np.concatenate([runs[i] for i in rng.permutation(len(runs))])
    return np.array_split(order, epoch_size(selection, args)[1])


def epoch_slices(selection, sample, seed, epoch):
    """Indices of the slices that an epoch trains on, in the store's order.

    sample: "kept", the selection's slices; "all", every slice of the store but those held out;
    "clusters", soft reduction (our choice): for each representative one slice, drawn anew every
    epoch from those that it stands for, itself included.
    """
    if sample == "kept":
        return selection.kept
    if sample == "all":
        return np.flatnonzero(selection.representative >= 0)
    members = np.flatnonzero(np.isin(selection.representative, selection.kept))
    members = members[np.argsort(selection.representative[members], kind="stable")]
    _, first, size = np.unique(
        selection.representative[members], return_index=True, return_counts=True
    )
    rng = np.random.default_rng([seed, epoch, DRAW_MEMBERS])
    return np.sort(members[first + rng.integers(size)])


def cut_into_runs(slices, volumes, length, rng):
    """Cut slices, in z order, into runs of `length` neighbours of one volume: a list of arrays.

    Where a volume's first run ends is drawn anew, so that its runs are others in every epoch.
    """
    if length == 1:
        return slices[:, None]
    runs = []
    for volume in np.split(slices, np.flatnonzero(np.diff(volumes)) + 1):
        runs += np.split(volume, np.arange(rng.integers(1, length + 1), len(volume), length))
    return runs


# --- Negatives.


def near_in_volume(hashes, volumes, bits):
    """Bool [n, n]: two different slices of one volume whose hashes differ by at most `bits`."""
    return near_duplicates(hashes, bits) & (volumes[:, None] == volumes)


def excluded_negatives(hashes, volumes, args, step):
    """Which pairs of a batch are no negatives of each other: bool [B, B], None where all are."""
    if args.mask_negatives is None and args.loss_groups == 1:
        return None
    n = len(hashes)
    group = np.arange(n) * args.loss_groups // n
    excluded = group[:, None] != group
    if args.mask_negatives is not None:
        near = near_in_volume(hashes, volumes, args.mask_negatives)
        if args.mask_random:
            rng = np.random.default_rng([args.seed, step, DROP_NEGATIVES])
            near = as_many_at_random(near, rng)
        excluded |= near
    return excluded


def as_many_at_random(mask, rng):
    """The control of a mask [n, n]: as many entries a line, drawn from all but the diagonal."""
    lots = rng.random(mask.shape)
    np.fill_diagonal(lots, np.inf)  # a slice stays with itself
    rank = lots.argsort(axis=1).argsort(axis=1)  # of each lot in its line
    return rank < mask.sum(axis=1, keepdims=True)
