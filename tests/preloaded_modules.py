"""What `preloaded` imports before it forks. No hivemind: its processes and threads belong to the nodes that need it."""

from importlib import import_module

from thinpipe.node import preload
from thinpipe.node.model.lean import import_common

for name in preload.LATER:
    import_module(name)
import_common()
import_module("transformers.models.llama.modeling_llama")
