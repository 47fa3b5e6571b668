"""Events for TensorBoard, beside the records: the scalars that the Prometheus endpoint has, under the same names.

The file format is tensorboardX's (protobuf in checksummed records, synced to the disk), written by a thread of its own.
Why not its SummaryWriter: that hands each scalar to a queue of ten, which holds up the training when the disk is slow;
here all scalars of a step are one event, and a disk that falls behind by a thousand of them ends the events and not the
run. A step that is done again after a rollback replaces the one before: an event tells TensorBoard from which step
on its data is void.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from ...sim.reports.figures import StageFigures
from ...sim.reports.prometheus_metrics import PREFIX, families

# They say where a node is and not how training goes.
LEFT_OUT = {"state", "stages", "configured_steps", "completed_steps", "last_record_timestamp_seconds"}
LEFT_OUT |= {"fault_timestamp_seconds", "node_info"}
# Made by protobuf at run time, where no checker of types sees them.
Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
Summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
EVENTS_AHEAD = 1000  # of the disk
CLOSE_S = 10.0


class Events:
    """Writes the events of one stage into `directory`, which is made. Raises OSError."""

    def __init__(self, directory: Path, *, stage: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._figures = StageFigures(stage)
        # The library names a file by host and second; two processes of a stage may begin in the same one.
        self._file = EventsWriter(str(directory / "events"), f".{os.getpid()}")
        self._file.flush()
        self._error: OSError | None = None
        self._queue: queue.Queue[Any] = queue.Queue(EVENTS_AHEAD)
        self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
        self._thread.start()

    def take(self, record: dict[str, Any]) -> None:
        """A record was written. Raises OSError once the disk has failed, queue.Full when it is too slow."""
        if self._error:
            raise self._error
        self._figures.take(record)
        match record["event"]:
            case "step":
                self._write(record, summary=Summary(value=[*self._scalars(), *_codec(record)]))
            case "evaluation":
                value = Summary.Value(tag="heldout_loss", simple_value=record["val_loss"])
                self._write(record, summary=Summary(value=[value]))
            case "rollback":
                self._write(record, session_log=SessionLog(status=SessionLog.START))
            case _:
                pass

    def close(self) -> None:
        """Returns when all is written, or could not be within `CLOSE_S`. Raises OSError, queue.Full."""
        self._queue.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            while (event := self._queue.get()) is not None:
                self._file.write_event(event)
                if self._queue.empty():
                    self._file.flush()
            self._file.close()
        except OSError as error:
            self._error = error
            with suppress(OSError):
                self._file.close()

    def _write(self, record: dict[str, Any], **what: Any) -> None:
        """At the number of steps that are completed: of a rollback, what comes from that step on is void."""
        step = self._figures.completed + (record["event"] == "rollback")
        self._queue.put_nowait(Event(wall_time=record["time_s"], step=step, **what))

    def _scalars(self) -> list[Any]:
        found = []
        for family in families(self._figures):
            for sample in family.samples:
                name = sample.name.removeprefix(PREFIX).removesuffix("_total")
                if name not in LEFT_OUT and name != "heldout_loss":
                    labels = [value for label, value in sample.labels.items() if label != "stage"]
                    found.append(Summary.Value(tag="/".join([name, *labels]), simple_value=sample.value))
        return found


def _codec(record: dict[str, Any]) -> list[Any]:
    """What the codecs say of themselves, all of it."""
    figures = record.get("codec", {})
    return [
        Summary.Value(tag=f"codec/{name}", simple_value=value)
        for name, value in figures.items()
        if math.isfinite(value)
    ]
