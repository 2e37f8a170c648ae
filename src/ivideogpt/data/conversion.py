"""Reads and encodes episodes one after another, in this process or in several, in the order that they were listed in.

What comes out does not depend on the number of processes. An episode that cannot be read comes out as the error; one
that takes its process down with it (a decoder that crashes, no memory left) is found by reading alone what was under
way, and comes out as an error, too.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from ivideogpt.data.codec import encode_episode
from ivideogpt.data.episode import Episode
from ivideogpt.data.shards import summary
from ivideogpt.data.sources.frames import Job
from ivideogpt.data.transforms import fit_uint8

AHEAD = 3
"""Episodes a process that are under way or wait for their turn."""

Read = Callable[[], Episode]
Encoded = tuple[bytes, dict[str, Any]]
Done = tuple[str, Encoded | Exception]


def encode_all(jobs: Iterable[Job], resize: int | None, workers: int) -> Iterator[Done]:
    """Every episode's key and record, or the error that kept it from being one.

    Args:
        jobs: Keys, and how to get the episodes; with more than one process, what can be pickled.
        resize: Centre-crop and resize the frames to this many pixels; None leaves them.
        workers: Processes; 1 reads in this one.
    """
    if workers == 1:
        for key, read in jobs:
            yield key, encode(read, resize)
        return
    waiting, under_way = iter(jobs), deque[tuple[Job, Future[Encoded | Exception]]]()
    pool = _pool(workers)
    try:
        while True:
            for job in islice(waiting, AHEAD * workers - len(under_way)):
                under_way.append((job, _submit(pool, job[1], resize)))
            if not under_way:
                return
            (key, _), future = under_way[0]
            try:
                result = future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=False, cancel_futures=True)
                for (name, read), other in under_way:
                    finished = other.done() and not other.cancelled() and other.exception() is None
                    yield name, other.result() if finished else _alone(read, resize)
                under_way.clear()
                pool = _pool(workers)
                continue
            under_way.popleft()
            yield key, result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def encode(read: Read, resize: int | None) -> Encoded | Exception:
    """The record of one episode with what the manifest keeps of it, or why there is none."""
    try:
        episode = read()
        if resize is not None:
            episode = _resized(episode, resize)
        return encode_episode(episode), summary(episode)
    except (ValueError, OSError, MemoryError) as error:
        return error


def _submit(pool: ProcessPoolExecutor, read: Read, resize: int | None) -> Future[Encoded | Exception]:
    """What the pool will give; a pool that is broken already says so through the future, as it does later."""
    try:
        return pool.submit(encode, read, resize)
    except BrokenProcessPool as error:
        broken: Future[Encoded | Exception] = Future()
        broken.set_exception(error)
        return broken


def _alone(read: Read, resize: int | None) -> Encoded | Exception:
    """The same in a process of its own, which may die."""
    with _pool(1) as pool:
        try:
            return pool.submit(encode, read, resize).result()
        except BrokenProcessPool:
            return ValueError("reading it took its process down: the decoder crashed, or memory ran out")


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def _resized(episode: Episode, resolution: int) -> Episode:
    video = fit_uint8(torch.from_numpy(np.ascontiguousarray(episode.video.transpose(0, 3, 1, 2))), resolution)
    return dataclasses.replace(episode, video=np.ascontiguousarray(video.numpy().transpose(0, 2, 3, 1)))
