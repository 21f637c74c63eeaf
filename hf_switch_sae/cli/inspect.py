"""`hf-switch-sae inspect`: what is in a release, without reading the weights."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hf_switch_sae.formats.inspection import inspect as inspect_release


def inspect(
    name: Annotated[str, typer.Argument(help="Hub id or folder.")],
    subfolder: Annotated[str, typer.Option(help="Only what is in it.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show config, shapes, statistics and provenance, without reading the weights."""
    found = inspect_release(name, subfolder, revision=revision)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)
