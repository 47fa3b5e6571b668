"""The rounds of one node, put together: who is a member, what is held, how a state of another lane comes."""

from __future__ import annotations

from collections.abc import Callable

from ...protocol.greeting import NodeIdentity
from ...protocol.rollback import Rollback
from ...sim.links.shaper import LinkProfile
from ..averaging.averager import Averager
from ..checkpoints.restore_points import RestorePoints
from ..config import RunConfig
from ..link_settings import part_bytes_for, parts_ahead_for
from ..links.control_stream import Control
from ..run_records import MetricsWriter
from ..worker_thread import Reporter
from .group_rounds import GroupRounds
from .held_rounds import HeldRounds, Holding
from .lane_membership import LaneMembership
from .lateral_links import LateralLinks
from .rounds import Rounds
from .state_copies import StateCopies


def rounds_over(
    lateral: LateralLinks,
    config: RunConfig,
    identity: NodeIdentity,
    averager: Averager,
    *,
    machine: Rollback,
    control: Control,
    points: RestorePoints,
    metrics: MetricsWriter,
    under_way: Callable[[], int],
    committed: Callable[[], int],
    on_changed: Callable[[], None],
    on_fault: Reporter,
    held_up: Holding,
    paused_ago_s: Callable[[], float],
) -> HeldRounds:
    """Of the node that `identity` describes, whose neighbours `control` talks to.

    points: what the stage can be set back to. under_way: steps that are completed once the present one is; committed:
    those of the newest checkpoint. on_changed: what the next step waits for may be another thing now. held_up,
    paused_ago_s: as of `Rounds` and `LaneMembership`.
    """
    if config.context.method:
        return GroupRounds(lateral, identity.lanes, metrics, held_up=held_up)
    profile = LinkProfile.parse(config.link.link)
    states = StateCopies(
        points.store,
        part_bytes=part_bytes_for(profile),
        parts_ahead=parts_ahead_for(profile),
        say=lateral.say,
        refuse=lateral.refuse,
        on_fault=on_fault,
    )

    def end_at_checkpoint() -> None:
        """All stages go back to the newest step that they share, and end there: with 0 steps to do, none is left."""
        control.act(machine.end_after(0))
        control.act(machine.start_view_change())

    async def take_up(lane: int, completed: int) -> None:
        """This stage's state of another lane, in the place of its own."""
        await points.discard_after(completed - 1)
        await states.fetch(lane, completed)
        # Its tables are named with that lane's generation, and names never go back.
        machine.outlived = max(machine.outlived, points.store.manifest(completed).generation)
        metrics.write("took_up", lane=lane, completed=completed)

    membership = control.rounds = LaneMembership(
        identity,
        averager.plan,
        lateral,
        metrics,
        deadline_s=config.lanes.round_timeout_s,
        tell=control.tell,
        refuse=control.refuse,
        on_left_out=lambda: control.act(machine.start_view_change()),
        on_in_vain=end_at_checkpoint,
        on_void=points.make_void,
        on_changed=on_changed,
        under_way=under_way,
        saved=committed,
        take_up=take_up,
        let_go=states.let_go,
        came_s=lambda: states.came_s,
        lost_s=config.link.replacement_timeout_s,
        paused_ago_s=paused_ago_s,
    )
    return Rounds(lateral, membership, states, metrics, held_up=held_up)
