"""A new run that begins from weights that are there: those of another run, or of a directory in Hugging Face's layout.

From a run, its newest checkpoint is put together (`node.checkpoints.assemble`) and written into the new run's own
directory as such a directory: config.json, model.safetensors (a plain decoder, as `thinpipe export --plain` has it),
tokenizer.json, and what its codec learned (`node.codec_start`). From there on it is any run that begins from a
pretrained model (`model.path`, `model.pretrained`): each node reads the tensors of its own layers, and whoever goes on
with the run needs nothing of the other one. Why not a checkpoint after 0 steps: those are one stage's, with an
optimizer's state, and a stage that is set back to step 0 is built from the settings.

Settings that nobody gives are those of the other run: the same training, on other data, say.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..compress.codec_interface import Codec
from ..compress.recommended_rates import recommended_for
from ..compress.registry import parse_codec
from .checkpoints.assemble import Assembled
from .checkpoints.kept_boundaries import kept_boundaries
from .checkpoints.plain_projections import model_of_run
from .codec_start import codebooks_kept, write_codec_start
from .config import ConfigError, RunConfig
from .config_file import load_config, merge, parse_config
from .data import DataError, Vocabulary, read_vocabulary
from .export.portable_model import ExportError, plain_model
from .preparation import check_codec, check_layers, resolve_architecture
from .run_corpus import vocabulary_of_run
from .run_directory import with_start
from .run_lanes import found_run
from .stage_costs import stage_layers

# Of a run, what is not the next one's.
OWN = {"run": {"extended", "origin", "origin_codec"}, "checkpoint": {"directory"}}
OWN |= {"model": {"preset", "path", "pretrained", "vocab_size", "layers", "width"}}
NO_WISH = {"model.pretrained", *(f"run.{name}" for name in OWN["run"])}


@dataclass(slots=True, kw_only=True)
class Origin:
    """config: of the new run; its paths are those of `source` until it is `placed`. found: the other run, None for a
    directory that is read where it is. tokenizer: that of the run, None where another one is given. lines: what one
    might not expect."""

    source: Path
    config: RunConfig
    found: Assembled | None = None
    tokenizer: Vocabulary | None = None
    lines: list[str] = field(default_factory=list)

    def place(self, directory: Path) -> RunConfig:
        """Write what the new run begins with into `directory`, new or empty; returns its settings, of which the codec
        and the cut are checked before the weights are written. Raises ConfigError for a disk that does not take it, and
        what `BAD_INPUT` names."""
        if self.found is None:
            return self.config
        try:
            directory.mkdir(parents=True, exist_ok=True)
            model = plain_model(self.found)
            model.config.save_pretrained(directory)
            if self.tokenizer:
                for name, content in self.tokenizer.files().items():
                    (directory / name).write_bytes(content)
            placed = self.placed(self.config, directory)
            architecture = resolve_architecture(placed)
            check_codec(placed, architecture)
            check_layers(placed, architecture)
            weights = {name: tensor.contiguous() for name, tensor in model.weights.items()}
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
            if _same_codec(self.found.config, self.config):
                digest = write_codec_start(self.found, self.config, directory)
                run = self.config.run.model_copy(update={"origin_codec": digest})
                self.config = self.config.model_copy(update={"run": run})
        except ExportError as error:
            raise ConfigError(f"{self.source}: {error}; no run can begin from it") from None
        except (OSError, SafetensorError) as error:
            cause = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
            raise ConfigError(f"cannot write {directory}: {cause}; choose another --out") from None
        return self.placed(self.config, directory)

    def placed(self, config: RunConfig, directory: Path) -> RunConfig:
        """`config` with what was written in `directory`."""
        if self.found is None:
            return config
        model = config.model.model_copy(update={"path": directory.resolve()})
        data = config.data
        if self.tokenizer:
            data = data.model_copy(update={"tokenizer": directory.resolve() / "tokenizer.json"})
        return config.model_copy(update={"model": model, "data": data})

    def boundary_lines(self) -> list[str]:
        """What becomes of the codec at each boundary. The settings have to be known to be good."""
        if self.found is None or self.config.pipeline.stages == 1:
            return []
        if not _same_codec(self.found.config, self.config):
            before, now = self.found.config.codec.codec, self.config.codec.codec
            return [f"codec {now} is another than that of {self.source}, {before}: it begins untrained"]
        old, new = (stage_layers(each, self.found.architecture) for each in (self.found.config, self.config))
        lines = kept_boundaries(old, new).lines() if self.config.run.origin_codec else []
        fits = codebooks_kept(self.found.config, self.config, self.found.architecture.hidden_size)
        return lines + [
            f"codebooks of {direction} begin untrained: their byte format is another than that of {self.source}"
            for direction, kept in fits.items()
            if not kept
        ]


def begin_from(source: Path, given: dict[str, Any]) -> Origin:
    """A new run from `source`, a run, a lane of one, or a model, with these settings (`section.key` -> value). Raises
    ConfigError for what is neither a run nor a model, and for settings of another model; CheckpointError for a run
    without whole checkpoints; DataError for a tokenizer that is not there."""
    # What a whole run.toml says of its own beginning is no wish.
    given = {name: value for name, value in given.items() if name not in NO_WISH}
    source, lane = found_run(source, None)
    if (source / "run.toml").is_file():
        run = with_start(load_config(source / "run.toml"), source)
        return _from_run(source, lane, run, _without_path(given, source, run.model.path))
    given = _without_path(given, source)
    if (source / "config.json").is_file():
        return _from_directory(source, given)
    raise ConfigError(
        f"there is neither a run.toml nor a config.json in {source}, so neither a run nor a model; give the --out of a "
        "run, or a directory in Hugging Face's layout"
    )


def _from_directory(source: Path, given: dict[str, Any]) -> Origin:
    if "model.preset" in given:
        raise ConfigError(f"model.preset = {given['model.preset']}, but --from brings a model of its own; omit one")
    if "auto_map" in _json(source / "config.json"):
        raise ConfigError(
            f"the model in {source} has code of its own, such as a codec's boundaries; give the run that it came from, "
            "or a directory of thinpipe export --plain"
        )
    lines, own = list[str](), source.resolve() / "tokenizer.json"
    if own.is_file():
        lines = _other_tokenizer(source, given, own)
        given = {"data.tokenizer": str(own), **given}
    first = {"model.path": str(source.resolve()), "model.pretrained": True, "run.origin": str(source)}
    return Origin(source=source, config=parse_config(merge({}, given | first)), lines=lines)


def _without_path(given: dict[str, Any], *own: Path | None) -> dict[str, Any]:
    """Without a model.path that is where the model comes from anyway. Raises ConfigError for another one."""
    if "model.path" not in given:
        return given
    wanted = Path(given["model.path"]).expanduser().resolve()
    if wanted not in [each.resolve() for each in own if each]:
        raise ConfigError(
            f"model.path = {given['model.path']}, but --from brings a model of its own; omit one of the two"
        )
    return {name: value for name, value in given.items() if name not in ("model.path", "model.preset")}


def _from_run(source: Path, lane: int | None, run: RunConfig, given: dict[str, Any]) -> Origin:
    report: list[str] = []
    taken = model_of_run(source, lane, config=run, report=report.append)
    found, place = taken.found, taken.place
    given = _without_shape(run, found, given)
    lines, tokenizer = report, None
    if "data.tokenizer" in given:
        with suppress(DataError):  # its text is gone, and so is what it was
            lines += _other_tokenizer(source, given, vocabulary_of_run(source, found).path)
    else:
        tokenizer = vocabulary_of_run(source, found)
        if not run.model.pretrained:  # from here on it would be taken for what the weights have always known
            tokenizer = tokenizer.bare()
    first = {
        "model.path": str(source.resolve()),
        "model.pretrained": True,
        "run.origin": f"{place} after {found.completed} steps",
    }
    if tokenizer:
        first["data.tokenizer"] = str(tokenizer.path)
    config = parse_config(merge(_inherited(run, given), given | first))
    return Origin(source=source, config=config, found=found, tokenizer=tokenizer, lines=lines)


def _inherited(run: RunConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the other run that hold where nothing else is given."""
    tree = run.model_dump(mode="json", exclude_none=True, exclude=OWN)
    if given.get("pipeline.stages", run.pipeline.stages) != run.pipeline.stages:
        for name in ("cut", "speeds"):
            del tree["pipeline"][name]
    if given.get("codec.codec", run.codec.codec) != run.codec.codec:  # its formats and rates were for another one
        tree["codec"] = {}
        for name in {*recommended_for(run.codec.codec), *recommended_for(str(given["codec.codec"]))}:
            tree["optim"].pop(name, None)
    return tree


def _without_shape(run: RunConfig, found: Assembled, given: dict[str, Any]) -> dict[str, Any]:
    """What of it does not say the shape of the model. Raises ConfigError where it says another one."""
    shape = {
        "model.width": found.architecture.hidden_size,
        "model.layers": found.architecture.num_hidden_layers,
        "model.vocab_size": found.architecture.vocab_size,
        "model.preset": run.model.preset if run.model.path is None else None,
    }
    for name, has in shape.items():
        if name in given and given[name] != has:
            brings = f"the model of the run has {has}" if has is not None else "--from brings a model of its own"
            raise ConfigError(f"{name} = {given[name]}, but {brings}; omit it")
    return {name: value for name, value in given.items() if name not in shape}


def _other_tokenizer(source: Path, given: dict[str, Any], own: Path) -> list[str]:
    """A warning, if one is given that is not the model's own."""
    other = Path(given.get("data.tokenizer", own))
    with suppress(DataError):  # whoever needs it says so
        if read_vocabulary(own).digest != read_vocabulary(other).digest:
            return [f"data.tokenizer = {other} is not the tokenizer of {source}: the same ids mean other text now"]
    return []


def _json(path: Path) -> dict[str, Any]:
    """Empty for what is none: whoever reads it all says so."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _same_codec(one: RunConfig, other: RunConfig) -> bool:
    """Whether the in-graph halves are the same method with the same options; the byte formats may differ."""
    codecs: list[Codec] = [parse_codec(each.codec.codec).codec for each in (one, other)]
    return type(codecs[0]) is type(codecs[1]) and vars(codecs[0]) == vars(codecs[1])
