"""Worker processes: results in order, and gone when the main process is."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from threading import Thread
from warnings import simplefilter

import numpy as np
from joblib import cpu_count  # comes with scikit-learn, as does threadpoolctl
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from common.files import fail


def in_order(work, jobs, unit, workers=None, batch=1):
    """Yield work(job) of every job, in order, from `workers` processes of one thread each.

    unit: what the progress bar counts. workers: None: one a core. batch: jobs handed over at once.
    Stops with one line if a process is killed. (joblib's start half a second later, and outlive a
    killed main process by minutes.)
    """
    with ProcessPoolExecutor(workers or cpu_count(), initializer=start_worker) as pool:
        try:
            results = pool.map(work, jobs, chunksize=batch)
            yield from tqdm(results, f"{unit}s", len(jobs), unit=unit, disable=not jobs)
        except BrokenProcessPool:
            fail("a worker process was killed, perhaps for want of memory: try --workers 1")


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    Thread(target=end_with_parent, daemon=True).start()
    # pydicom's warnings about odd headers quote values, and what cannot be used is listed anyway
    simplefilter("ignore")
    threadpool_limits(1)
    # once freed, glibc keeps memory of this size; new memory for every slice takes a tenth longer
    np.empty(2**24, np.uint8)


def end_with_parent():
    """End this process once its parent was killed; else it would wait for work for ever."""
    parent_process().join()
    os._exit(1)
