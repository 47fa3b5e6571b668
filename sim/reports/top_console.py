"""The screen of `thinpipe top`: one frame after the other until the run is over or the user stops it.

The frames are drawn on the terminal's other screen, as `top` does, and the last one is left behind on the first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console
from rich.live import Live

from .top_data import MetricsSource, look
from .top_view import frame


def show(watched: Sequence[MetricsSource], *, once: bool, every_s: float, console: Console | None = None) -> bool:
    """Draw until all swarms are over, or Ctrl-C; `once`, or without a terminal: one frame. False if there was nothing
    to draw, because nobody has answered."""
    console = console or Console()
    swarms = look(watched, time.time())
    if not (once or all(swarm.over for swarm in swarms)) and console.is_terminal:
        with (
            suppress(KeyboardInterrupt),  # how it is ended
            Live(console=console, screen=True, auto_refresh=False, vertical_overflow="ellipsis") as live,
        ):
            while not all(swarm.over for swarm in swarms):
                live.update(frame(swarms, width=console.width, now_s=time.time()), refresh=True)
                time.sleep(every_s)
                swarms = look(watched, time.time())
    console.print(frame(swarms, width=console.width, now_s=time.time()))
    return any(swarm.stages or not swarm.notes for swarm in swarms)
