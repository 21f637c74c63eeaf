"""Every format is taken over exactly or refused, and what is written is read back the same."""

import json
import os
import pathlib
import pickle
import random

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.foreign_layouts import LAYOUTS, D, K, place_of, write
from helpers.saes import make
from safetensors.torch import load_file, save_file

from hf_switch_sae import (
    ConversionError,
    Recipe,
    Steer,
    SwitchSAE,
    convert,
    export,
    fingerprint,
    inspect,
    load_all,
)
from hf_switch_sae.formats import EXPORTS, FORMATS, Given, Parity
from hf_switch_sae.formats.parity import parity_with
from hf_switch_sae.formats.sparsify import read as read_sparsify
from hf_switch_sae.hub.source import open_source
from hf_switch_sae.hub.tensors import read_tensors

EACH_LAYOUT = pytest.mark.parametrize("name", LAYOUTS)


def vectors(n: int = 64) -> torch.Tensor:
    return 2.0 * torch.randn(n, D, generator=torch.Generator().manual_seed(11))


def reconstruct(sae: SwitchSAE, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return sae.decode(sae.encode(x), x)


@EACH_LAYOUT
def test_a_checkpoint_is_found_by_its_files_and_computes_what_its_project_does(
    tmp_path, name, caplog
):
    folder, expected, options = LAYOUTS[name](tmp_path)
    x = vectors()

    sae = SwitchSAE.from_pretrained(folder, **options)

    wanted = expected(x)
    # not the bias alone: something fires, and not everything
    assert (sae.encode(x).acts > 0).any(1).float().mean() > 0.3
    torch.testing.assert_close(reconstruct(sae, x), wanted, atol=1e-5, rtol=1e-5)
    assert sae.config.hookpoint == place_of(name)
    assert sae.config.source["format"] in name
    assert f"in the format of {sae.config.source['format']}" in caplog.text
    assert not sae.training


@EACH_LAYOUT
def test_a_conversion_is_held_against_the_formula_of_its_format_and_saved(tmp_path, name):
    folder, _, options = LAYOUTS[name](tmp_path)

    done = convert(folder, tmp_path / "out", **options)

    assert done.parity.holds
    assert done.parity.vectors == 256
    assert "agrees" in str(done)
    loaded = SwitchSAE.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(reconstruct(loaded, vectors()), reconstruct(done.sae, vectors()))
    assert loaded.config.source == done.sae.config.source
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_there_is_a_layout_of_every_format():
    assert {f for f in FORMATS if any(name.startswith(f) for name in LAYOUTS)} == set(FORMATS)


@pytest.mark.parametrize("changed", ["W_dec", "b_dec", "W_enc"])
def test_parity_sees_a_wrong_weight(tmp_path, changed):
    checkpoint = read_sparsify(open_source(LAYOUTS["sparsify"](tmp_path)[0]), Given())
    sae = checkpoint.build()
    assert parity_with(sae, checkpoint.formula, "test").holds
    with torch.no_grad():
        getattr(sae, changed)[..., 3] += 0.01
    found = parity_with(sae, checkpoint.formula, "test")
    assert not found.holds
    assert "DOES NOT AGREE" in str(found)


def test_parity_allows_for_rounding_at_a_threshold_and_for_no_more():
    assert Parity("x", 256, error=1e-6, l0=3.0, other_features=12).holds
    assert not Parity("x", 256, error=1e-6, l0=3.0, other_features=13).holds
    assert not Parity("x", 256, error=2e-5, l0=3.0, other_features=0).holds
    assert not Parity("x", 256, error=0.0, l0=0.0, other_features=0).holds


def test_a_16_bit_checkpoint_stays_one_and_is_compared_in_float32(tmp_path):
    folder, _, _ = LAYOUTS["sparsify"](tmp_path)
    file = folder / "sae.safetensors"
    save_file({n: v.bfloat16() for n, v in load_file(file).items()}, file)

    done = convert(folder, tmp_path / "out")

    assert done.sae.dtype == torch.bfloat16
    assert done.parity.holds
    assert SwitchSAE.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert SwitchSAE.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


def test_the_arguments_of_from_pretrained_mean_what_they_always_mean(tmp_path):
    folder, expected, _ = LAYOUTS["switch_sae"](tmp_path)
    sae, info = SwitchSAE.from_pretrained(folder, expert_groups=2, output_loading_info=True)
    assert len(sae.experts) == 2
    assert not any(info.values())
    torch.testing.assert_close(reconstruct(sae, vectors()), expected(vectors()))


# ---------------------------------------------------------------- what the files do not tell


@pytest.mark.parametrize(
    ("name", "lacks", "argument"),
    [
        ("sparsify", ("cfg.json", "k"), "k="),
        ("saelens_topk", ("cfg.json", "k"), "k="),
        ("switch_sae", ("config.json", "k"), "k="),
        ("switch_sae", ("config.json", "heaviside"), "heaviside="),
        ("scale_sae", ("config.json", "e"), "experts_per_token="),
        ("scale_sae", ("config.json", "layer"), "layer="),
        ("switch_sae", ("config.json", "layer"), "layer="),
        ("dictionary_learning_AutoEncoderTopK", ("config.json", "dict_class"), "dict_class="),
        ("dictionary_learning_AutoEncoder", ("config.json", "submodule_name"), "hookpoint="),
    ],
)
def test_what_a_config_does_not_tell_is_asked_for_by_name(tmp_path, name, lacks, argument):
    folder, expected, options = LAYOUTS[name](tmp_path)
    file, field = folder / lacks[0], lacks[1]
    config = json.loads(file.read_text())
    value = (config.get("trainer") or config).pop(field)
    file.write_text(json.dumps(config))

    with pytest.raises(ConversionError, match=argument):
        SwitchSAE.from_pretrained(folder, **options)

    value = "layers.1.resid_pre" if argument == "hookpoint=" else value
    sae = SwitchSAE.from_pretrained(folder, **options, **{argument[:-1]: value})
    torch.testing.assert_close(reconstruct(sae, vectors()), expected(vectors()))


@pytest.mark.parametrize(
    ("name", "old", "new", "argument", "value"),
    [
        ("qwen_scope", f"-L0_{K}", "", "k", K),
        ("gemma_scope", "layer_20", "some", "layer", 20),
        ("goodfire", "-l19", "", "layer", 19),
        ("openai", "resid_post_mlp", "somewhere", "hookpoint", "layers.8.resid_post"),
        ("sparsify", "layers.10", "mine", "hookpoint", "layers.10.resid_post"),
    ],
)
def test_what_an_address_does_not_tell_is_asked_for_by_name(
    tmp_path, name, old, new, argument, value
):
    folder, expected, options = LAYOUTS[name](tmp_path)
    for file in list(folder.iterdir()):
        file.rename(file.with_name(file.name.replace(old, new)))
    moved = pathlib.Path(str(folder).replace(old, new))
    moved.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(moved)

    with pytest.raises(ConversionError, match=f"{argument}="):
        SwitchSAE.from_pretrained(moved, **options)

    sae = SwitchSAE.from_pretrained(moved, **options, **{argument: value})
    torch.testing.assert_close(reconstruct(sae, vectors()), expected(vectors()))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("sparsify", {"k": K + 1}),
        ("switch_sae", {"heaviside": True}),
        ("dictionary_learning_BatchTopKSAE", {"threshold": 0.7}),
        ("gemma_scope", {"layer": 3}),
    ],
)
def test_what_is_given_may_not_contradict_the_files(tmp_path, name, given):
    folder, _, options = LAYOUTS[name](tmp_path)
    with pytest.raises(ConversionError, match="contradicts"):
        SwitchSAE.from_pretrained(folder, **options, **given)


@pytest.mark.parametrize("hookpoint", ["whatever", "resid_post", ".resid_post"])
def test_a_hookpoint_without_a_module_or_a_site_is_refused(tmp_path, hookpoint):
    folder, _, _ = LAYOUTS["sparsify"](tmp_path)
    with pytest.raises(ConversionError, match=f"'{hookpoint}' names no site"):
        convert(folder, tmp_path / "out", hookpoint=hookpoint)
    assert not (tmp_path / "out").exists()


def test_a_layer_without_a_file_is_answered_with_what_there_is(tmp_path):
    folder, _, _ = LAYOUTS["qwen_scope"](tmp_path)
    with pytest.raises(ConversionError, match=r"no layer99\.sae\.pt .* it has layer12\.sae\.pt"):
        SwitchSAE.from_pretrained(folder, layer=99)


def test_a_scale_that_is_not_in_the_files_is_asked_for(tmp_path):
    for name in ("saelens_jumprelu_scaled", "llama_scope_r1"):
        folder, _, _ = LAYOUTS[name](tmp_path / name)
        with pytest.raises(ConversionError, match="input_scale="):
            SwitchSAE.from_pretrained(folder)


def test_a_threshold_of_minus_one_is_none(tmp_path):
    folder, expected, _ = LAYOUTS["dictionary_learning_BatchTopKSAE"](tmp_path)
    stored = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**stored, "threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    with pytest.raises(ConversionError, match="threshold="):
        SwitchSAE.from_pretrained(folder)
    sae = SwitchSAE.from_pretrained(folder, threshold=0.4)
    torch.testing.assert_close(reconstruct(sae, vectors()), expected(vectors()))


def test_one_of_many_files_is_named_as_subfolder(tmp_path):
    folder, expected, _ = LAYOUTS["qwen_scope"](tmp_path)
    with pytest.raises(ConversionError, match=r"2 SAEs.*layer12\.sae\.pt"):
        SwitchSAE.from_pretrained(folder)
    sae = SwitchSAE.from_pretrained(folder, subfolder="layer2.sae.pt")
    assert sae.config.hookpoint == "layers.2.resid_post"
    assert sae.config.base_model == "Qwen/Qwen3-1.7B-Base"
    torch.testing.assert_close(reconstruct(sae, vectors()), expected(vectors()))


# ---------------------------------------------------------------- what can't be taken over


@pytest.mark.parametrize(
    ("name", "file", "change", "words"),
    [
        ("sparsify", "cfg.json", {"transcode": True}, "transcode=True"),
        ("sparsify", "cfg.json", {"activation": "groupmax"}, "groupmax"),
        ("sparsify", "cfg.json", {"signed": True}, "signed"),
        ("saelens_topk", "cfg.json", {"architecture": "temporal"}, "'temporal'"),
        ("saelens_topk", "cfg.json", {"architecture": "transcoder"}, "'transcoder'"),
        ("saelens_standard", "cfg.json", {"normalize_activations": "covariance_whitening"}, "whit"),
        ("saelens_standard", "cfg.json", {"normalize_activations": "nonsense"}, "nonsense"),
        ("switch_sae", "config.json", {"dict_class": "MoEAutoEncoder"}, "mixture of experts"),
        ("switch_sae", "config.json", {"trainer_class": "Switch1onTrainer"}, "always on"),
        ("switch_sae", "config.json", {"experts": 5}, "5 experts, 4 router rows"),
        ("scale_sae", "config.json", {"e": 8}, "8 experts"),
        ("dictionary_learning_AutoEncoder", "config.json", {"dict_class": "Odd"}, "Odd"),
        ("dictionary_learning_AutoEncoderTopK", "config.json", {"k": 7}, "k is 5 in ae.pt, 7"),
        ("gemma_scope_2", "config.json", {"hf_hook_point_out": "x.output"}, "another"),
        ("llama_scope", "hyperparams.json", {"hook_point_out": "hook_mlp_out"}, "transcod"),
        ("llama_scope", "hyperparams.json", {"act_fn": "topk"}, "act_fn"),
        ("llama_scope", "hyperparams.json", {"norm_activation": "token-wise"}, "token-wise"),
    ],
)  # fmt: skip
def test_a_kind_that_is_no_switch_sae_is_refused_by_name(tmp_path, name, file, change, words):
    folder, _, options = LAYOUTS[name](tmp_path)
    config = json.loads((folder / file).read_text())
    config.get("trainer", config).update(change)
    (folder / file).write_text(json.dumps(config))
    assert_refused(tmp_path, folder, options, words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"activation": "Identity"}, "'Identity'"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "postact_fn"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "pass k="),
        ({"activation_state_dict": {"k": 2.5, "postact_fn": "ReLU"}}, "no whole number"),
        ({"activation_state_dict": [K]}, "activation_state_dict"),
    ],
)
def test_another_activation_of_openai_is_refused_by_name(tmp_path, changed, words):
    folder, _, _ = LAYOUTS["openai_topk"](tmp_path)
    stored = torch.load(folder / "8.pt", weights_only=True)
    torch.save({**stored, **changed}, folder / "8.pt")
    assert_refused(tmp_path, folder, {}, words)


def test_todays_llamascopium_is_refused_by_name(tmp_path):
    config = {"sae_type": "sae", "d_model": D, "hook_point_in": "blocks.2.hook_resid_post"}
    tensors = {"W_E": torch.zeros(D, 8)}
    folder = write(tmp_path / "today", config__json=config, sae__safetensors=tensors)
    assert_refused(tmp_path, folder, {}, r"today's Llamascopium .*sae_type='sae'")


@pytest.mark.parametrize("file", ["latest_ckpt.safetensors", "config.yaml"])
def test_other_kinds_are_told_by_their_files(tmp_path, file):
    (write(tmp_path / "other") / file).write_text("x")
    with pytest.raises(ConversionError, match="looks like"):
        convert(tmp_path / "other")
    with pytest.raises(OSError, match="looks like"):
        SwitchSAE.from_pretrained(tmp_path / "other")


def assert_refused(tmp_path, folder, options, words):
    """By both ways in, with nothing written."""
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(ConversionError, match=words):
        SwitchSAE.from_pretrained(folder, **options)
    with pytest.raises(ConversionError, match=words):
        convert(folder, tmp_path / "out", **options)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def stored_in(folder) -> pathlib.Path:
    kinds = (".safetensors", ".pt", ".pth", ".npz")
    if (chosen := folder / "layer12.sae.pt").exists():  # one of several, told by `layer`
        return chosen
    return next(path for path in folder.rglob("*") if path.suffix in kinds)


def change(file: pathlib.Path, alter) -> None:
    """Rewrite a file of weights."""
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        alter(tensors)
        save_file({n: v.contiguous() for n, v in tensors.items()}, file)
    elif file.suffix == ".npz":
        with np.load(file) as held:
            tensors = {n: torch.from_numpy(held[n]) for n in held.files}
        alter(tensors)
        np.savez(file, **{n: v.numpy() for n, v in tensors.items()})
    else:
        tensors = torch.load(file, weights_only=True)
        alter(tensors)
        torch.save(tensors, file)


def matrices(tensors) -> list[str]:
    two = {n: v.shape for n, v in tensors.items() if getattr(v, "ndim", 0) == 2}
    return [name for name, shape in two.items() if shape[0] != shape[1]]


@EACH_LAYOUT
def test_a_transposed_matrix_is_refused(tmp_path, name):
    folder, _, options = LAYOUTS[name](tmp_path)

    def transpose_all(tensors):
        for each in matrices(tensors):
            tensors[each] = tensors[each].T

    change(stored_in(folder), transpose_all)
    assert_refused(tmp_path, folder, options, "should be|has no tensor|needs a row")


# the others are statistics, or nothing that computes
UNUSED = ("stats_", "latents_", "activation", "beta", "lp_transform_decoder", "group_sizes")


def spoil_each_tensor(tmp_path, name, spoil, words):
    """Refused whichever of the tensors it is that `spoil(tensors, tensor)` spoils."""
    folder, _, options = LAYOUTS[name](tmp_path)
    file = stored_in(folder)
    whole = file.read_bytes()
    tensors = read_tensors(file)
    used = [t for t in tensors if not t.startswith(UNUSED) and getattr(tensors[t], "ndim", 0)]
    assert len(used) >= 4
    for tensor in used:
        file.write_bytes(whole)
        change(file, lambda held, tensor=tensor: spoil(held, tensor))
        with pytest.raises(ConversionError, match=words) as refused:
            convert(folder, tmp_path / "out", **options)
        assert str(folder) in str(refused.value)
    assert not (tmp_path / "out").exists()


@EACH_LAYOUT
def test_whichever_tensor_is_missing_is_refused(tmp_path, name):
    said = "has no tensor|dict_class|no topk_threshold|none of the known|rows and"
    spoil_each_tensor(tmp_path, name, lambda held, tensor: held.pop(tensor), said)


@EACH_LAYOUT
def test_whichever_tensor_has_another_shape_is_refused(tmp_path, name):
    def widen(held, tensor):
        held[tensor] = torch.cat([held[tensor], held[tensor][..., :1]], dim=-1)

    spoil_each_tensor(tmp_path, name, widen, "should be|rows and|experts")


@EACH_LAYOUT
def test_a_tensor_that_nobody_knows_is_refused(tmp_path, name):
    folder, _, options = LAYOUTS[name](tmp_path)
    change(stored_in(folder), lambda tensors: tensors.update(W_skip=torch.zeros(D, D)))
    assert_refused(tmp_path, folder, options, "W_skip")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder, _, _ = LAYOUTS["sparsify"](tmp_path)
    change(stored_in(folder), lambda t: t["W_dec"].__setitem__((0, 0), torch.nan))
    assert_refused(tmp_path, folder, {}, "not finite")


class Malicious:
    def __init__(self, marker: pathlib.Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@EACH_LAYOUT
def test_pickled_code_is_refused_and_not_run(tmp_path, name):
    folder, _, options = LAYOUTS[name](tmp_path / "in")
    marker = tmp_path / "executed"
    file = stored_in(folder)
    held = {n: getattr(v, "clone", lambda v=v: v)() for n, v in read_tensors(file).items()}
    with file.open("wb") as out:  # whatever the file's ending says
        torch.save({**held, "x": Malicious(marker)}, out)
    assert_refused(tmp_path, folder, options, "nothing was executed|can't be read")
    assert not marker.exists()
    file.write_bytes(pickle.dumps({**held, "x": Malicious(marker)}))
    assert_refused(tmp_path, folder, options, "nothing was executed|can't be read")
    assert not marker.exists()


@EACH_LAYOUT
def test_a_checkpoint_beside_the_folder_is_out_of_reach(tmp_path, name):
    folder, _, options = LAYOUTS[name](tmp_path / "secret")
    (tmp_path / "here").mkdir()
    climbing = f"../{folder.relative_to(tmp_path).as_posix()}"
    for path in (climbing, climbing.replace("/", "\\"), str(folder)):
        with pytest.raises(ConversionError, match="climbs out"):
            convert(tmp_path / "here", tmp_path / "out", subfolder=path, **options)
        with pytest.raises((ConversionError, OSError)):
            SwitchSAE.from_pretrained(tmp_path / "here", subfolder=path, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["openai", "gemma_scope"])
def test_whatever_is_damaged_in_a_file_is_an_error_of_ours(tmp_path, name):
    file = stored_in(LAYOUTS[name](tmp_path)[0])
    whole, chance = file.read_bytes(), random.Random(0)
    starts = [whole.find(b"pre_bias"), 0, len(whole) - 400]  # the pickle, the head, the listing
    refused = 0
    for _ in range(300):
        data, start = bytearray(whole), max(0, chance.choice(starts) - 40)
        for _ in range(3):
            data[min(len(data) - 1, start + chance.randrange(200))] = chance.randrange(256)
        file.write_bytes(data)
        try:
            read_tensors(file)
        except ConversionError:
            refused += 1
    assert refused > 100


def test_pickled_code_in_an_npz_is_refused_and_not_run(tmp_path):
    folder, _, _ = LAYOUTS["gemma_scope"](tmp_path / "in")
    marker = tmp_path / "executed"
    held = dict(np.load(folder / "params.npz"))
    np.savez(folder / "params.npz", **held, x=np.array([Malicious(marker)], dtype=object))
    assert_refused(tmp_path, folder, {}, "nothing was executed")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["sparsify", "gemma_scope", "goodfire"])
def test_a_damaged_file_is_refused(tmp_path, name):
    folder, _, options = LAYOUTS[name](tmp_path)
    file = stored_in(folder)
    file.write_bytes(file.read_bytes()[:200])
    assert_refused(tmp_path, folder, options, "can't be read|was not read")


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc", "..\\secret", "C:/x"])
def test_a_path_that_climbs_out_of_its_folder_is_refused(tmp_path, path):
    LAYOUTS["sparsify"](tmp_path / "secret")
    (tmp_path / "here").mkdir()
    with pytest.raises(ConversionError, match="climbs out"):
        convert(tmp_path / "here", subfolder=path)
    with pytest.raises((ConversionError, OSError)):
        SwitchSAE.from_pretrained(tmp_path / "here", subfolder=path)


@pytest.mark.parametrize("name", ["saelens_topk", "switch_sae", "scale_sae"])
def test_a_config_of_another_shape_is_refused(tmp_path, name):
    folder, _, _ = LAYOUTS[name](tmp_path)
    (file,) = folder.glob("*.json")
    file.write_text(json.dumps({"trainer": ["x"], "metadata": "x", "architecture": "topk", "k": 3}))
    assert_refused(tmp_path, folder, {}, "no JSON object")


def test_the_name_may_be_given_by_keyword(tmp_path):
    folder, expected, _ = LAYOUTS["sparsify"](tmp_path)
    sae = SwitchSAE.from_pretrained(pretrained_model_name_or_path=folder)
    torch.testing.assert_close(reconstruct(sae, vectors()), expected(vectors()))


def test_a_config_that_is_no_json_is_refused(tmp_path):
    folder, _, _ = LAYOUTS["sparsify"](tmp_path)
    (folder / "cfg.json").write_text("{")
    assert_refused(tmp_path, folder, {}, "no JSON")


def test_what_is_in_no_known_format_is_answered_with_what_there_is(tmp_path):
    LAYOUTS["sparsify"](tmp_path / "org")
    with pytest.raises(ConversionError, match=r"weights in: layers\.10"):
        convert(tmp_path / "org")
    with pytest.raises(OSError, match=r"there are: layers\.10"):
        SwitchSAE.from_pretrained(tmp_path / "org")
    with pytest.raises(ConversionError, match="no format 'nonsense'"):
        convert(tmp_path / "org", format="nonsense")
    with pytest.raises(TypeError, match="no option 'kk'"):
        convert(tmp_path / "org", kk=3)


def test_where_a_checkpoint_lay_on_this_machine_is_not_recorded(tmp_path):
    folder, _, _ = LAYOUTS["sparsify"](tmp_path)
    sae = SwitchSAE.from_pretrained(folder)
    assert sae.config.source["folder"] == folder.name
    sae.save_pretrained(tmp_path / "ours")
    assert str(tmp_path) not in (tmp_path / "ours" / "config.json").read_text()
    assert Recipe.of(sae.config, Steer(1)).sae == str(folder)
    ours = SwitchSAE.from_pretrained(tmp_path / "ours")
    assert Recipe.of(ours.config, Steer(1)).sae == str(tmp_path / "ours")


def test_all_of_llama_scope_is_loaded_though_its_weights_lie_a_folder_deeper(tmp_path):
    folder, _, _ = LAYOUTS["llama_scope"](tmp_path / "release")
    place = folder.relative_to(tmp_path / "release").as_posix()
    assert list(load_all(tmp_path / "release")) == [place]
    assert list(load_all(folder)) == [""]
    assert [sae.path for sae in inspect(folder).saes] == [""]


def test_nothing_is_written_over_what_is_there(tmp_path):
    folder, _, _ = LAYOUTS["sparsify"](tmp_path)
    with pytest.raises(ConversionError, match="is there already"):
        convert(folder, folder)
    with pytest.raises(ConversionError, match="is there already"):
        export(make("plain_topk"), folder, "saelens")


@pytest.mark.parametrize("parent", ["embeddings", "embedding", "my-transcoder", "clt", "layer_3"])
@pytest.mark.parametrize("release", ["gemma-scope-2b-pt-res", "gemma"])
def test_the_folders_a_user_keeps_gemma_scope_in_say_nothing(tmp_path, parent, release):
    folder, expected, _ = LAYOUTS["gemma_scope"](tmp_path)
    moved = tmp_path / parent / release / folder.relative_to(folder.parents[2])
    moved.parent.mkdir(parents=True)
    folder.rename(moved)
    told = {} if "scope" in release else {"layer": 20}
    sae = SwitchSAE.from_pretrained(moved, **told)
    assert sae.config.hookpoint == "layers.20.resid_post"
    torch.testing.assert_close(reconstruct(sae, vectors()), expected(vectors()))


@pytest.mark.parametrize(
    "address",
    ["gemma-scope-2b-pt-transcoders/layer_20/width_16k/average_l0_71", "clt/width_262k_l0_big"],
)
def test_a_transcoder_is_told_by_the_address_the_release_gave_it(tmp_path, address):
    folder, _, _ = LAYOUTS["gemma_scope"](tmp_path)
    moved = tmp_path / "x" / address
    moved.parent.mkdir(parents=True)
    folder.rename(moved)
    with pytest.raises(ConversionError, match=r"is a (transcoder|clt)"):
        SwitchSAE.from_pretrained(moved)


# ---------------------------------------------------------------- and back


def converted(kind: str) -> SwitchSAE:
    sae = make(kind, hookpoint="layers.3.resid_post", base_model="org/lm")
    if "batch" in kind:
        sae.threshold.fill_(0.3)
    return sae


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("saelens", "plain_topk"),
        ("saelens", "plain_batch_topk"),
        ("saelens", "plain_jumprelu"),
        ("saelens", "plain_relu"),
        ("sparsify", "plain_topk"),
        ("dictionary_learning", "plain_topk"),
        ("dictionary_learning", "plain_batch_topk"),
        ("dictionary_learning", "plain_jumprelu"),
        ("dictionary_learning", "plain_relu"),
        ("switch_sae", "switch"),
    ],
)
@pytest.mark.parametrize("subtract", [True, False])
def test_what_is_exported_is_read_back_the_same(tmp_path, format, kind, subtract):
    sae, x = converted(kind), vectors()
    sae.config.subtract_b_dec = subtract or format == "switch_sae"

    assert export(sae, tmp_path / "layers.3", format) == ()

    back = SwitchSAE.from_pretrained(tmp_path / "layers.3")
    assert back.config.source["format"] == format
    assert back.config.hookpoint == "layers.3.resid_post"
    torch.testing.assert_close(back.encode(x).to_dense(), sae.encode(x).to_dense())
    torch.testing.assert_close(reconstruct(back, x), reconstruct(sae, x))


@pytest.mark.parametrize(
    ("format", "kind", "words"),
    [
        ("saelens", "switch", "4 experts; format='switch_sae' can"),
        ("sparsify", "plain_relu", "only topk"),
        ("dictionary_learning", "switch", "no router"),
        ("switch_sae", "plain_topk", "one expert|encoder_bias"),
        ("switch_sae", "two_experts", "num_experts_per_token"),
        ("qwen_scope", "plain_topk", "can't export"),
    ],
)
def test_what_a_format_can_not_hold_is_refused_with_the_reason(tmp_path, format, kind, words):
    with pytest.raises(ConversionError, match=words):
        export(converted(kind), tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_thresholds_that_differ_are_no_batch_topk_of_dictionary_learning(tmp_path):
    sae = make("plain_batch_topk")
    with pytest.raises(ConversionError, match="one threshold"):
        export(sae, tmp_path / "out", "dictionary_learning")
    sae.threshold.fill_(-1.0)
    with pytest.raises(ConversionError, match="calibrate"):
        export(sae, tmp_path / "out", "saelens")


@pytest.mark.parametrize("format", EXPORTS)
def test_a_bound_on_the_norm_that_is_lost_is_said(tmp_path, format):
    sae = converted("switch" if format == "switch_sae" else "plain_topk")
    sae.outlier_norm.fill_(50.0)
    (note,) = export(sae, tmp_path / "out", format)
    assert "over 50" in note


def test_every_export_is_a_format_that_can_be_read():
    assert set(EXPORTS) < set(FORMATS)
    assert set(EXPORTS) == {"saelens", "sparsify", "dictionary_learning", "switch_sae"}


def test_fvu_on_live_text_is_measured_when_a_model_is_given(tmp_path):
    lm = tiny.llama()
    sae = SwitchSAE.for_lm(lm, at=1, num_features=32, num_experts=1, k=4, encoder_bias=True)
    export(sae, tmp_path / "layers.1", "sparsify")
    inputs = {"input_ids": torch.arange(1, 25).reshape(2, 12)}

    done = convert(tmp_path / "layers.1", lm=lm, inputs=inputs)

    assert done.live.tokens == 24
    assert done.live.l0 <= 4
    assert "FVU" in str(done)
    with pytest.raises(ConversionError, match="both lm= and inputs="):
        convert(tmp_path / "layers.1", lm=lm)


def test_parity_is_not_fooled_by_a_conversion_in_which_nothing_fires(tmp_path):
    folder, _, _ = LAYOUTS["gemma_scope"](tmp_path)
    change(folder / "params.npz", lambda t: t.update(threshold=t["threshold"] + 100))
    done = convert(folder)
    assert done.parity.l0 >= 0.5  # the vectors were made long enough


@pytest.mark.parametrize(
    ("kind", "name"),
    [("gpt2", "transformer.h.2"), ("llama", "model.layers.2"), ("t5", None), (None, None)],
)
def test_saelens_is_told_the_module_where_the_language_model_tells_it(tmp_path, kind, name):
    more = {} if kind is None else {"base_model_fingerprint": fingerprint(getattr(tiny, kind)())}
    export(make("plain_topk", hookpoint="layers.2.resid_post", **more), tmp_path / "s", "saelens")
    metadata = json.loads((tmp_path / "s" / "cfg.json").read_text())["metadata"]
    assert metadata.get("hf_hook_name") == name
    assert SwitchSAE.from_pretrained(tmp_path / "s").config.hookpoint == "layers.2.resid_post"
