"""How a comparison of runs ends where it cannot go on: one line, and what has ended is kept."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from thinpipe.node.config import ConfigError
from thinpipe.node.run_directory import LocalRunError


@contextmanager
def one_line_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the process: with 2 for settings that cannot be, with a failed run's own code, with 130 for Ctrl-C."""
    try:
        yield
    except ConfigError as error:
        parser.error(str(error))
    except LocalRunError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        print(f"{str(error) or 'interrupted'}; no run goes on, those that have ended are kept", file=sys.stderr)
        sys.exit(130)
