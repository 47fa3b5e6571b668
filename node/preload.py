"""What nodes are forked from: this process, once it has imported what they will need, and has done nothing else yet.

`thinpipe up` imports torch and transformers for its own checks. Nodes that are copies of it at that moment have them
too. The moment is after the settings are known to be good and before anything has a thread: progress on the screen,
the tokenizer, the wait for the nodes. Modules that nodes import only while they work are imported here first, or each
would import them by itself. hivemind is not among them: it has processes and threads of its own, and only nodes that
are told to `--join` need it.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

import torch

from ..sim.launch.fork_server import CannotFork, ForkServer
from .config import RunConfig
from .model import ModelError, skeleton
from .preparation import resolve_architecture

LATER = ("thinpipe.node.node_process", "thinpipe.node.local", "thinpipe.commands.hosting")
LATER += ("numpy.random", "numpy.ctypeslib", "encodings.idna", "grpc._utilities")  # what those import when first used


def fork_server(config: RunConfig) -> ForkServer | str:
    """What nodes of this run can be forked from, or why they cannot. Call it where the settings are known to be good;
    the caller closes it."""
    if torch.device(config.compute.device).type != "cpu":
        return f"compute.device is {config.compute.device}, and an accelerator does not survive a fork"
    for name in LATER:
        import_module(name)
    if not config.compute.emulate:
        with suppress(ModelError):  # for the nodes to say
            skeleton(resolve_architecture(config), torch.float32)
    try:
        return ForkServer.here()
    except (CannotFork, OSError) as error:
        return str(error)
