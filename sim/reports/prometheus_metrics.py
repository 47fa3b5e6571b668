"""A stage's figures in Prometheus' text format, written and read: a node serves it, `thinpipe top --prometheus` reads
it.

Names follow Prometheus' own rules: `thinpipe_` first, the base unit last (bytes and seconds, so a link's rate is in
bytes a second), `_total` for what only grows in a process. Labels: `stage` everywhere; `boundary` as `0-1`, `direction`
`forward` or `backward`, `kind` of bytes as in the summary, `dictionary`, `end` (owner or replica), `code` of faults. In
a run of several lanes `lane` everywhere too, and `peer_lane` of what crosses to another one.

Writing and reading are in one module, because a name that only one of them knew would be a lost figure. What comes over
HTTP is not trusted: `read_figures` refuses by name what it cannot use, and its answer is no larger than
what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from .figures import STATES, DictionaryFigures, FaultFigures, LinkFigures, RoundFigures, StageFigures, Way
from .lanes import CONTEXT_LINK, LATERAL
from .quantities import any_number, lane_number, moment, quantity, stage_count, stage_number, whole

PREFIX = "thinpipe_"
BITS = 8

# name -> (attribute of StageFigures, help). Counters grow, gauges may fall.
COUNTERS = {
    "tokens": ("tokens", "Tokens trained on by this process, those of steps that were done again twice"),
    "train_seconds": ("train_s", "Seconds of all steps"),
    "compute_seconds": ("compute_s", "Seconds in which this stage computed"),
    "encode_seconds": ("encode_s", "Seconds in which it packed and unpacked, beside the compute"),
    "wait_seconds": ("wait_s", "Seconds in which it had nothing to compute with"),
}
LANE_COUNTERS = {
    "rounds": ("rounds", "Rounds of averaging that were used, those of steps that were done again twice"),
    "round_wait_seconds": ("round_wait_s", "Seconds in which this stage waited for contributions of other lanes"),
}
GAUGES = {
    "stages": ("stages", "Stages of the run"),
    "configured_steps": ("steps", "Steps that the run is to have"),
    "completed_steps": ("completed", "Steps that are done"),
    "committed_steps": ("committed", "Steps after which this stage's newest checkpoint on disk was taken"),
    "generation": ("generation", "Raised each time that the run goes back to a checkpoint"),
    "loss": ("loss", "Mean loss a token of the last step"),
    "heldout_loss": ("val_loss", "Mean loss a token of the last evaluation"),
    "gradient_norm": ("grad_norm", "Of this stage, or of all if optim.clip_norm says so, in the last step"),
    "tokens_per_second": ("tokens_per_s", "Over the last steps"),
    "compute_ratio": ("compute_share", "Share of the last steps in which this stage computed"),
    "encode_ratio": ("encode_share", "Share of the last steps in which it packed and unpacked"),
    "wait_ratio": ("wait_share", "Share of the last steps in which it waited"),
    "rss_bytes": ("rss_bytes", "Resident memory at the last step"),
    "dense_bytes": ("dense_bytes", "What an uncompressed bf16 pipeline would have sent from here"),
    "last_record_timestamp_seconds": ("last_record_s", "When this node last wrote a record"),
}
LINK_GAUGES = {  # in bits in the records, in bytes here
    "link_configured_bytes_per_second": ("configured_bits_per_s", "Cap of the link"),
    "link_start_bytes_per_second": ("at_start_bits_per_s", "What the link carried at the start, of filler alone"),
    "link_measured_bytes_per_second": ("measured_bits_per_s", "What left while the queue was not empty"),
    "link_used_bytes_per_second": ("used_bits_per_s", "What training sent over the last steps"),
}
KINDS = {  # of attributes; the others are quantities
    "stages": stage_count,
    "last_record_s": moment,
    **dict.fromkeys(("steps", "completed", "committed", "generation", "tokens", "rss_bytes", "dense_bytes"), whole),
    "rounds": whole,
    **dict.fromkeys(("loss", "val_loss", "grad_norm"), any_number),
}
VERSION = ("generation", "step", "microbatch", "number")
SAMPLES_MAX = 100_000


class MetricsFormatError(ValueError):
    """The text is not what a node of thinpipe serves."""


def families(figures: StageFigures) -> Iterator[Metric]:
    """All of it, as prometheus_client's metrics."""
    if figures.lanes == 1:
        yield from _of_stage(figures)
        return
    for family in (*_of_stage(figures), *_of_lane(figures)):
        lane = {"lane": str(figures.lane)}
        family.samples = [sample._replace(labels={**lane, **sample.labels}) for sample in family.samples]
        yield family


def _of_stage(figures: StageFigures) -> Iterator[Metric]:
    stage = str(figures.stage)
    info = {"run": figures.run, "host": figures.host, "process": str(figures.process or "")}
    yield InfoMetricFamily(f"{PREFIX}node", "Which process this is", {"stage": stage, **info})
    state = GaugeMetricFamily(f"{PREFIX}state", "1 for the state that the node is in", labels=["stage", "state"])
    for each in STATES:
        state.add_metric([stage, each], float(figures.state == each))
    yield state
    for name, (attribute, words) in COUNTERS.items():
        yield _filled(CounterMetricFamily(PREFIX + name, words, labels=["stage"]), [stage], getattr(figures, attribute))
    for name, (attribute, words) in GAUGES.items():
        yield _filled(GaugeMetricFamily(PREFIX + name, words, labels=["stage"]), [stage], getattr(figures, attribute))
    words = "Dense bf16 bytes over all framed bytes that training sent from here"
    yield _filled(GaugeMetricFamily(f"{PREFIX}compression_ratio", words, labels=["stage"]), [stage], figures.ratio)
    yield from _of_links(figures)
    yield from _of_dictionaries(figures)
    faults = CounterMetricFamily(f"{PREFIX}faults", "Faults that were recorded", labels=["stage", "code"])
    last = GaugeMetricFamily(f"{PREFIX}fault_timestamp_seconds", "When the last one was", labels=["stage", "code"])
    times = {fault.code: fault.time_s for fault in figures.faults}
    for code, count in figures.faults_by_code.items():
        faults.add_metric([stage, code], count)
        _filled(last, [stage, code], times.get(code))
    yield faults
    yield last


def _of_lane(figures: StageFigures) -> Iterator[Metric]:
    """What there is only beside other lanes."""
    stage = str(figures.stage)
    yield _filled(GaugeMetricFamily(f"{PREFIX}lanes", "Lanes of the run", labels=["stage"]), [stage], figures.lanes)
    for name, (attribute, words) in LANE_COUNTERS.items():
        yield _filled(CounterMetricFamily(PREFIX + name, words, labels=["stage"]), [stage], getattr(figures, attribute))
    newest = figures.round
    words = "Number of the newest round that was used, from 0"
    yield _filled(GaugeMetricFamily(f"{PREFIX}round", words, labels=["stage"]), [stage], newest and newest.number)
    words = "Lanes that took part in it"
    family = GaugeMetricFamily(f"{PREFIX}round_members", words, labels=["stage"])
    yield _filled(family, [stage], newest and newest.members)
    labels = ["stage", "peer_lane"]
    for between, what in ((LATERAL, "for averaging"), (CONTEXT_LINK, "for keys and values")):
        words = f"Framed bytes sent to another lane {what}, by kind"
        sent = CounterMetricFamily(f"{PREFIX}{between}_sent_bytes", words, labels=[*labels, "kind"])
        words = f"Framed bytes from another lane {what}"
        came = CounterMetricFamily(f"{PREFIX}{between}_received_bytes", words, labels=labels)
        for (peer, direction), link in figures.links.items():
            if direction == between:
                for kind, count in link.sent_bytes.items():
                    sent.add_metric([stage, str(peer), kind], count)
                came.add_metric([stage, str(peer)], link.received_bytes)
        yield from (sent, came)


def _of_links(figures: StageFigures) -> Iterator[Metric]:
    labels = ["stage", "boundary", "direction"]
    boundaries = {way: link for way, link in figures.links.items() if way[1] not in (LATERAL, CONTEXT_LINK)}
    for name, (attribute, words) in LINK_GAUGES.items():
        rates = GaugeMetricFamily(PREFIX + name, words, labels=labels)
        for way, link in boundaries.items():
            rate = getattr(link, attribute)
            _filled(rates, _labels(figures, way), None if rate is None else rate / BITS)
        yield rates
    trips = GaugeMetricFamily(f"{PREFIX}link_round_trip_seconds", "Of the greetings at the start", labels=labels)
    sent = CounterMetricFamily(f"{PREFIX}sent_bytes", "Framed bytes sent, by kind", labels=[*labels, "kind"])
    came = CounterMetricFamily(f"{PREFIX}received_bytes", "Framed bytes received", labels=labels)
    for (boundary, direction), link in boundaries.items():
        names = _labels(figures, (boundary, direction))
        _filled(trips, names, link.round_trip_s)
        for kind, count in link.sent_bytes.items():
            sent.add_metric([*names, kind], count)
        other = "forward" if direction == "backward" else "backward"
        came.add_metric(_labels(figures, (boundary, other)), link.received_bytes)
    yield from (trips, sent, came)


def _of_dictionaries(figures: StageFigures) -> Iterator[Metric]:
    labels = ["stage", "boundary", "dictionary", "end"]
    words = "Version of the learned table at this end: the change that was made, or came, last"
    versions = [GaugeMetricFamily(f"{PREFIX}dictionary_{part}", words, labels=labels) for part in VERSION]
    words = "How far what is in use stands from what was learned, relative to it"
    stale = GaugeMetricFamily(f"{PREFIX}dictionary_staleness_ratio", words, labels=labels)
    for each in figures.dictionaries:
        names = [str(figures.stage), f"{each.boundary}-{each.boundary + 1}", each.dictionary, each.end]
        for family, part in zip(versions, each.version or (None,) * len(VERSION), strict=True):
            _filled(family, names, part)
        _filled(stale, names, each.staleness)
    yield from (*versions, stale)


def _labels(figures: StageFigures, way: Way) -> list[str]:
    boundary, direction = way
    return [str(figures.stage), f"{boundary}-{boundary + 1}", direction]


def _filled(family: Any, labels: list[str], value: float | None) -> Metric:
    if value is not None:
        family.add_metric(labels, value)
    return family


def read_figures(text: str) -> list[StageFigures]:
    """The stages of which this speaks, by lane and stage; what a fault's reason was is not told this way.

    Raises MetricsFormatError for what no node serves.
    """
    reader = _Reader()
    try:
        for number, sample in enumerate(
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ):
            if number > SAMPLES_MAX:
                raise MetricsFormatError(f"more than {SAMPLES_MAX} figures")
            if sample.name.startswith(PREFIX):
                reader.take(sample.name.removeprefix(PREFIX), sample.labels, float(sample.value))
    except MetricsFormatError:
        raise
    except Exception as error:  # whatever a parser of text makes of text that is none
        raise MetricsFormatError(f"not Prometheus' text, or not thinpipe's: {error!r}"[:200]) from None
    if not reader.nodes:
        raise MetricsFormatError("no figures of thinpipe in it")
    return [reader.done(node) for node in sorted(reader.nodes)]


Node = tuple[int, int]  # lane, stage


class _Reader:
    """Puts samples together again."""

    def __init__(self) -> None:
        self.nodes: dict[Node, StageFigures] = {}
        self._fault_times: dict[tuple[Node, str], float] = {}
        self._versions: dict[tuple[Node, int, str, str], dict[str, int]] = {}
        self._stale: dict[tuple[Node, int, str, str], float] = {}

    def take(self, name: str, labels: dict[str, str], value: float) -> None:
        node = lane_number(int(labels.get("lane", 0))), stage_number(int(labels["stage"]))
        figures = self.nodes.setdefault(node, StageFigures(node[1], lane=node[0]))
        plain = name.removesuffix("_total")
        if name == "node_info":
            figures.run, figures.host = labels["run"], labels["host"]
            figures.process = int(labels["process"]) if labels["process"] else None
        elif name == "state" and value == 1 and labels["state"] in STATES:
            figures.state = labels["state"]
        elif name == "lanes":
            figures.lanes = lane_number(value - 1) + 1
        elif table := COUNTERS.get(plain) or LANE_COUNTERS.get(plain) or GAUGES.get(name):
            attribute, _ = table
            setattr(figures, attribute, KINDS.get(attribute, quantity)(value))
        elif name in LINK_GAUGES:
            self._link(figures, labels, **{LINK_GAUGES[name][0]: quantity(value) * BITS})
        elif name == "link_round_trip_seconds":
            self._link(figures, labels, round_trip_s=quantity(value))
        elif name == "received_bytes_total":
            other = "forward" if labels["direction"] == "backward" else "backward"
            self._link(figures, {**labels, "direction": other}, received_bytes=whole(value))
        elif name == "sent_bytes_total":
            boundary, direction = _boundary(labels), labels["direction"]
            before = figures.links.get((boundary, direction), LinkFigures()).sent_bytes
            self._link(figures, labels, sent_bytes={**before, labels["kind"]: whole(value)})
        elif name.startswith((f"{LATERAL}_", f"{CONTEXT_LINK}_")):
            self._between_lanes(figures, name, labels, whole(value))
        elif name in ("round", "round_members"):
            newest = figures.round or RoundFigures(number=0, fragment=0, members=0, norm=0.0)
            figures.round = replace(newest, **{"number" if name == "round" else "members": whole(value)})
        elif name == "faults_total":
            figures.faults_by_code[labels["code"]] = whole(value)
        elif name == "fault_timestamp_seconds":
            self._fault_times[node, labels["code"]] = moment(value)
        elif name.startswith("dictionary_"):
            key = (node, _boundary(labels), labels["dictionary"], labels["end"])
            if name == "dictionary_staleness_ratio":
                self._stale[key] = any_number(value)
            else:
                self._versions.setdefault(key, {})[name.removeprefix("dictionary_")] = whole(value)

    def _link(self, figures: StageFigures, labels: dict[str, str], **values: Any) -> None:
        way = (_boundary(labels), labels["direction"])
        figures.links[way] = replace(figures.links.get(way, LinkFigures()), **values)

    def _between_lanes(self, figures: StageFigures, name: str, labels: dict[str, str], count: int) -> None:
        kind, _, what = name.partition("_")
        way = (lane_number(int(labels["peer_lane"])), kind)
        before = figures.links.get(way, LinkFigures())
        if what == "sent_bytes_total":
            figures.links[way] = replace(before, sent_bytes={**before.sent_bytes, labels["kind"]: count})
        elif what == "received_bytes_total":
            figures.links[way] = replace(before, received_bytes=count)

    def done(self, node: Node) -> StageFigures:
        figures = self.nodes[node]
        times = sorted((time_s, code) for (of, code), time_s in self._fault_times.items() if of == node)
        for time_s, code in times:
            count = figures.faults_by_code[code]
            figures.faults.append(FaultFigures(time_s=time_s, code=code, reason=f"{count} of this kind, the last then"))
        for key in sorted(self._versions.keys() | self._stale.keys()):
            of, boundary, dictionary, end = key
            parts = self._versions.get(key, {})
            version = tuple(parts.get(part, 0) for part in VERSION) if parts else None
            if of == node:
                figures.dictionaries.append(
                    DictionaryFigures(
                        boundary=boundary,
                        dictionary=dictionary,
                        end=end,
                        version=version,  # pyright: ignore[reportArgumentType] (as long as VERSION)
                        staleness=self._stale.get(key),
                    )
                )
        return figures


def _boundary(labels: dict[str, str]) -> int:
    return stage_number(int(labels["boundary"].partition("-")[0]))
