"""`convert` and `push`: what makes no sense is refused by name, and nothing is silently ignored."""

import sys

import pytest
from helpers.foreign_layouts import LAYOUTS
from helpers.saes import make
from typer.testing import CliRunner

from hf_switch_sae import ConversionError, Recipe, Steer, SwitchSAE, cli, convert
from hf_switch_sae.cli.app import app

PLACE = "layers.1.resid_post"


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def ours(tmp_path):
    make("plain_topk", hookpoint=PLACE).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def recipe(tmp_path):
    Recipe("org/sae", (Steer(1, 0.5),)).save(tmp_path / "ships.json")
    return tmp_path / "ships.json"


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    for name in ("push_release", "push_recipe"):
        monkeypatch.setattr(sys.modules["hf_switch_sae.cli.push"], name, pushed.append)
    pushed.clear()


pushed: list = []


def test_a_recipe_goes_nowhere_without_a_repository(recipe):
    done = run("push", recipe)
    assert done.exit_code == 2
    assert "OWNER/REPO" in done.output
    assert not pushed


@pytest.mark.parametrize(
    "option", [["--private"], ["--branch", "b"], ["--message", "m"], ["--no-card"]]
)
def test_an_option_of_a_release_is_refused_with_a_recipe(recipe, option):
    done = run("push", recipe, "org/repo", *option)
    assert done.exit_code == 2
    assert option[0] in done.output
    assert not pushed


def test_what_is_not_there_is_not_pushed(tmp_path):
    done = run("push", tmp_path / "none")
    assert "there is no folder or file" in str(done.exception)
    assert not pushed


@pytest.mark.parametrize(
    "option", [["--format", "sparsify"], ["--lm", "org/lm"], ["--text", "a.txt"]]
)
def test_an_option_that_an_export_has_no_use_for_is_refused(ours, tmp_path, option):
    done = run("convert", ours, tmp_path / "out", "--to", "sparsify", *option)
    assert done.exit_code == 2
    assert option[0] in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--layer", "2"], ["--k", "2"], ["--input-scale", "2"]])
def test_what_our_own_config_tells_can_not_be_given_to_an_export(ours, tmp_path, option):
    done = run("convert", ours, tmp_path / "out", "--to", "sparsify", *option)
    assert done.exit_code == 2
    assert option[0] in done.output
    assert not (tmp_path / "out").exists()


def test_from_one_project_to_another_what_files_do_not_tell_is_given(tmp_path):
    folder = LAYOUTS["qwen_scope"](tmp_path)[0]
    done = run("convert", folder, tmp_path / "layers.2", "--to", "sparsify", "--layer", "2")
    assert done.exit_code == 0, done.output
    place = SwitchSAE.from_pretrained(tmp_path / "layers.2").config.hookpoint
    assert place == "layers.2.resid_post"


@pytest.mark.parametrize("option", [["--lm", "org/lm"], ["--text", "a.txt"]])
def test_model_and_text_go_together(tmp_path, option):
    folder = LAYOUTS["sparsify"](tmp_path)[0]
    done = run("convert", folder, tmp_path / "out", *option)
    assert done.exit_code == 2
    assert "--lm and --text" in done.output


def test_an_sae_of_ours_is_not_converted_to_itself(ours):
    with pytest.raises(ConversionError, match="from_pretrained loads it as it is"):
        convert(ours)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["push", "none.json", "org/repo"], "there is no folder or file none.json"),
        (["convert", "/none/sae", "out"], "there is no folder /none/sae"),
        (["convert", "/none/sae", "out", "--to", "sparsify"], "no SAE at /none/sae"),
        (["convert", "{sae}", "out", "--lm", "x", "--text", "none.txt"], "none.txt can't be read"),
        (["convert", "{sae}", "out", "--lm", "/none", "--text", "{text}"], "no language model at"),
        (["convert", "{ours}", "{text}/out", "--to", "sparsify"], "a.txt"),
        (["convert", "{broken}", "out", "--to", "sparsify"], "no SAE at"),
        (["convert", "/none/sae", "out", "--to", "nope"], "can't export to 'nope'; there are"),
        (["convert", "{sae}", "out", "--hookpoint", "x"], "'x' names no site"),
        (["inspect", "/none/sae"], "there is no folder /none/sae"),
        (["inspect", "{broken}/none"], "there is no folder"),
        (["inspect", "{ours}", "--subfolder", "none"], "there are no files in"),
        (["pull", "org/repo", "{text}"], "a.txt is a file; name a folder"),
        (["push", "{edit}", "org/repo"], "got 'Nope'"),
        (["push", "{list}", "org/repo"], "is not a recipe (it holds a list)"),
    ],
)
def test_what_is_missing_is_one_line_and_no_traceback(
    tmp_path, ours, monkeypatch, capsys, words, said
):
    known = {"sae": LAYOUTS["sparsify"](tmp_path)[0], "ours": ours, "text": tmp_path / "a.txt"}
    known["text"].write_text("text")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "switch_sae"}')
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"xx")
    known |= {"broken": tmp_path / "broken", "edit": tmp_path / "edit.json"}
    known["list"] = tmp_path / "list.json"
    known["list"].write_text("[1]")
    known["edit"].write_text('{"sae": "org/sae", "edits": [{"edit": "Nope"}]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf-switch-sae", *(word.format(**known) for word in words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-switch-sae: ")
    assert said in error
    assert not (tmp_path / "out").exists()
