"""Looking into a folder reads headers and statistics; cards keep what a person wrote."""

import json
import zipfile

import pytest
import torch
from helpers.foreign_layouts import LAYOUTS
from helpers.saes import D, make
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_switch_sae import ConversionError, SwitchSAE, SwitchSAEError, inspect, load_all
from hf_switch_sae.cli.app import app
from hf_switch_sae.release.card import BEGIN, END, render_card
from hf_switch_sae.release.push import files_to_push, save_all

A, B = "layers.3.resid_post", "layers.7.resid_pre"


@pytest.fixture
def release(tmp_path):
    first = make("jumprelu", hookpoint=A, base_model="org/lm", metrics={"fvu": 0.25, "l0": 3.0})
    first.calibrate([torch.randn(50, D)])
    second = make("plain_topk", hookpoint=B, base_model="org/lm", source={"repo": "org/first"})
    save_all({A: first, B: second}, tmp_path / "release")
    return tmp_path / "release"


def test_checkpoints_of_a_run_are_no_saes_of_its_folder_but_can_be_named(release):
    make("plain_topk", hookpoint=A).save_pretrained(release / "checkpoint-8" / A)
    assert [summary.path for summary in inspect(release).saes] == [A, B]
    assert sorted(load_all(release)) == [A, B]
    checkpoint = release / "checkpoint-8"
    assert [summary.path for summary in inspect(checkpoint).saes] == [A]
    assert [summary.path for summary in inspect(release, "checkpoint-8").saes]
    assert sorted(load_all(checkpoint)) == [A]


def test_every_sae_of_a_folder_is_described_as_its_file_has_it(release):
    found = inspect(release)
    assert [summary.path for summary in found.saes] == [A, B]
    first, second = found.saes
    held = load_file(release / A / "model.safetensors")
    assert {name: shape for name, (_, shape) in first.tensors.items()} == {
        name: list(value.shape) for name, value in held.items()
    }
    assert first.statistics["residual_norm"] == pytest.approx(float(held["residual_norm"]))
    assert first.statistics["statistics_tokens"] == 50
    assert first.statistics["largest feature_max"] == pytest.approx(
        float(held["feature_max"].max())
    )
    assert "dead_share" not in second.statistics
    assert second.config["source"] == {"repo": "org/first"}
    assert "from: repo org/first" in str(found)
    json.dumps(found.to_dict())


def test_weights_are_not_read(release):
    """Even where they are not there any more."""
    file = release / A / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    parts = json.loads(data[8:header])
    begin, end = parts["W_enc"]["data_offsets"]
    whole = inspect(release, A)
    file.write_bytes(data[: header + begin] + b"?" * (end - begin) + data[header + end :])
    assert inspect(release, A) == whole


def test_a_foreign_checkpoint_is_named_by_its_format(tmp_path):
    LAYOUTS["sparsify"](tmp_path / "org")
    (summary,) = inspect(tmp_path / "org").saes
    assert (summary.path, summary.format) == ("layers.10", "sparsify")
    assert inspect(tmp_path / "org" / "layers.10").saes[0].format == "sparsify"


@pytest.mark.parametrize(
    "name", ["goodfire", "openai", "scale_sae", "switch_sae", "dictionary_learning_BatchTopKSAE"]
)
def test_a_pickled_checkpoint_is_named_without_reading_its_tensors(tmp_path, name, monkeypatch):
    folder = LAYOUTS[name](tmp_path / "in")[0]
    monkeypatch.setattr(torch, "load", None)
    (summary,) = inspect(folder).saes
    assert name.startswith(summary.format)
    (file,) = [path for path in folder.iterdir() if path.suffix in (".pt", ".pth")]
    for config in folder.glob("config.json"):  # then the names in the file are all there is
        config.unlink()
    assert inspect(folder).saes == (summary,)
    # even where the tensors are not there any more
    with zipfile.ZipFile(file) as held:
        (pickled,) = [each for each in held.infolist() if each.filename.endswith("data.pkl")]
        data = held.read(pickled)
    with zipfile.ZipFile(file, "w") as held:
        held.writestr(pickled, data)
    assert inspect(folder).saes == (summary,)


def test_a_pickled_checkpoint_of_old_is_read_and_named(tmp_path):
    folder = LAYOUTS["goodfire"](tmp_path)[0]
    (file,) = folder.iterdir()
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert inspect(folder).saes[0].format == "goodfire"


def header_of(**tensors) -> bytes:
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        b"\x02" + b"\0" * 7 + b"[]",
        header_of(W_enc=[1]),
        header_of(W_enc={"dtype": "F32"}),
        header_of(input_scale={"dtype": "F32", "shape": [], "data_offsets": [0, 4]}),
        header_of(input_scale={"dtype": "F32", "shape": [], "data_offsets": 4}),
        header_of(input_scale={"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}) + b"\0" * 4,
    ],
)
def test_a_damaged_file_is_an_error(release, data):
    (release / A / "model.safetensors").write_bytes(data)
    with pytest.raises(ConversionError, match="no safetensors file"):
        inspect(release)


def test_the_commands_print_what_the_functions_return(release, tmp_path):
    shown = CliRunner().invoke(app, ["inspect", str(release)])
    assert shown.output.strip() == str(inspect(release))
    as_json = CliRunner().invoke(app, ["inspect", str(release), "--json", "--subfolder", A])
    assert json.loads(as_json.output)["saes"][0]["path"] == A


def test_the_convert_command_takes_over_and_hands_on(tmp_path):
    folder, expected, _ = LAYOUTS["qwen_scope"](tmp_path)
    done = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "ours"), "--layer", "2"])
    assert done.exit_code == 0, done.output
    assert "agrees with the format's formula on 256 random vectors" in done.output
    to = ["convert", str(tmp_path / "ours"), str(tmp_path / "layers.2"), "--to", "sparsify"]
    assert CliRunner().invoke(app, to).exit_code == 0
    sae, x = SwitchSAE.from_pretrained(tmp_path / "layers.2"), torch.randn(8, D)
    torch.testing.assert_close(sae.decode(sae.encode(x)).detach(), expected(x))
    again = CliRunner().invoke(app, to)
    assert isinstance(again.exception, ConversionError)


def test_a_card_is_written_from_configs_and_metrics(release):
    (release / A / "metrics.json").write_text(json.dumps({"fvu": 0.125, "settings": {"k": 1}}))
    card = ModelCard(render_card(release, "org/repo"))
    assert card.data.base_model == "org/lm"
    assert card.data.library_name == "hf_switch_sae"
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results == {(A, "fvu"): 0.125}
    for words in (
        f'subfolder="{A}"',
        f"| {B} | {B} | org/lm | 24 | 1 | 3 | topk |",
        "| fvu | 0.125 |",
    ):
        assert words in card.text


def test_a_card_and_a_summary_tell_what_a_conversion_was_taken_from(tmp_path):
    origin = {"repo": "org/first", "format": "sparsify"}
    source = {"repo": "org/ours", "revision": "abc", "taken_from": origin}
    save_all({A: make(hookpoint=A, source=source)}, tmp_path)
    taken = f"{A} was taken from: format `sparsify`, repo `org/first`."
    assert taken in render_card(tmp_path, "org/repo")
    text = str(inspect(tmp_path))
    assert "  from: repo org/ours, revision abc\n" in text
    assert "  taken from: format sparsify, repo org/first\n" in text


def test_a_card_is_renewed_within_its_marks_only(release):
    readme = release / "README.md"
    readme.write_text(render_card(release, "org/repo"))
    assert render_card(release, "org/repo") == readme.read_text()
    own = readme.read_text().replace(
        "library_name: hf_switch_sae", "library_name: mine\nlicense: mit"
    )
    own = own.replace(BEGIN, f"My words.\n{BEGIN}").replace("org/lm", "wrong") + "And more.\n"
    readme.write_text(own)
    card = render_card(release, "org/repo")
    assert "My words.\n" in card
    assert card.endswith(f"{END}\nAnd more.\n")
    assert "library_name: mine" in card
    assert "license: mit" in card
    assert "wrong" not in card.partition(BEGIN)[2].partition(END)[0]


def test_a_card_without_marks_is_a_persons(release):
    (release / "README.md").write_text("# Mine\n")
    assert render_card(release, "org/repo") == "# Mine\n"


def test_a_front_matter_that_is_no_yaml_is_an_error(release, tmp_path):
    (release / "README.md").write_text(f"---\n: [\n---\n{BEGIN}\n{END}\n")
    with pytest.raises(SwitchSAEError, match="front matter"):
        render_card(release, "org/repo")
    with pytest.raises(SwitchSAEError, match="no SAE of ours"):
        render_card(tmp_path / "nothing", "org/repo")


def test_hidden_files_are_not_part_of_a_release(tmp_path):
    for name in (".env", ".cache/key", "sae/.tmp-host-1-0123abcd", "sae/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / ".gitattributes").write_text("")
    assert list(files_to_push(tmp_path)) == [".gitattributes", "sae/config.json"]
