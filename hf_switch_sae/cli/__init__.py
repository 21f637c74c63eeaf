"""The command line: one file a command, each a thin call of one public function.

Exit code 0: done. 1: an error of this package, or of files, disk and network, printed without a
traceback. 2: wrong use.
"""

from __future__ import annotations

import sys

from transformers.utils import logging

from hf_switch_sae.cli.app import app
from hf_switch_sae.errors import SwitchSAEError


def main() -> None:
    """Run a command; the console script `hf-switch-sae`."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        app()
    except (SwitchSAEError, OSError) as err:
        print(f"hf-switch-sae: {err}", file=sys.stderr)
        sys.exit(1)
