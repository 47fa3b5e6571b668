"""Batches: which tokens a step trains on, as a pure function of the seed and the step.

What: a `Corpus` gives training windows, T + 1 ids long and starting every T ids, so that each id is predicted once an
epoch. `batch(step, microbatch)` is random access: a stage that comes back at step 812 asks for step 812, and the
position in a checkpoint is that one number.

How: sequence n of the run is window `order[n mod W]` of epoch `n // W`. The order of an epoch is the argsort of the raw
output of a counter-based generator (Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") under
the key (seed, epoch). Why not `Generator.permutation`? numpy keeps the raw stream of a bit generator fixed over
versions, but not what its distributions make of it, and two versions may meet in one resumed run. Why not sample with
replacement, which needs no order at all? A third of the corpus would be missed in each epoch.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType

import numpy as np

from .known_ids import KnownIds
from .local_files import DataError
from .preparing import Found


def random_order(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), int64 (count,), fixed for ever by a key of one or two integers below 2**64."""
    raw = np.random.Philox(key=np.array([*key, 0][:2], dtype=np.uint64)).random_raw(count)
    return np.argsort(np.asarray(raw), kind="stable")


class Corpus(ABC):
    """Training batches by (step, microbatch), and a fixed held-out part.

    `name` is for people. `digest` is over what determines the token sequence: source and tokenizer, not the seed.
    `position` is the step that was asked for last, or sought. What its text holds is in `found`, where that is known,
    and for people in `line`; `warnings` are what they should know before they train on it. `tokenizer_files` are those
    of the tokenizer with which it was coded, if it was (`Vocabulary.files`).
    """

    draws_slowly = False  # whether `batch` may wait for something
    found: Found | None = None
    line: str = ""
    warnings: tuple[str, ...] = ()
    tokenizer_files: Mapping[str, bytes] = MappingProxyType({})

    def __init__(self, heldout: np.ndarray, *, name: str, digest: str, sequence_length: int, heldout_sequences: int):
        self.name = name
        self.digest = digest
        self.position = 0
        self.known: KnownIds | None = None  # what to look at of each batch, where that could not be done at once
        self._draws = threading.Lock()  # another thread may draw: a lane, or one for whom nobody waits any more
        self.sequence_length = sequence_length
        available = (len(heldout) - 1) // sequence_length
        if available < 1:
            raise DataError(
                f"the held-out part of {name} has {len(heldout)} tokens and one sequence needs {sequence_length + 1}; "
                "give more text or lower data.sequence_length"
            )
        self.heldout_sequences = min(heldout_sequences, available)
        starts = np.arange(self.heldout_sequences) * available // self.heldout_sequences * sequence_length
        self._heldout = np.stack([heldout[start : start + sequence_length + 1] for start in starts]).astype(np.int32)

    def batch(self, step: int, microbatch: int, *, microbatches: int, batch_size: int) -> np.ndarray:
        """Token ids of one microbatch, int32 (batch_size, T + 1): inputs are [:, :-1] and targets [:, 1:]."""
        if step < 0 or batch_size < 1 or not 0 <= microbatch < microbatches:
            raise ValueError(
                f"no microbatch {microbatch} of {microbatches} with {batch_size} sequences in step {step}; "
                "count steps and microbatches from 0"
            )
        self.position = step
        with self._draws:
            ids_BS = self._sequences((step * microbatches + microbatch) * batch_size, batch_size)
        if self.known:
            self.known.check(ids_BS)
        return ids_BS

    def heldout_batch(self, index: int, batch_size: int) -> np.ndarray:
        """Held-out sequences from `index * batch_size`, int32 (B, T + 1); the last batch may be shorter.

        Raises IndexError past the last of `heldout_sequences`.
        """
        start = index * batch_size
        if not 0 <= start < self.heldout_sequences:
            raise IndexError(f"no held-out batch {index}: there are {self.heldout_sequences} sequences of {batch_size}")
        ids_BS = self._heldout[start : start + batch_size].copy()
        if self.known:
            self.known.check(ids_BS)
        return ids_BS

    def seek(self, step: int) -> None:
        """Say which step comes next, as after a restart. What `batch` returns depends on its arguments alone."""
        if step < 0:
            raise ValueError(f"cannot seek to step {step}; count from 0")
        self.position = step

    def record(self) -> dict[str, object]:
        """For the records of a run: what the text was, and what it holds, as far as that is known."""
        found = {} if self.found is None else asdict(self.found)
        return {"digest": self.digest, **found}

    @abstractmethod
    def _sequences(self, first: int, count: int) -> np.ndarray:
        """Training sequences number `first`..`first + count - 1` of the whole run, int32 (count, T + 1)."""


class LocalCorpus(Corpus):
    """Flat arrays of ids, usually mapped from the cache. Each epoch takes every window once, in its own order."""

    def __init__(
        self,
        train: np.ndarray,
        heldout: np.ndarray,
        *,
        name: str,
        digest: str,
        seed: int,
        sequence_length: int,
        heldout_sequences: int,
    ):
        self.windows = (len(train) - 1) // sequence_length
        if self.windows < 1:
            raise DataError(
                f"{name} gives {len(train)} training tokens and one sequence needs {sequence_length + 1}; "
                "give more text or lower data.sequence_length"
            )
        super().__init__(
            heldout,
            name=name,
            digest=digest,
            sequence_length=sequence_length,
            heldout_sequences=heldout_sequences,
        )
        self._train = train
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            for old in sorted(self._orders)[:-1]:  # a batch can straddle two epochs, never three worth keeping
                del self._orders[old]
            self._orders[epoch] = random_order(self.windows, self._seed, epoch)
        return self._orders[epoch]

    def _sequences(self, first: int, count: int) -> np.ndarray:
        length = self.sequence_length
        out_BT = np.empty((count, length + 1), dtype=np.int32)
        for row in range(count):
            epoch, place = divmod(first + row, self.windows)
            start = int(self._order(epoch)[place]) * length
            out_BT[row] = self._train[start : start + length + 1]
        return out_BT
