"""Checks of this machine for hosting a stage: packages, clock, disk, memory, cores, GPU, the kernel's network tools.

Each check gives a `Finding` with its remedy, and changes nothing that it does not put back. Limits are for a node of a
thin-link swarm: a disk that takes a checkpoint in seconds, a timer that wakes a sender within a few milliseconds.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
from packaging.requirements import InvalidRequirement, Requirement

from ... import __version__
from ...sim.links.tc import KernelLinkError, has_netem
from ..config import ConfigError, RunConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

State = Literal["ok", "warning", "fault", "not asked"]

PACKAGES = ("torch", "grpcio", "protobuf", "hivemind", "transformers", "msgpack", "cryptography")
GIB = 2**30
FREE_LEAST_BYTES = 1 * GIB  # less is a fault whatever the run: records, logs, tokenised text
FSYNC_BYTES = 16 * 2**20
FSYNC_SLOW_S = 1.0  # for those: a checkpoint of 1 GB would take a minute
WAKE_LATE_S = 0.005  # the transport's chunks are 5 ms of a link
NAPS = 20
PRODUCT_SIDE, PRODUCTS = 384, 5
BF16_SLOW = 2.0  # times float32; with instructions it is faster
STATE_BYTES_PER_PARAMETER = 12  # float32: weight and two moments
USER_SPACE = "only --isolate netns needs it; the cap of --link does not"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """name: what was looked at. found: one line. remedy: what to do, "" where nothing has to be done."""

    name: str
    state: State
    found: str
    remedy: str = ""


def python() -> Finding:
    """An older one than 3.11 does not come this far."""
    return Finding(name="Python", state="ok", found=f"{platform.python_version()} at {sys.executable}")


def packages() -> Finding:
    """Versions, against the ranges that thinpipe's own metadata asks for."""
    wanted = _wanted()
    said, missing, unlike = [f"thinpipe {__version__}"], list[str](), list[str]()
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        said.append(f"{name} {version}")
        requirement = wanted.get(name)
        if requirement and not requirement.specifier.contains(version, prereleases=True):
            unlike.append(f"'{requirement.name}{requirement.specifier}'")
    if missing or unlike:
        what = ", ".join([*(f"{name} is missing" for name in missing), *(f"{each} is asked for" for each in unlike)])
        remedy = f"pip install {' '.join([*missing, *unlike])}"
        return Finding(name="packages", state="fault", found=f"{', '.join(said)}; {what}", remedy=remedy)
    return Finding(name="packages", state="ok", found=", ".join(said))


def _wanted() -> dict[str, Requirement]:
    """By name; nothing where thinpipe itself runs from a directory that was not installed."""
    try:
        lines = importlib.metadata.requires("thinpipe") or []
        found = [Requirement(line) for line in lines]
    except (importlib.metadata.PackageNotFoundError, InvalidRequirement):
        return {}
    return {each.name: each for each in found if each.marker is None}


def timer() -> Finding:
    """Does the monotonic clock run, at the wall clock's pace, and does a sleeper wake up in time?"""
    began, wall = time.monotonic(), time.time()
    late, before = list[float](), began
    for _ in range(NAPS):
        time.sleep(0.002)
        now = time.monotonic()
        if now <= before:
            return Finding(
                name="timer",
                state="fault",
                found="the monotonic clock does not run forward",
                remedy="change the kernel's clock source (/sys/devices/system/clocksource)",
            )
        late.append(now - before - 0.002)
        before = now
    apart = abs((time.time() - wall) - (time.monotonic() - began))
    middle = statistics.median(late)
    found = f"timers fire {middle * 1000:.2f} ms late (median of {NAPS})"
    if apart > 0.05:
        remedy = "something sets the wall clock; let it be slewed, as chrony does"
        return Finding(
            name="timer",
            state="warning",
            found=f"{found}; the wall clock jumped by {apart:.2f} s meanwhile",
            remedy=remedy,
        )
    if middle > WAKE_LATE_S:
        remedy = "the machine is busy or its timer coarse: links will be slower than their caps"
        return Finding(name="timer", state="warning", found=found, remedy=remedy)
    return Finding(name="timer", state="ok", found=found)


def root() -> Finding:
    if os.geteuid() == 0:
        return Finding(name="root", state="ok", found="yes")
    return Finding(
        name="root",
        state="warning",
        found=f"no, user {os.geteuid()}: no namespaces and no caps in the kernel",
        remedy=f"run as root for those; {USER_SPACE}",
    )


def traffic_control() -> Finding:
    """tc and netem; netem is tried in a namespace that exists only for it."""
    missing = [program for program in ("tc", "ip") if shutil.which(program) is None]
    if missing:
        remedy = f"apt-get install iproute2; {USER_SPACE}"
        return Finding(name="tc", state="warning", found=f"{' and '.join(missing)} not installed", remedy=remedy)
    if os.geteuid() != 0:
        remedy = f"run as root to find out; {USER_SPACE}"
        return Finding(name="tc", state="warning", found="installed; netem cannot be tried without root", remedy=remedy)
    try:
        delays = has_netem()
    except KernelLinkError as error:
        return Finding(name="tc", state="warning", found=str(error), remedy=USER_SPACE)
    if not delays:
        remedy = "let the transport add the latency (it does by itself), or load sch_netem"
        return Finding(name="tc", state="warning", found="tc is there, netem not in this kernel", remedy=remedy)
    return Finding(name="tc", state="ok", found="tc and netem are there")


def gpu(config: RunConfig | None) -> Finding:
    """torch is imported here: it takes seconds."""
    import torch

    from ..preparation import check_device

    wants = config is not None and config.compute.device.startswith("cuda")
    count = torch.cuda.device_count()
    try:
        if config is not None and (count or not wants):  # without any, what is missing is said below
            check_device(config)
    except ConfigError as error:
        found, _, remedy = str(error).partition("; ")
        return Finding(name="GPU", state="fault", found=found, remedy=remedy)
    if count:
        names = [torch.cuda.get_device_properties(index) for index in range(count)]
        found = ", ".join(f"{each.name} ({each.total_memory / GIB:.0f} GiB)" for each in names)
        return Finding(name="GPU", state="ok", found=found)
    if shutil.which("nvidia-smi"):
        built = "for the CPU alone" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        found = f"nvidia-smi is here, but torch {torch.__version__}, built {built}, sees no GPU"
        remedy = "install torch for CUDA, and a driver that fits it"
        return Finding(name="GPU", state="fault" if wants else "warning", found=found, remedy=remedy)
    if wants:
        assert config
        found = f"none, and compute.device is {config.compute.device}"
        return Finding(name="GPU", state="fault", found=found, remedy='set compute.device = "cpu", or --device cpu')
    return Finding(name="GPU", state="ok", found="none; computes on the CPU")


def disk(out: Path, config: RunConfig | None) -> Finding:
    """Free space where a node would write, and how long a synced write takes. Puts its file away again."""
    name = "disk"
    there = next((each for each in (out, *out.absolute().parents) if each.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".thinpipe-doctor-") as file:
            block = os.urandom(FSYNC_BYTES)
            began = time.monotonic()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.monotonic() - began
    except OSError as error:
        remedy = "choose another --out, or make room"
        return Finding(name=name, state="fault", found=f"cannot write in {there}: {error.strerror}", remedy=remedy)
    rate = FSYNC_BYTES / 1e6 / seconds
    found = f"{free / GIB:.1f} GiB free at {there.absolute()}, {rate:.0f} MB/s with fsync"
    needed = _checkpoint_bytes(config)
    if free < max(FREE_LEAST_BYTES, needed):
        what = f"; this run's checkpoints take about {needed / GIB:.1f} GiB" if needed else ""
        return Finding(name=name, state="fault", found=found + what, remedy="make room, or choose another --out")
    if seconds > FSYNC_SLOW_S:
        remedy = "checkpoints will be slow: a local disk, or a larger checkpoint.every"
        return Finding(name=name, state="warning", found=found, remedy=remedy)
    return Finding(name=name, state="ok", found=found)


def memory(config: RunConfig | None, stages_here: int) -> Finding:
    """stages_here: how many stages this machine would host."""
    available, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if config is None:
        if available < 2 * GIB:
            return Finding(name="memory", state="warning", found=found, remedy="a node of the tiny model takes 0.5 GiB")
        return Finding(name="memory", state="ok", found=found)
    # Each node holds torch (0.4 GiB), its state, two snapshots, gradients and activations, these taken as one state.
    needed = stages_here * (0.4 * GIB + 4 * _state_bytes(config))
    found += f"; {stages_here} stage{'s' if stages_here > 1 else ''} here would take about {needed / GIB:.1f}"
    if needed > available:
        remedy = "more stages on more machines, or a smaller model"
        return Finding(name="memory", state="fault" if needed > total else "warning", found=found, remedy=remedy)
    return Finding(name="memory", state="ok", found=found)


def cores(stages_here: int) -> Finding:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{here} for {stages_here} stage{'s' if stages_here > 1 else ''} here"
    if here < stages_here:
        remedy = "stages share cores: throughput is the machine's; bench --emulate measures links all the same"
        return Finding(name="cores", state="warning", found=found, remedy=remedy)
    return Finding(name="cores", state="ok", found=found)


def arithmetic(config: RunConfig | None) -> Finding:
    """Whether a CPU that is to multiply in bfloat16 has instructions for it: without them torch does it, ten times
    slower than in float32."""
    name = "arithmetic"
    dtypes = {config.compute.dtype, config.optim.msign_dtype} if config else set[str]()
    if config is None or config.compute.device != "cpu" or "bfloat16" not in dtypes:
        return Finding(name=name, state="ok", found="no bfloat16 is asked of this CPU")
    times = product_seconds("bfloat16") / product_seconds("float32")
    found = f"a product in bfloat16 takes {times:.1f} times as long as in float32"
    if times < BF16_SLOW:
        return Finding(name=name, state="ok", found=found)
    remedy = 'set compute.dtype and optim.msign_dtype to "float32": this CPU has no instructions for bfloat16'
    return Finding(name=name, state="warning", found=found, remedy=remedy)


def speed(config: RunConfig | None) -> Finding:
    """Takes a second or two. Without a run it is that of the default model."""
    from ..measuring.machine_speed import machine_speed
    from ..model import ModelError
    from ..preparation import check_device

    settings = config or RunConfig()
    name = "speed"
    try:
        check_device(settings)
    except ConfigError as error:
        return Finding(name=name, state="not asked", found=str(error).partition(";")[0], remedy="see GPU")
    architecture = _architecture(settings)
    try:
        tflops = machine_speed(settings, architecture) / 1e12
    except ModelError as error:
        found, _, remedy = str(error).rpartition("; ")
        return Finding(name=name, state="fault", found=found, remedy=remedy)
    model = settings.model.path or settings.model.preset
    where = f"{settings.compute.dtype} on {settings.compute.device}"
    found = f"{tflops:.3g} Tflop/s, for a layer and the head of {model}, {where}: for pipeline.speeds and node --speed"
    return Finding(name=name, state="ok", found=found)


def product_seconds(dtype: str) -> float:
    """Of two square matrices, the fastest of a few."""
    import torch

    a = torch.ones(PRODUCT_SIDE, PRODUCT_SIDE, dtype=getattr(torch, dtype))
    fastest = math.inf
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        torch.mm(a, a)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def _state_bytes(config: RunConfig | None) -> int:
    """Of one stage's weights and moments, about: parameters spread evenly."""
    if config is None:
        return 0
    import torch

    from ..model.slices import skeleton

    parameters = sum(each.numel() for each in skeleton(_architecture(config), torch.float32).parameters())
    return parameters * STATE_BYTES_PER_PARAMETER // config.pipeline.stages


def _architecture(config: RunConfig) -> PretrainedConfig:
    """The run's, without a look at its text. Raises ModelError."""
    from ..measuring.emulated_machine import VOCABULARY
    from ..model import resolve_model

    vocabulary = None if config.model.path else config.model.vocab_size or VOCABULARY
    return resolve_model(config.model, vocab_size=vocabulary, sequence_length=config.data.sequence_length)


def _checkpoint_bytes(config: RunConfig | None) -> int:
    """Of a stage's own and of the copies that it keeps for a neighbour."""
    if config is None or not config.checkpoint.every:
        return 0
    return _state_bytes(config) * (config.checkpoint.keep + 1 + 3)
