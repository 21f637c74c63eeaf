"""What is exported adds to the stream what an attached session adds; the rest is refused."""

import csv

import pytest
import torch
from helpers import tiny
from helpers.saes import D, make

from hf_switch_sae import (
    Ablate,
    Clamp,
    EditError,
    Recipe,
    Steer,
    SwitchSAE,
    SwitchSAEConfig,
    export_recipe,
)
from hf_switch_sae.formats.steering_files import steering_vector
from hf_switch_sae.lm.hookpoints import resolve

PLACE = "layers.1.resid_post"


@pytest.fixture
def sae() -> SwitchSAE:
    names = {f"layers.{layer}.mlp.up_proj.weight": [0.0] for layer in range(4)}
    print_of = {"model_type": "llama", "num_hidden_layers": 4, "weights": names}
    made = make("switch", hookpoint=PLACE, base_model="org/lm", base_model_fingerprint=print_of)
    made.calibrate([torch.randn(200, D)])
    return made


def recipe(*edits, **more) -> Recipe:
    return Recipe("org/sae", edits or (Steer([3, 8], 0.5), Steer(5, -2.0, unit="raw")), **more)


def test_the_vector_is_what_an_attached_session_adds_to_every_token():
    lm = tiny.llama()
    made = SwitchSAE.for_lm(lm, at=1, num_features=32, num_experts=4, k=4).eval()
    made.calibrate([torch.randn(100, made.config.hidden_size)])
    wanted = recipe(Steer([3, 8], 0.5, unit="norm"), Steer(5, -2.0, unit="raw"))
    ids = torch.arange(1, 9)[None]
    streams = []
    with torch.no_grad():
        for edits in ((), wanted.edits):
            with made.attach(lm) as session:
                session.edit(*edits)
                hook = lm.model.layers[2].register_forward_pre_hook(
                    lambda _, args: streams.append(args[0].clone())
                )
                lm(input_ids=ids)
                hook.remove()
    clean, steered = streams
    added = steering_vector(wanted, made).expand(1, 8, -1)
    torch.testing.assert_close(steered - clean, added, atol=1e-5, rtol=1e-5)


def test_the_file_of_lm_eval_names_the_module_and_holds_the_vector(tmp_path, sae):
    export_recipe(recipe(), sae, tmp_path / "steer.pt")
    held = torch.load(tmp_path / "steer.pt", weights_only=True)  # as lm-eval reads it
    assert list(held) == ["layers.1"]
    steer = held["layers.1"]
    assert (steer["action"], steer["steering_coefficient"], steer["bias"]) == ("add", 1.0, None)
    torch.testing.assert_close(steer["steering_vector"], steering_vector(recipe(), sae))
    assert [path.name for path in tmp_path.iterdir()] == ["steer.pt"]


def test_the_table_of_lm_eval_names_a_feature_of_an_sae_that_it_can_load(tmp_path, sae):
    one = recipe(Steer(5, 0.5))
    export_recipe(one, sae, tmp_path / "steer.csv", sparse_model="org/sparsify-sae")
    with (tmp_path / "steer.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert list(row) == [
        "loader",
        "action",
        "sparse_model",
        "hookpoint",
        "feature_index",
        "steering_coefficient",
        "sae_id",
        "description",
    ]
    assert (row["loader"], row["sparse_model"], row["hookpoint"], row["feature_index"]) == (
        "sparsify",
        "org/sparsify-sae",
        "layers.1",
        "5",
    )
    direction = sae.decoder_rows(5)[0].detach()
    torch.testing.assert_close(
        float(row["steering_coefficient"]) * direction, steering_vector(one, sae)
    )
    export_recipe(one, sae, tmp_path / "lens.csv", sparse_model="release", sae_id="a/b")
    assert "sae_lens,add,release,layers.1,5" in (tmp_path / "lens.csv").read_text()
    sae.config.source = {"format": "sparsify", "repo": "org/published", "path": "h.1"}
    export_recipe(one, sae, tmp_path / "own.csv")
    assert "sparsify,add,org/published,h.1,5" in (tmp_path / "own.csv").read_text()
    sae.config.source = {"repo": "org/ours", "taken_from": sae.config.source}
    export_recipe(one, sae, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "own.csv").read_text()


@pytest.mark.parametrize(
    ("kind", "at", "name"),
    [
        ("llama", 2, "layers.2"),
        ("gpt2", 2, "h.2"),
        ("bloom", 0, "h.0"),
        ("gpt_neox", "gpt_neox.layers.1.mlp", "layers.1.mlp"),
        ("gpt2", "transformer.h.3.mlp", "h.3.mlp"),
        ("bert", 1, "encoder.layer.1"),
    ],
)
def test_the_module_is_the_one_whose_output_the_sae_reads(tmp_path, kind, at, name):
    lm = getattr(tiny, kind)()
    made = SwitchSAE.for_lm(lm, at=at, num_features=32, num_experts=4, k=4)
    raw = recipe(Steer(5, -2.0, unit="raw"))
    export_recipe(raw, made, tmp_path / "steer.pt")
    (found,) = torch.load(tmp_path / "steer.pt", weights_only=True)
    assert found == name
    # as lm-eval finds it
    module = dict(lm.base_model.named_modules())[found]
    assert module is resolve(lm, made.config.hookpoint).module
    export_recipe(raw, made, tmp_path / "steer.csv", sparse_model="org/sparsify-sae")
    assert f",{name},5," in (tmp_path / "steer.csv").read_text()


@pytest.mark.parametrize(
    "print_of",
    [
        None,
        {"num_hidden_layers": 4, "weights": {"embed.weight": [0.0]}},
        {  # an encoder and a decoder alike
            "num_hidden_layers": 2,
            "weights": {"encoder.block.1.w": [0.0], "decoder.block.1.w": [0.0]},
        },
    ],
)
def test_a_module_that_the_config_does_not_tell_is_asked_for(tmp_path, sae, print_of):
    sae.config.base_model_fingerprint = print_of
    for name in ("a.pt", "a.csv"):
        with pytest.raises(EditError, match="module="):
            export_recipe(recipe(Steer(3)), sae, tmp_path / name, sparse_model="org/sae")
    assert list(tmp_path.iterdir()) == []
    export_recipe(recipe(), sae, tmp_path / "a.pt", module="h.1")
    assert list(torch.load(tmp_path / "a.pt", weights_only=True)) == ["h.1"]


def test_the_folder_of_a_sparsify_release_is_the_modules_name(tmp_path, sae):
    sae.config.base_model_fingerprint = None
    sae.config.source = {"format": "sparsify", "repo": "org/published", "path": "all/h.1"}
    export_recipe(recipe(), sae, tmp_path / "a.pt")
    assert list(torch.load(tmp_path / "a.pt", weights_only=True)) == ["h.1"]


@pytest.mark.parametrize(("place", "block"), [(PLACE, 1), ("layers.15.resid_pre", 14)])
def test_the_control_vector_is_added_after_the_block(tmp_path, sae, place, block):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    export_recipe(recipe(hookpoint=place), sae, tmp_path / "steer.gguf")
    reader = gguf.GGUFReader(tmp_path / "steer.gguf")
    (tensor,) = reader.tensors
    assert tensor.name == f"direction.{block}"
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert reader.fields["general.architecture"].contents() == "controlvector"
    torch.testing.assert_close(torch.tensor(tensor.data), steering_vector(recipe(), sae))


@pytest.mark.parametrize(
    ("wanted", "name", "words"),
    [
        (recipe(Ablate(3)), "a.pt", "only Steer"),
        (recipe(Clamp(3, 1.0)), "a.gguf", "only Steer"),
        (recipe(Steer(3, positions="generated")), "a.pt", "positions=generated"),
        (recipe(Steer(3, rows=[0])), "a.pt", "rows="),
        (recipe(Steer(3, when=4)), "a.gguf", "when=4"),
        (recipe(Steer(3), hookpoint="layers.1.resid_pre"), "a.pt", "puts out"),
        (recipe(Steer(3), hookpoint="layers.0.resid_post"), "a.gguf", "from block 1 on"),
        (recipe(Steer(3), hookpoint="model.layers.3.mlp.resid_post"), "a.gguf", "block 1"),
        (recipe(Steer([3, 4])), "a.csv", "one feature"),
        (recipe(Steer(3)), "a.csv", "sparse_model="),
        (recipe(Steer(3)), "a.txt", "ends in"),
        (Recipe("org/sae", ()), "a.pt", "no edits"),
    ],
)
def test_what_is_no_fixed_vector_is_refused_with_the_reason(tmp_path, sae, wanted, name, words):
    with pytest.raises(EditError, match=words):
        export_recipe(wanted, sae, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_an_sae_without_an_address_wants_one():
    with pytest.raises(EditError, match="no address"):
        Recipe.of(SwitchSAEConfig(), Steer(1))
    known = SwitchSAEConfig(source={"folder": "there"}, hookpoint=PLACE)
    assert Recipe.of(known, Steer(1)) == Recipe("there", (Steer(1),), hookpoint=PLACE)
