"""Worker processes: results in order, memory bounded, gone when the main process is."""

import os
import signal
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from warnings import simplefilter

import numpy as np
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from common.files import fail

AHEAD = 32  # jobs in work, or done and waiting for their turn


def worker_pool(workers):
    """A pool of processes of one thread each: `workers`, or as many as there are cores if None."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        return ProcessPoolExecutor(workers or cores, initializer=start_worker)
    except OSError as error:  # its locks lie in shared memory
        fail(f"cannot start worker processes: {error.strerror}")


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    # pydicom's warnings about odd headers quote values, and what cannot be used is listed anyway
    simplefilter("ignore")
    threadpool_limits(1)
    # once this is freed, glibc keeps the memory of smaller arrays for the next slice
    np.empty(2**24, np.uint8)


def end_with_parent(parent):
    """End this process once its parent was killed; else it would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def in_order(pool, work, jobs):
    """Yield work(job) of every job, in order, computed in the pool.

    Only some jobs are handed out at a time, so that memory stays bounded.
    """
    running = deque()
    try:
        for job in jobs:
            running.append(pool.submit(work, job))
            if len(running) >= AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        fail(
            "a worker process was killed, most likely for want of memory: "
            "try again with --workers 1"
        )
