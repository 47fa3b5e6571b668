"""The log of members on a disk, FILE beside the contributions of stage 0, and in words.

It says which lanes took part in which rounds and how lanes came back, which with the settings and the text is all that
a run came from: `node.one_process` does it again. It is written as a whole, under another name first, since it is
small; JSON, so that people and scripts can read it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...protocol.membership_log import Entry, MembershipLog, Stretch
from .contribution_store import ContributionError

FILE = "members.json"


def write_members(path: Path, log: MembershipLog, taken: tuple[int, int] | None = None) -> None:
    """Have the disk know of it. taken: from which lane, after how many steps, this one has taken up a state, if it has
    not come back with it yet. Raises ContributionError."""
    said: dict[str, Any] = {"decided": log.decided, "stretches": [_said(each) for each in log.stretches]}
    content = json.dumps(said | ({"taken": taken} if taken else {})) + "\n"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        where = f"{path}: {error.strerror}"
        raise ContributionError(f"who takes part in rounds cannot be written to {where}; make room there") from None


def read_members(path: Path, lanes: int) -> MembershipLog:
    """What an earlier process wrote; that of a run that begins, if none has. Raises ContributionError for a file that
    says something else."""
    try:
        said = json.loads(path.read_text())
        stretches = tuple(_stretch(each) for each in said["stretches"])
        members = {lane for each in stretches for lane in each.members}
        if not stretches or stretches[0].first or not members <= set(range(lanes)):
            raise ValueError("its lanes, or rounds, are not this run's")
        return MembershipLog(stretches, int(said["decided"]))
    except FileNotFoundError:
        return MembershipLog.begin(lanes)
    except OSError as error:
        raise ContributionError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ContributionError(f"{path} does not say who took part in which rounds ({error}); delete it") from None


def read_taken(path: Path, log: MembershipLog, lane: int) -> tuple[int, int] | None:
    """`taken` of that file, of lane `lane`, unless by `log` it has come back with that."""
    try:
        source, completed = map(int, json.loads(path.read_text())["taken"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    came = any((each.source, each.copied) == (source, completed) for each in log.entries_of(lane))
    return None if came else (source, completed)


def _said(stretch: Stretch) -> dict[str, Any]:
    entered = [asdict(each) for each in stretch.entered]
    return {"first": stretch.first, "members": list(stretch.members)} | ({"entered": entered} if entered else {})


def _stretch(said: dict[str, Any]) -> Stretch:
    entered = tuple(Entry(**each) for each in said.get("entered", []))
    return Stretch(first=int(said["first"]), members=tuple(map(int, said["members"])), entered=entered)


def in_words(log: MembershipLog, stretch: Stretch, lanes: int) -> str:
    """Who has left or come with that stretch, for people."""
    at = log.stretches.index(stretch)
    before = log.stretches[at - 1].members if at else tuple(range(lanes))
    left = [f"lane {lane} is left out" for lane in before if lane not in stretch.members]
    came = [
        f"lane {each.lane} is back: it followed the others from {each.copied} steps on and trains from {each.begins}"
        for each in stretch.entered
    ]
    members = ", ".join(map(str, stretch.members))
    return f"from round {stretch.first} on: {'; '.join(left + came) or 'another log counts'}; members: {members}"
