"""The command line: a file for each command, which calls one public function.

Room   `options` has what several commands can be told, `loading` and `tables` what they load and
       print.
How    stdout is the result alone; everything else goes to stderr. Exit code 0: done. 1: an error of
       this package, or of files, disk and network, printed without a traceback. 2: wrong use.
"""

from __future__ import annotations

import sys

from transformers.utils import logging

from hf_switch_sae.cli.app import app
from hf_switch_sae.errors import SwitchSAEError


def main() -> None:
    """Run a command; the console script `hf-switch-sae`."""
    # the bars of loading weights would cut through what a command says
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        app()
    # what the user can mend; anything else is a fault of ours and keeps its traceback
    except (SwitchSAEError, OSError) as err:
        print(f"hf-switch-sae: {err}", file=sys.stderr)
        sys.exit(1)
