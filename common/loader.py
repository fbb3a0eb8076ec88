"""The slices of each training step, from memory or from disk: a function of the seed and the step alone."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch

RESIDENT = (
    2e9  # bytes of slices that move to the device whole; of more, a part at a time is in memory
)
BLOCK, PART = (
    32,
    16_384,
)  # slices: neighbours that stay together on disk; read at a time, 0.8 GB at 224 px


def stream(slices, kept, batch_size, seed, start, device, rank=0, world=1):
    """Yield, from step `start` on, this process's share of each batch: uint8 [b, H, W] on the device.

    slices: the store, uint8 [N, H, W], memory-mapped. kept: rows to train on. Every epoch holds each once, in batches
    of near-equal size, none above batch_size, so that sets smaller than a batch work; all processes get equally many,
    for which up to world - 1 slices of a batch sit out. A set too large for memory is read part after part, from blocks
    of neighbours all over the store, in the order of the disk, while the part before trains.
    """
    per_epoch = math.ceil(len(kept) / batch_size)
    small = len(kept) * slices[0].nbytes <= RESIDENT
    per_part = per_epoch if small else max(1, PART // batch_size)

    def batches(part):
        """The batches, indices into kept, of one part of an epoch; an epoch has ceil(per_epoch / per_part) parts."""
        epoch, i = divmod(part, parts)
        order = epoch_order(len(kept), seed, epoch, 1 if small else BLOCK, per_part * batch_size)
        return np.array_split(order, per_epoch)[i * per_part : (i + 1) * per_part]

    def share(batch):
        return batch[rank : len(batch) - len(batch) % world : world]

    def read(part):
        """(indices into kept, sorted; their slices) of this process's share of a part."""
        wanted = np.sort(np.concatenate([share(batch) for batch in batches(part)]))
        return wanted, slices[kept[wanted]]

    parts = math.ceil(per_epoch / per_part)
    part, skip = (
        start // per_epoch * parts + start % per_epoch // per_part,
        start % per_epoch % per_part,
    )
    if small:
        resident = torch.from_numpy(slices[kept]).to(device)
        for part in count(part):
            for batch in batches(part)[skip:]:
                yield resident[torch.from_numpy(share(batch)).to(device)]
            skip = 0
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, part)
        for part in count(part):
            wanted, pixels = coming.result()
            coming = ahead.submit(read, part + 1)
            for batch in batches(part)[skip:]:
                yield torch.from_numpy(pixels[np.searchsorted(wanted, share(batch))]).to(device)
            skip = 0


def epoch_order(n, seed, epoch, block, part):
    """A shuffled order of n slices: blocks of neighbours in random order, and the slices of each `part` of it shuffled."""
    rng = np.random.default_rng([seed, epoch])
    starts = rng.permutation(np.arange(0, n, block))
    order = (starts[:, None] + np.arange(block)).ravel()
    order = order[order < n]
    for first in range(0, n, part) if block > 1 else ():
        rng.shuffle(order[first : first + part])
    return order
