"""Sending a run's configuration to other machines: what is sent, and what the receiver accepts.

The whole tree is sent as TOML, without paths on one machine and without settings of who may watch it. A configuration
is accepted only if it has the fingerprint (`RunConfig.digest`) that came with it, and agrees with the file that the
user gives, if any. Settings that are no part of the fingerprint (data source, link, device, checkpoints) are each
machine's own and may be overridden; those that are may not, since the neighbours would refuse a node that computes
something else.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...protocol.errors import LocalProtocolError
from ...protocol.header import printable
from ...protocol.node_record import RunRecord, encode_run
from ...protocol.schedule import schedule_title
from ..config import ConfigError, RunConfig
from ..config_file import dump_config, merge, parse_config, read_toml
from ..schedule_file import names_a_file

# What is written to, and who may look on: no stranger decides that.
OWN_PLACES = {"data.cache", "checkpoint.directory", "watch.prometheus", "watch.tensorboard"}
LOCAL = "data.source, data.tokenizer, data.cache, model.path, compute.device, link.*, checkpoint.*, watch.*"


def shareable(config: RunConfig) -> RunRecord:
    """The part of it that is sent to others. Raises ConfigError for what none of them would accept."""
    tree = _without_places(tomllib.loads(dump_config(config)))
    record = RunRecord(run=config.run.name, configuration=config.digest(), toml=dump_config(parse_config(tree)))
    try:
        encode_run(record)
    except LocalProtocolError as error:
        raise ConfigError(f"this configuration cannot be sent to other nodes: {error.reason}") from None
    return record


def verified(record: RunRecord, source: str) -> RunConfig:
    """The configuration that `source` sent. Raises ConfigError unless it is what its fingerprint says."""
    try:
        tree = tomllib.loads(record.toml)
    except (ValueError, RecursionError):  # among others for a number of thousands of digits
        raise ConfigError(f"the configuration from {source} is not TOML; update thinpipe there or here") from None
    pipeline = tree.get("pipeline")
    spec = pipeline.get("schedule") if isinstance(pipeline, dict) else None
    if isinstance(spec, str) and names_a_file(spec):  # what others send has the orders themselves
        raise ConfigError(
            f"the configuration from {source} names a file of this machine, {printable(spec)}: not accepted"
        )
    try:
        config = parse_config(_without_places(tree))
    except ConfigError as error:
        raise ConfigError(f"the configuration from {source}: {printable(str(error))}") from None
    if config.digest() != record.configuration or config.run.name != record.run:
        raise ConfigError(
            f"{source} announces run '{record.run}' with fingerprint {short(record.configuration)}, but the "
            f"configuration that came with it is of run '{config.run.name}' and has {short(config.digest())}: another "
            "version of thinpipe, or not to be trusted"
        )
    if set(config.run.name) == {"."}:
        raise ConfigError(
            f"{source} announces a run named '{config.run.name}', which cannot be the name of a directory"
        )
    return config


def agreed(
    record: RunRecord | None, source: str, path: Path | None, overrides: Mapping[str, Any]
) -> tuple[RunConfig, RunRecord]:
    """This node's settings, and what it tells others: from what it was told by `source` (None: nobody knows of a run),
    from its own file, or from both if they agree. Raises ConfigError."""
    if path is None and record is None:
        raise ConfigError(
            f"no node at {source} knows of a run; give its --config run.toml to this node or to `thinpipe dht` there"
        )
    theirs = None if record is None else verified(record, source)
    if path is None:
        assert theirs
        tree = tomllib.loads(dump_config(theirs))
    else:
        tree = read_toml(path)
        mine = parse_config(tree)
        if theirs and mine.digest() != theirs.digest():
            raise ConfigError(
                f"{path} has fingerprint {short(mine.digest())}, the run '{theirs.run.name}' at {source} has "
                f"{short(theirs.digest())}: {differences(mine, theirs)}; give the run's own file, or omit --config"
            )
        record = record or shareable(mine)
    assert record
    config = parse_config(merge(tree, dict(overrides)))
    if config.digest() != record.configuration:
        names = ", ".join(name for name in overrides if _changes(tree, {name: overrides[name]}, record)) or "an option"
        raise ConfigError(
            f"{names} changes what the run computes: its fingerprint would be {short(config.digest())}, that of "
            f"the run is {short(record.configuration)}; only the settings of each machine may differ ({LOCAL})"
        )
    return config, record


def short(digest: str) -> str:
    """As much of a fingerprint as people compare."""
    return digest[:12]


def _changes(tree: dict[str, Any], overrides: dict[str, Any], record: RunRecord) -> bool:
    try:
        return parse_config(merge(tree, overrides)).digest() != record.configuration
    except ConfigError:
        return True  # not without the others


def _without_places(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        section: {key: value for key, value in table.items() if f"{section}.{key}" not in OWN_PLACES}
        if isinstance(table, dict)
        else table
        for section, table in tree.items()
    }


def differences(mine: RunConfig, theirs: RunConfig) -> str:
    """The first settings of the fingerprint that differ, both values."""
    shared = theirs.shared()
    found = [
        f"{section}.{key} is {_shown(key, value)} here and {_shown(key, shared[section][key])} there"
        for section, table in mine.shared().items()
        for key, value in table.items()
        if value != shared[section][key]
    ]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _shown(key: str, value: object) -> str:
    return repr(schedule_title(value) if key == "schedule" and isinstance(value, str) else value)
