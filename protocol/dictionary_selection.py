"""Which entries of a dictionary the next change covers: a fixed number, and four ways to choose them.

full     all of them, whatever the divisor.
random   a subset drawn anew for each message, as in MAPL's streaming codebook synchronisation (arXiv 2606.05484).
robin    the next ones in order, so that any `divisor` messages in a row cover every entry.
drift    those whose owner's copy has moved farthest from what the peer holds, weighed by how much they are used.

A message covers exactly ceil(entries / divisor) entries: a link's load is then known beforehand, and no message is late
because the codebook happened to move. Why not a threshold on the drift instead: it would fill the link just when
training is least stable.

Pure functions: what is drawn comes from a generator that the caller has keyed, and the place of `robin` from the number
of the message, so nothing here needs to be in a checkpoint. Only the owner selects; the peer follows the indices.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from .errors import Fault, LocalProtocolError

Policy = Literal["full", "random", "robin", "drift"]


def budget(policy: Policy, divisor: int, entries: int) -> int:
    """Entries that one message covers: ceil(entries / divisor), or all of them."""
    return entries if policy == "full" else -(-entries // divisor)


def select(
    policy: Policy,
    divisor: int,
    *,
    entries: int,
    cursor: int,
    draw: np.random.Philox,
    drift: np.ndarray,
    usage: np.ndarray,
) -> np.ndarray | None:
    """Ascending indices (budget,), int64, or None for all entries, as `Publisher.publish` takes them.

    cursor: the number of this message among those of the same dictionary, a function of step and microbatch.
    draw: this message's own generator, of which only `random` takes numbers. drift: master less shipped, (entries,
    width). usage: (entries,), at least 0. Ties of `drift` go to the lower index. Raises LocalProtocolError for a policy
    that is none, and for tables that are not finite or not of this many entries.
    """
    if policy not in get_args(Policy) or divisor < 1 or entries < 1 or cursor < 0:
        what = f"no entries can be chosen by '{policy}' with divisor {divisor}, {entries} entries, message {cursor}"
        raise LocalProtocolError(Fault.CONFIGURATION, what)
    count = budget(policy, divisor, entries)
    if count == entries:
        return None
    if policy == "random":
        # Raw numbers and a stable sort, because NumPy promises the stream of those and not of its shuffles (NEP 19).
        chosen = np.argsort(draw.random_raw(entries), kind="stable")[:count]
    elif policy == "robin":
        chosen = (cursor * count + np.arange(count)) % entries
    else:
        chosen = np.argsort(-_worth(drift, usage, entries), kind="stable")[:count]
    return np.sort(chosen).astype(np.int64)


def _worth(drift: np.ndarray, usage: np.ndarray, entries: int) -> np.ndarray:
    if drift.ndim != 2 or len(drift) != entries or usage.shape != (entries,):
        what = f"drift is {drift.shape} and usage {usage.shape}, wanted ({entries}, width) and ({entries},)"
        raise LocalProtocolError(Fault.PAYLOAD, what)
    with np.errstate(all="ignore"):
        worth = np.sqrt(np.square(drift.astype(np.float64)).sum(axis=1)) * usage.astype(np.float64)
    if not np.isfinite(worth).all() or (usage < 0).any():
        at = int(np.argmax(~np.isfinite(worth) | (usage < 0)))
        raise LocalProtocolError(Fault.PAYLOAD, f"entry {at} has drift times usage {worth[at]}, usage {usage[at]}")
    return worth
