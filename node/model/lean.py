"""transformers without the parts that a pipeline stage does not use, which are half of the time of its imports.

Before it defines a decoder, transformers imports `torch.distributed.tensor` (tensors cut over a cluster), the whole of
`torch._dynamo` with sympy (the compiler, for three decorators and a helper of one kind of mask) and `scipy.optimize` (a
loss of object detectors). A stage needs none of them. Two are optional for transformers: torch may be built without
`distributed`, scipy may not be there, and it asks. So it is told that they are not, while its modules are imported.
torch's compiler is not optional; it is put off: a stand-in knows the three decorators, and anything else that is asked
of it imports the real one, as does the mask's helper once a mask needs it. And what its thousand model files define,
which transformers reads from all of them when it is imported, is not read from them again.

Why not patch transformers, or copy the decoder: any decoder of transformers is to work, in its own code. What is
computed is the same; whoever compiles layers gets the compiler when they do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
MASK_HELPER = "torch._dynamo._trace_wrapped_higher_order_op"
SCAN = "define_import_structure"
NOT_NEEDED = ("is_scipy_available", "is_torch_distributed_available")
Structure = dict[frozenset[str], dict[str, set[str]]]  # needed backends -> module -> what it defines
# What every decoder of transformers imports; a model's own module follows when it is asked for.
COMMON = ("modeling_utils", "masking_utils", "modeling_layers", "generation.utils")


def import_common() -> None:
    """Import what all decoders share, and nothing that only others need. Once: what is there stays as it is."""
    if "transformers.modeling_utils" in sys.modules:
        return
    with without_unused():
        for name in COMMON:
            import_module(f"transformers.{name}")


@contextmanager
def without_unused() -> Iterator[None]:
    """While this is open, transformers finds no scipy and no torch.distributed, and a compiler that is put off."""
    from transformers import utils
    from transformers.utils import import_utils

    before = {(where, name): getattr(where, name) for where in (utils, import_utils) for name in NOT_NEEDED}
    for where, name in before:
        setattr(where, name, lambda: False)
    before[import_utils, SCAN] = scan = getattr(import_utils, SCAN)
    setattr(import_utils, SCAN, scanned_once(scan, Path(import_utils.__file__).parents[1] / "models"))
    standing_in = _put_off() if COMPILER not in sys.modules else {}
    try:
        yield
    finally:
        for (where, name), value in before.items():
            setattr(where, name, value)
        _end(standing_in)


def scanned_once(scan: Callable[..., Structure], models: Path) -> Callable[..., Structure]:
    """`scan`, which is asked for the models as a part of transformers first, and then for the models alone; it
    remembers its answers, and the second is a part of the first."""

    def scanned(path: str | Path, prefix: str | None = None) -> Structure:
        if prefix is not None or Path(path) != models / "__init__.py":
            return scan(path, prefix=prefix)
        inside = "models."
        return {
            backends: {name.removeprefix(inside): names for name, names in modules.items() if name.startswith(inside)}
            for backends, modules in scan(models, prefix="models").items()
        }

    return scanned


def _put_off() -> dict[str, ModuleType]:
    standing_in = {COMPILER: _LaterCompiler(COMPILER), MASK_HELPER: ModuleType(MASK_HELPER)}
    standing_in[COMPILER].__path__ = []
    standing_in[MASK_HELPER].TransformGetItemToIndex = _later  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.update(standing_in)
    return standing_in


def _end(standing_in: dict[str, ModuleType]) -> None:
    import torch

    for name, module in standing_in.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    if vars(torch).get("_dynamo") is standing_in.get(COMPILER, torch):
        del torch._dynamo


def _later() -> Any:
    """The mask's helper, once a mask needs it."""
    return import_module(MASK_HELPER).TransformGetItemToIndex()


def _unchanged(fn: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
    """A decorator for the compiler's eyes only; here is none."""
    del args, options
    return fn if fn is not None else _unchanged


class _LaterCompiler(ModuleType):
    """torch._dynamo, as long as nobody wants more of it than to be left alone by it."""

    disable = assume_constant_result = allow_in_graph = staticmethod(_unchanged)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _end({each: sys.modules[each] for each in (COMPILER, MASK_HELPER) if each in sys.modules})
        return getattr(import_module(COMPILER), name)
