"""A node that gives nonsense to one round, and trains on as if it had not: `python -m tests.nonsense_node ROUND ...`.

The rest are arguments of `thinpipe`. For test_lane_processes.py.
"""

import sys

from thinpipe.cli import app
from thinpipe.node.averaging.averager import Averager
from thinpipe.node.averaging.round_plan import Round

ROUND = int(sys.argv.pop(1))
contribute, check = Averager.contribute, Averager.check


def contribute_nonsense(self: Averager, round_: Round) -> bytes:
    made = contribute(self, round_)
    return b"\xff" * len(made) if round_.number == ROUND else made


def check_others(self: Averager, number: int, lane: int, contribution: bytes) -> None:
    if lane != self.place.lane:  # or it would find out, and end
        check(self, number, lane, contribution)


Averager.contribute = contribute_nonsense
Averager.check = check_others
app()
