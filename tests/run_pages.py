"""Runs the Python blocks of Markdown pages: in order, in one namespace for each page.

    python tests/run_pages.py README.md docs/steering.md

A process of its own, so that pages see neither the tests' settings nor their warnings. The demo's
language model takes long to load, so all pages share it. A block stands at its own line of its
page, so that a traceback points there.
"""

from __future__ import annotations

import functools
import re
import sys
import time
import traceback
from pathlib import Path

import torch

from hf_switch_sae import demo

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = {"__name__": "__main__"}
    for match in BLOCK.finditer(text):
        above = "\n" * text[: match.start(1)].count("\n")
        exec(compile(above + match[1], str(page), "exec"), names)


def main(pages: list[str]) -> int:
    torch.set_num_threads(1)
    demo.load_demo_lm = functools.cache(demo.load_demo_lm)  # as each page loads it
    failed = []
    for page in pages:
        start = time.perf_counter()
        try:
            run(Path(page))
        except Exception:
            traceback.print_exc()
            failed.append(page)
        print(f"{page}: {time.perf_counter() - start:.1f} s", flush=True)
    if failed:
        print(f"failed: {' '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
