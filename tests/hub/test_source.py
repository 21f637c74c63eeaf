"""A folder of checkpoints -> the folders of its SAEs."""

from hf_switch_sae.hub.source import open_source


def test_only_a_folder_called_checkpoints_is_cut_from_the_folder_of_an_sae(tmp_path):
    for file in (
        "checkpoints/final.safetensors",
        "layer/checkpoints/final.safetensors",
        "my_checkpoints/final.safetensors",
        "plain/final.safetensors",
    ):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert open_source(tmp_path).folders() == ["", "layer", "my_checkpoints", "plain"]
