"""The current figures of a stage, computed from its records one after the other.

Every view uses them: the Prometheus endpoint of a node folds the records as they are written, `thinpipe top` and
the bar of `thinpipe up` fold the same lines from the disk, and TensorBoard gets what is in it. So they cannot disagree,
and none of them comes near the compute thread. Memory is constant: of steps the last few are kept, of faults the last
hundred.

Each process counts from zero, so the last counts of one that was replaced are kept and added. After a rollback some
steps are done again: `tokens` counts them twice, because the work was done twice; the ratio counts them once, as the
summary does.

Records, and figures over HTTP, may come from a stranger, and every view makes rows and bars of them. So every reader
checks stages, times and quantities for plausible values (quantities.py).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from .cut_advice import PipelineCosts
from .lanes import CONTEXT_LINK, LATERAL, between_lanes, is_context, is_lateral, other_lane
from .quantities import any_number, lane_number, moment, quantity, stage_count, stage_number, whole
from .summary import CONTEXT, OUTSIDE_RATIO

RECENT_STEPS = 10  # over which rates and shares are taken
FAULTS_KEPT = 100
CODES_MAX = 64  # of faults that are told apart; a peer has a say in them
CHECKPOINT_FAULT = "checkpoint"
STATES = ("starting", "training", "halted", "ended", "stopped", "failed")
STALENESS = {"projector": "staleness", "activations": "activation_staleness", "gradients": "gradient_staleness"}

Way = tuple[int, str]  # boundary and direction; of a link to another lane that lane, and which kind of link it is


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """One direction of a boundary, or of a lateral link, of which this stage is the sender. None: not capped here, or
    not measured.

    at_start: filler alone. measured: while the queue was not empty. used: by training, over the last steps. received:
    what came the other way.
    """

    configured_bits_per_s: float | None = None
    at_start_bits_per_s: float | None = None
    measured_bits_per_s: float | None = None
    used_bits_per_s: float | None = None
    round_trip_s: float | None = None
    sent_bytes: dict[str, int] = field(default_factory=dict)
    received_bytes: int = 0

    @property
    def share(self) -> float | None:
        """Used over configured, or over what was measured where there is no cap."""
        most = self.configured_bits_per_s or self.measured_bits_per_s or self.at_start_bits_per_s
        return self.used_bits_per_s / most if most and self.used_bits_per_s is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DictionaryFigures:
    """One end of a learned table. version: (generation, step, microbatch, number). staleness: master less shipped,
    relative
    to the master; the owner alone knows it."""

    boundary: int
    dictionary: str
    end: str
    version: tuple[int, int, int, int] | None = None
    staleness: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultFigures:
    time_s: float
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFigures:
    """The last round in which lanes averaged at this stage. members: lanes that gave something. norm: of the mean."""

    number: int
    fragment: int
    members: int
    norm: float


@dataclass(frozen=True, slots=True)
class _Step:
    seconds: float
    tokens: int
    spent: dict[str, float]
    used_bits: dict[Way, float]
    first: bool  # of its process: it warms up


@dataclass(slots=True)
class StageFigures:
    """None: not known (yet). *_s: seconds since the process began. *_share: of the time of the last steps."""

    stage: int
    lane: int = 0
    lanes: int = 1
    run: str = ""
    stages: int | None = None
    steps: int | None = None
    host: str = ""
    process: int | None = None
    lives: int = 0  # processes that have written these records, one after the other
    restored: int | None = None  # steps after which the present one went on first
    state: str = "starting"
    completed: int = 0
    loss: float | None = None
    val_loss: float | None = None
    grad_norm: float | None = None
    generation: int = 0
    committed: int | None = None
    tokens: int = 0
    tokens_per_s: float | None = None
    train_s: float = 0.0
    compute_s: float = 0.0
    encode_s: float = 0.0
    wait_s: float = 0.0
    compute_share: float | None = None
    encode_share: float | None = None
    wait_share: float | None = None
    rss_bytes: int | None = None
    dense_bytes: int = 0
    dense_tokens: int = 0  # of the steps that are in dense_bytes
    last_record_s: float | None = None
    costs: PipelineCosts | None = None  # of the whole run; stage 0 knows them
    links: dict[Way, LinkFigures] = field(default_factory=dict)
    dictionaries: list[DictionaryFigures] = field(default_factory=list)
    round: RoundFigures | None = None
    rounds: int = 0  # used by this process; those of steps that were done again twice
    round_wait_s: float = 0.0  # for contributions of other lanes
    faults: deque[FaultFigures] = field(default_factory=lambda: deque(maxlen=FAULTS_KEPT))
    faults_by_code: Counter[str] = field(default_factory=Counter)
    unsaved: str = ""  # why the newest checkpoint could not be written, or was damaged; "" once another is there
    _recent: deque[_Step] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _first_step: int | None = None  # the earliest whose bytes are in the counts
    _warm: bool = False  # the present process has done a step
    _earlier: dict[Way, LinkFigures] = field(default_factory=dict)  # counted by processes before this one

    @property
    def moved_bytes(self) -> int:
        """Sent in training, as the ratio has it."""
        return sum(
            count
            for (_, direction), link in self.links.items()
            for kind, count in link.sent_bytes.items()
            if direction not in (LATERAL, CONTEXT_LINK) and kind not in OUTSIDE_RATIO
        )

    @property
    def averaging_bytes(self) -> int:
        """Sent to other lanes, all of it."""
        lateral = [link for (_, direction), link in self.links.items() if direction == LATERAL]
        return sum(count for link in lateral for count in link.sent_bytes.values())

    @property
    def context_bytes(self) -> int:
        """Sent to other lanes in training for their keys and values, all of it."""
        links = [link for (_, direction), link in self.links.items() if direction == CONTEXT_LINK]
        rows = [(kind, count) for link in links for kind, count in link.sent_bytes.items()]
        return sum(count for kind, count in rows if kind in CONTEXT or kind not in OUTSIDE_RATIO)

    @property
    def ratio(self) -> float | None:
        """Of what this stage sends: dense bf16 bytes / all framed bytes."""
        return self.dense_bytes / self.moved_bytes if self.dense_bytes and self.moved_bytes else None

    @property
    def recent_work_s(self) -> list[float]:
        """How long it computed in each of the last steps, codec work included; of no step that warms up."""
        return [each.spent["compute"] + each.spent["codec"] for each in self._recent if not each.first]

    def take(self, record: dict[str, Any]) -> None:
        """The next record. Raises TypeError, KeyError or ValueError for one that is not as a node writes it; of what it
        says nothing is then taken."""
        time_s = moment(record["time_s"])
        match record["event"]:
            case "start":
                self._start(record)
            case "ready":
                self._ready(record)
            case "costs":
                self.costs = PipelineCosts.of(record)
            case "step":
                self._step(record)
            case "evaluation":
                self.val_loss = any_number(record["val_loss"])
            case "checkpoint":
                self.committed, self.unsaved = whole(record["completed"]), ""
            case "view_change":
                self.state = "halted"
            case "rollback":
                self._rollback(record)
            case "round":
                self._round(record)
            case "fault":
                self._fault(time_s, str(record["code"]), str(record["reason"]))
            case "end":
                self.completed, self.state = whole(record["steps"]), "ended"
            case "exit":
                code = whole(record["exit_code"])
                self.state = {0: "ended", 130: "stopped"}.get(code, "failed")
            case _:
                pass
        self.last_record_s = time_s

    def _start(self, record: dict[str, Any]) -> None:
        known = {
            "run": str(record.get("run", "")),
            "host": str(record.get("host", "")),
            "stages": _maybe(stage_count, record.get("stages")),
            "steps": _maybe(whole, record.get("steps")),
            "process": _maybe(whole, record.get("process")),
            "lane": lane_number(record.get("lane", self.lane)),
            "lanes": lane_number(record.get("lanes", self.lanes) - 1) + 1,
        }
        for name, value in known.items():
            setattr(self, name, value)
        self.state, self.restored, self._warm = "starting", None, False
        self.lives += 1
        self._earlier = dict(self.links)
        self._recent.clear()

    def _ready(self, record: dict[str, Any]) -> None:
        found: dict[Way, LinkFigures] = {}
        for check in record["link_check"]:
            way = _way(check)
            found[way] = replace(
                self.links.get(way, LinkFigures()),
                configured_bits_per_s=_maybe(quantity, check["configured_bits_per_s"]),
                at_start_bits_per_s=_maybe(quantity, check["measured_bits_per_s"]),
                round_trip_s=_maybe(quantity, check["round_trip_s"]),
            )
        self.links.update(found)
        self.state = "training"

    def _step(self, record: dict[str, Any]) -> None:
        step, tokens, seconds = whole(record["step"]), whole(record["tokens"]), quantity(record["seconds"])
        spent = {name: quantity(record[f"{name}_s"]) for name in ("compute", "codec", "wait")}
        links = self._links(record)
        says = {_way(link): link for link in record.get("links", [])}
        used = {way: quantity(link["used_bits_per_s"]) * seconds for way, link in says.items()}
        dictionaries = [_dictionary(said, record.get("codec", {})) for said in record.get("dictionaries", [])]
        figures = {
            "loss": any_number(record["loss"]),
            "grad_norm": _maybe(any_number, record.get("grad_norm")),
            "rss_bytes": _maybe(whole, record.get("rss_bytes")),
            "generation": whole(record.get("generation", self.generation)),
        }
        dense_bytes = whole(record.get("dense_bytes", 0))
        # From here on nothing is refused.
        for name, value in figures.items():
            setattr(self, name, value)
        self.state, self.completed, self.dictionaries = "training", step + 1, dictionaries
        self.tokens += tokens
        self.train_s += seconds
        self.compute_s += spent["compute"]
        self.encode_s += spent["codec"]
        self.wait_s += spent["wait"]
        self._first_step = step if self._first_step is None else min(step, self._first_step)
        counted = self.completed - self._first_step
        self.dense_bytes, self.dense_tokens = dense_bytes * counted, tokens * counted
        self._recent.append(_Step(seconds, tokens, spent, used, not self._warm))
        self._warm = True
        whole_s = sum(each.seconds for each in self._recent)
        if whole_s > 0:
            self.tokens_per_s = sum(each.tokens for each in self._recent) / whole_s
            self.compute_share, self.encode_share, self.wait_share = (
                sum(each.spent[name] for each in self._recent) / whole_s for name in ("compute", "codec", "wait")
            )
        for way, link in links.items():
            bits = sum(each.used_bits.get(way, 0.0) for each in self._recent)
            links[way] = replace(link, used_bits_per_s=bits / whole_s if way in says and whole_s > 0 else None)
        self.links.update(links)

    def _links(self, record: dict[str, Any]) -> dict[Way, LinkFigures]:
        """What this record says of each, on top of what is known."""
        found: dict[Way, LinkFigures] = {}
        for name, rows in record["sent_bytes"].items():
            way = self._named(name)
            sent = Counter(self._earlier.get(way, LinkFigures()).sent_bytes)
            sent.update({str(kind): whole(count) for kind, count in rows.items()})
            found[way] = replace(self.links.get(way, LinkFigures()), sent_bytes=dict(sent))
        for link in record.get("links", []):
            way = _way(link)
            found[way] = replace(
                found.get(way, self.links.get(way, LinkFigures())),
                configured_bits_per_s=_maybe(quantity, link["configured_bits_per_s"]),
                measured_bits_per_s=_maybe(quantity, link["measured_bits_per_s"]),
                received_bytes=self._earlier.get(way, LinkFigures()).received_bytes + whole(link["received_bytes"]),
            )
        return found

    def _named(self, name: str) -> Way:
        """Of `boundary 0-1`, `lateral 0: lane 0-1` or `context 0: lane 0-1`. Raises ValueError for what is none."""
        if is_lateral(name):
            return other_lane(name, self.lane), LATERAL
        if is_context(name):
            return other_lane(name, self.lane), CONTEXT_LINK
        boundary = stage_number(int(name.removeprefix("boundary ").partition("-")[0]))
        return boundary, "forward" if boundary == self.stage else "backward"

    def _round(self, record: dict[str, Any]) -> None:
        found = RoundFigures(
            number=whole(record["number"]),
            fragment=whole(record["fragment"]),
            members=len({lane_number(lane) for lane in record["members"]}),
            norm=any_number(record["norm"]),
        )
        waited_s = quantity(record["waited_s"])
        self.round, self.rounds, self.round_wait_s = found, self.rounds + 1, self.round_wait_s + waited_s

    def _rollback(self, record: dict[str, Any]) -> None:
        generation, completed = whole(record["generation"]), whole(record["completed"])
        self.generation, self.completed, self.state = generation, completed, "starting"
        self.restored = completed if self.restored is None else self.restored
        if record["source"] == "disk":
            self.committed = completed
        elif self.committed is not None:
            self.committed = min(self.committed, completed)  # what was written of later steps is not gone on from
        if self._first_step is not None:
            self._first_step = min(self._first_step, completed)
        self._recent.clear()

    def _fault(self, time_s: float, code: str, reason: str) -> None:
        counted = code if code in self.faults_by_code or len(self.faults_by_code) < CODES_MAX else "other"
        self.faults_by_code[counted] += 1
        self.faults.append(FaultFigures(time_s=time_s, code=code, reason=reason))
        if code == CHECKPOINT_FAULT:
            self.unsaved = reason


def together(heads: Iterable[StageFigures]) -> float:
    """Tokens/s of lanes, of a stage of each: they work beside each other, but in one process, where no node has
    started, one after the other."""
    of = [(head.tokens_per_s, head.process) for head in heads if head.tokens_per_s]
    if any(process is not None for _, process in of):
        return sum(rate for rate, _ in of)
    return len(of) / sum(1 / rate for rate, _ in of) if of else 0.0


def _dictionary(said: dict[str, Any], codec: dict[str, Any]) -> DictionaryFigures:
    name, end = str(said["dictionary"]), str(said["end"])
    version = None
    if (found := said["version"]) is not None:
        generation, step, microbatch, number = map(whole, found)
        version = (generation, step, microbatch, number)
    staleness = codec.get(STALENESS.get(name, "")) if end == "owner" else None
    return DictionaryFigures(
        boundary=stage_number(said["boundary"]),
        dictionary=name,
        end=end,
        version=version,
        staleness=_maybe(any_number, staleness),
    )


def _way(link: dict[str, Any]) -> Way:
    if (kind := between_lanes(link)) is not None:
        return lane_number(link["peer_lane"]), kind
    direction = str(link["direction"])
    if direction not in ("forward", "backward"):
        raise ValueError(direction)
    return stage_number(link["boundary"]), direction


def _maybe(kind: Any, value: Any) -> Any:
    return None if value is None else kind(value)
