"""What trains a stage, and what exports or evaluates it, imports nothing that it does not use; at each start these
seconds would be paid on every core."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from thinpipe.node.config_file import dump_config
from thinpipe.node.model.lean import scanned_once
from transformers.utils import import_utils

from .conftest import TinyConfig

HEAVY = ("torch._dynamo", "sympy", "torch.distributed.tensor", "scipy.optimize", "hivemind")


def test_a_step_with_all_that_is_learned_imports_no_compiler(tiny: TinyConfig, tmp_path: Path) -> None:
    codec = {"codec": "mapl:r=8,every=1", "forward": "rvq:groups=2,codes=16", "backward": "rvq:groups=2,codes=16"}
    learned = {"pipeline.stages": 2, "run.steps": 1, **{f"codec.{key}": value for key, value in codec.items()}}
    (tmp_path / "run.toml").write_text(dump_config(tiny(learned)))
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from thinpipe.node.config_file import load_config\n"
        "from thinpipe.node.export.portable_model import modeling\n"
        "from thinpipe.node.one_process import OneProcess\n"
        f"OneProcess(load_config(Path({str(tmp_path / 'run.toml')!r}))).train()\n"
        "import thinpipe.node.evaluating.chain, thinpipe.node.evaluating.subject\n"
        "modeling()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert done.stdout == "[]\n"


def test_what_models_define_is_read_once_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    models = Path(import_utils.__file__).parents[1] / "models"
    scan = import_utils.define_import_structure
    expected = scan.__wrapped__(str(models / "__init__.py"))  # without what it remembers
    monkeypatch.setattr(import_utils, "create_import_structure_from_path", lambda _: pytest.fail("read again"))
    found = scanned_once(scan, models)(str(models / "__init__.py"))
    assert found == expected
    assert sum(map(len, found.values())) > 1000
