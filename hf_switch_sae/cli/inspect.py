"""`hf-switch-sae inspect`: what a release holds, without reading the weights."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hf_switch_sae.cli.options import Revision
from hf_switch_sae.formats.inspection import inspect as inspect_release


def inspect(
    name: Annotated[str, typer.Argument(help="Hub id or folder.")],
    subfolder: Annotated[str, typer.Option(help="Look into this folder only.")] = "",
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a release holds, without reading the weights.

    That is config, shapes, statistics and provenance of each SAE.
    """
    found = inspect_release(name, subfolder, revision=revision)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)
