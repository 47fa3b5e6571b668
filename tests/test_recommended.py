"""What a codec recommends to the optimizer, and who has the last word."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from thinpipe.compress.recommended_rates import OptimizerSetting
from thinpipe.compress.registry import codec_names, format_names, parse_codec
from thinpipe.node.config import RunConfig, recommended, recommended_line
from thinpipe.node.config_file import dump_config, load_config, merge, parse_config
from thinpipe.node.config_sections import CodecSection, OptimSection

PLAIN = OptimSection()
MAPL = parse_codec("mapl").codec.recommended
RATES = {"muon_lr": MAPL["muon_lr"], "adamw_lr": MAPL["adamw_lr"]}


def configured(**settings: Any) -> RunConfig:
    return parse_config(merge({}, {key.replace("__", "."): value for key, value in settings.items()}))


@pytest.mark.parametrize("name", codec_names())
def test_what_is_recommended_is_a_setting_of_the_optimizer(name: str) -> None:
    found = dict(parse_codec(name).codec.recommended)
    assert set(found) <= set(get_args(OptimizerSetting)) <= set(OptimSection.model_fields)
    assert OptimSection.model_validate(found)  # the values pass as a user's would


@pytest.mark.parametrize("name", ["identity:table=1", *format_names()])
def test_dense_training_keeps_the_ordinary_defaults(name: str) -> None:
    assert configured(codec__codec=name).optim == PLAIN
    assert recommended_line(configured(codec__codec=name)) is None


@pytest.mark.parametrize("spec", ["mapl", "mapl:r=16,anchors=factorized"])
def test_a_codec_has_its_own_rates(spec: str) -> None:
    config = configured(codec__codec=spec)
    assert config.optim == PLAIN.model_copy(update=RATES)
    assert recommended(config) == RATES
    assert recommended_line(config) == (
        f"optim.muon_lr=0.01, optim.adamw_lr=0.02: recommended for codec {spec}; set them to override"
    )
    assert RunConfig(codec=CodecSection(codec=spec)) == config


def test_the_user_has_the_last_word_setting_by_setting() -> None:
    one = configured(codec__codec="mapl", optim__muon_lr=PLAIN.muon_lr)  # the ordinary default, said
    assert (one.optim.muon_lr, one.optim.adamw_lr) == (PLAIN.muon_lr, RATES["adamw_lr"])
    assert recommended(one) == {"adamw_lr": RATES["adamw_lr"]}
    both = configured(codec__codec="mapl", optim__muon_lr=0.3, optim__adamw_lr=0.4)
    assert (both.optim.muon_lr, both.optim.adamw_lr) == (0.3, 0.4)
    assert recommended_line(both) is None
    assert OptimSection() == PLAIN  # the shared default was left alone


def test_run_toml_is_complete_and_means_the_same_wherever_it_is_read(tmp_path: Path) -> None:
    config = configured(codec__codec="mapl:r=16")
    path = tmp_path / "run.toml"
    path.write_text(dump_config(config))
    assert tomllib.loads(path.read_text())["optim"].items() >= RATES.items()
    again = load_config(path)
    assert again == config
    assert again.digest() == config.digest()
    assert recommended(again) == {}  # nothing is left to say
    said = configured(codec__codec="mapl:r=16", optim__muon_lr=RATES["muon_lr"], optim__adamw_lr=RATES["adamw_lr"])
    assert said.digest() == config.digest() != configured(codec__codec="mapl:r=16", optim__muon_lr=0.02).digest()


def test_another_codec_over_a_complete_file_keeps_what_stands_there(tmp_path: Path) -> None:
    """As with `up --config`: what a file says was said."""
    path = tmp_path / "run.toml"
    path.write_text(dump_config(configured(codec__codec="mapl")))
    assert load_config(path, {"codec.codec": "bf16"}).optim.muon_lr == RATES["muon_lr"]


def test_an_unknown_codec_is_refused_where_codecs_are_and_not_here() -> None:
    assert configured(codec__codec="bogus:x=1").optim == PLAIN


def test_reading_settings_needs_no_torch() -> None:
    """Keepers and bootstraps do, and stay for days."""
    code = "import sys; from thinpipe.node.config import RunConfig; print(RunConfig().optim, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
