"""From names to blocks: what is found, in which wrappers, and what is refused with which words."""

from collections import OrderedDict, namedtuple

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from helpers import zoo
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_switch_sae.errors import HookpointError
from hf_switch_sae.lm.hookpoints import (
    find_residual_blocks,
    resolve,
    unwrap,
)
from hf_switch_sae.lm.streams import (
    read_residual,
    read_residual_input,
    replace_residual,
    replace_residual_input,
)

torch.set_num_threads(1)
# peft 0.21 reads a property that transformers 5.23 has renamed; nothing of ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
Pair = namedtuple("Pair", ["attention", "stream"])


def llama() -> transformers.PreTrainedModel:
    return zoo.build("llama")[0]


@pytest.fixture(scope="module")
def lm():
    return llama()


class Add(nn.Module):
    """A block with a part of its own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x)


class Plain(nn.Module):
    """No model of transformers."""

    def __init__(self, **lists: int) -> None:
        super().__init__()
        for name, depth in lists.items():
            self.add_module(name, nn.ModuleList(Add() for _ in range(depth)))


# Finding the stack


@pytest.mark.parametrize(
    ("model_type", "path", "owner_path"),
    [
        ("llama", "model.layers", "model"),
        ("gpt2", "transformer.h", "transformer"),
        ("bert", "bert.encoder.layer", "bert"),
        ("t5", "decoder.block", "decoder"),
        ("bart", "model.decoder.layers", "model.decoder"),
        ("clip", "text_model.encoder.layers", "text_model"),
        ("qwen3_vl", "model.language_model.layers", "model.language_model"),
        ("gemma3", "model.language_model.layers", "model.language_model"),
        ("jamba", "model.layers", "model"),
        ("mamba", "backbone.layers", "backbone"),
        ("git", "git.encoder.layer", "git"),  # its vision tower is as recorded and as deep
        ("vit", "layers", ""),
        ("wav2vec2", "encoder.layers", ""),
    ],
)
def test_the_stack_that_decodes_is_the_default(model_type, path, owner_path):
    model = zoo.build(model_type)[0]
    blocks = find_residual_blocks(model)

    assert (blocks.path, blocks.owner_path) == (path, owner_path)
    assert blocks.owner is model.get_submodule(owner_path)
    assert blocks.decoding
    assert len(blocks) == len(blocks.blocks) == len(blocks.paths) == zoo.LAYERS
    assert all(
        model.get_submodule(p) is b for p, b in zip(blocks.paths, blocks.blocks, strict=True)
    )


@pytest.mark.parametrize(
    ("model_type", "at", "path"),
    [
        ("t5", "encoder.block", "encoder.block"),
        ("t5", "encoder.block.1.layer", "encoder.block.1.layer"),
        ("t5", "encoder.block.1.layer.0", "encoder.block"),
        ("clip", "vision_model", "vision_model.encoder.layers"),
        ("qwen3_vl", "model.visual.blocks", "model.visual.blocks"),
        ("qwen3_vl", "model.visual.blocks.1.mlp", "model.visual.blocks"),
        ("pvt", "encoder.block.0.0.attention", "encoder.block"),
    ],
)
def test_at_picks_another_stack_by_itself_or_what_is_in_or_around_it(model_type, at, path):
    blocks = find_residual_blocks(zoo.build(model_type)[0], at)

    assert blocks.path == path
    if not path.startswith("encoder.block.1") and model_type != "pvt":
        assert not blocks.decoding


def test_a_list_of_lists_is_one_stack_in_forward_order():
    blocks = find_residual_blocks(zoo.build("pvt")[0], "encoder.block")

    assert blocks.paths == (
        "encoder.block.0.0",
        "encoder.block.1.0",
        "encoder.block.2.0",
        "encoder.block.3.0",
    )


def test_experts_and_parts_of_blocks_are_not_stacks():
    model = zoo.build("switch_transformers")[0]

    assert find_residual_blocks(model).path == "decoder.block"
    assert len(find_residual_blocks(model)) == zoo.LAYERS


def test_a_module_outside_of_transformers_needs_only_a_list_of_blocks():
    blocks = find_residual_blocks(Plain(steps=3))

    assert (blocks.path, blocks.paths[2], blocks.owner_path) == ("steps", "steps.2", "")


def test_a_config_that_raises_at_a_field_does_not_stop_the_search(lm, monkeypatch):
    class Moody:
        model_type = "llama"

        def __getattr__(self, name):
            raise RuntimeError(f"{name} differs by layer")

    monkeypatch.setattr(lm, "config", Moody())
    monkeypatch.setattr(lm.model, "config", Moody())

    assert find_residual_blocks(lm).path == "model.layers"


@pytest.mark.parametrize("model_type", ["hrm_text", "glpn", "pvt"])
def test_a_tie_names_the_candidates_and_a_path_settles_it(model_type):
    model = zoo.build(model_type)[0]

    with pytest.raises(HookpointError, match=r"stacks of blocks of \w+ fit equally well") as caught:
        find_residual_blocks(model)
    assert "at=" in str(caught.value)
    assert find_residual_blocks(model, at=zoo.AT[model_type]).path == zoo.AT[model_type]


def test_both_loops_of_hrm_are_named():
    with pytest.raises(HookpointError, match=r"model\.L_module\.layers .*model\.H_module\.layers"):
        resolve(zoo.build("hrm_text")[0], 1)


@pytest.mark.parametrize(
    ("model_type", "at", "instead"),
    [
        ("xlm", "transformer.layer_norm2.1", r"transformer\.layer_norm2\.<i>"),
        ("flaubert", "layer_norm2.1", r"layer_norm2\.<i>"),
        ("squeezebert", "encoder.layers.1.output", r"encoder\.layers\.<i>\.output"),
    ],
)
def test_a_model_without_blocks_to_hook_is_refused_with_the_path_to_use(model_type, at, instead):
    model = zoo.build(model_type)[0]

    for refused in (find_residual_blocks, lambda m: resolve(m, "layers.1")):
        with pytest.raises(HookpointError, match=f"cannot be hooked: .*'{instead}'"):
            refused(model)
    assert resolve(model, at).module is model.get_submodule(at)


@pytest.mark.parametrize("call", [find_residual_blocks, resolve])
def test_a_block_that_never_fires_is_refused_by_its_path_too(call):
    with pytest.raises(HookpointError, match=r"a hook on a layer never fires"):
        call(zoo.build("squeezebert")[0], "encoder.layers.1")


def test_a_model_without_blocks_says_what_was_looked_for():
    with pytest.raises(
        HookpointError, match=r"no residual blocks in Linear: looked for a ModuleList"
    ):
        find_residual_blocks(nn.Linear(2, 2))


def test_a_list_that_looks_like_no_stack_is_taken_when_named():
    norms = find_residual_blocks(zoo.build("xlm")[0], "transformer.layer_norm2")

    assert [type(block) for block in norms.blocks] == [nn.LayerNorm] * zoo.LAYERS


def test_an_empty_list_is_no_stack():
    with pytest.raises(HookpointError, match="is an empty list"):
        find_residual_blocks(Plain(steps=2, none=0), "none")


def test_a_module_outside_of_every_stack_names_no_stack(lm):
    with pytest.raises(HookpointError, match=r"embed_tokens lies in no stack.*0 to 2"):
        find_residual_blocks(lm, "model.embed_tokens")


# Wrappers


def wrapped_in(kind, model):
    if kind == "peft":
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    if kind == "prompt tuning":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        return peft.get_peft_model(model, config)
    if kind == "compile":
        return torch.compile(model, backend="eager")
    if kind == "compiled peft":
        return torch.compile(wrapped_in("peft", model), backend="eager")
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "offload":
        return cpu_offload(model, execution_device="cpu")
    return nn.DataParallel(model)


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "kind",
    ["peft", "prompt tuning", "compile", "compiled peft", "DDP", "offload", "DataParallel"],
)
@pytest.mark.usefixtures("one_process")
def test_a_wrapper_changes_neither_blocks_nor_names(kind):
    model = llama()
    blocks = model.model.layers
    wrapped = wrapped_in(kind, model)
    prefix = next(name for name, m in wrapped.named_modules() if m is blocks).removesuffix("layers")

    assert unwrap(wrapped) is model
    assert find_residual_blocks(wrapped).path == "model.layers"
    for at in (
        1,
        "layers.1",
        "model.layers.1",
        f"{prefix}layers.1",
        f"{prefix}layers.1.resid_post",
    ):
        place = resolve(wrapped, at)
        assert place.module is blocks[1]
        assert (place.name, place.path) == ("layers.1.resid_post", "model.layers.1")
    assert find_residual_blocks(wrapped, f"{prefix}layers").path == "model.layers"


@pytest.mark.parametrize(
    "at",
    [
        "base_model.model.model.layers.2",
        "base_model.model.layers.2",
        "module.model.layers.2",
        "_orig_mod.base_model.model.model.layers.2",
        "model.layers.2._orig_mod",
    ],
)
def test_the_prefix_of_a_wrapper_that_is_gone_is_understood(lm, at):
    assert resolve(lm, at).name == "layers.2.resid_post"


def test_blocks_compiled_one_by_one_are_found_and_looked_into():
    model = llama()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")

    assert resolve(model, 1).module is model.model.layers[1]
    assert resolve(model, 1).name == "layers.1.resid_post"
    mlp = resolve(model, "model.layers.1.mlp")
    assert (mlp.module, mlp.layer) == (model.model.layers[1]._orig_mod.mlp, 1)


def test_a_model_inside_of_another_module_is_found(lm):
    outer = nn.Module()
    outer.lm, outer.value_head = lm, nn.Linear(4, 1)

    assert find_residual_blocks(outer).path == "lm.model.layers"
    assert find_residual_blocks(outer).decoding
    assert resolve(outer, "model.layers.0").name == "layers.0.resid_post"


# Names


@pytest.mark.parametrize(
    ("at", "name", "path", "layer"),
    [
        (2, "layers.2.resid_post", "model.layers.2", 2),
        ("2", "layers.2.resid_post", "model.layers.2", 2),
        ("layers.0", "layers.0.resid_post", "model.layers.0", 0),
        ("layers.1.resid_pre", "layers.1.resid_pre", "model.layers.1", 1),
        ("layers.1.resid_post", "layers.1.resid_post", "model.layers.1", 1),
        ("model.layers.1", "layers.1.resid_post", "model.layers.1", 1),
        ("model.layers.1.resid_pre", "layers.1.resid_pre", "model.layers.1", 1),
        ("model.layers.1.mlp", "model.layers.1.mlp.resid_post", "model.layers.1.mlp", 1),
        ("layers.1.mlp.resid_pre", "model.layers.1.mlp.resid_pre", "model.layers.1.mlp", 1),
        ("model.norm", "model.norm.resid_post", "model.norm", None),
        ("norm", "model.norm.resid_post", "model.norm", None),
    ],
)
def test_a_place_has_one_name_however_it_is_written(lm, at, name, path, layer):
    place = resolve(lm, at)

    assert (place.name, place.path, place.layer) == (name, path, layer)
    assert place.module is lm.get_submodule(path)
    assert place.site == name.rpartition(".")[2]
    assert (place.blocks is None) == (layer is None)
    assert resolve(lm, place.name) == place


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl", "llava"])
def test_a_path_of_the_text_model_alone_finds_it_in_a_multimodal_model(model_type):
    model = zoo.build(model_type)[0]

    assert resolve(model, "model.layers.1").path == "model.language_model.layers.1"
    assert resolve(model, "model.layers.1").name == "layers.1.resid_post"
    assert find_residual_blocks(model, "model.layers").path == "model.language_model.layers"


def test_a_stack_that_is_not_the_default_keeps_its_path_as_name():
    model = zoo.build("t5")[0]
    place = resolve(model, "encoder.block.1")

    assert (place.name, place.layer) == ("encoder.block.1.resid_post", 1)
    assert place.blocks.path == "encoder.block"
    assert not place.blocks.decoding


def test_layers_means_the_literal_list_where_the_default_stack_is_another():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    model.blocks = nn.ModuleList(Add() for _ in range(2))

    assert find_residual_blocks(model).path == "blocks"
    assert resolve(model, "layers.1").module is model.layers[1]
    place = resolve(model, 1)
    assert place.name == "blocks.1.resid_post"
    assert resolve(model, place.name) == place


@pytest.mark.parametrize("at", [3, "layers.3", "layers.3.resid_pre", -1, "layers.-1", "-1"])
def test_a_layer_outside_of_the_stack_is_answered_with_its_range(lm, at):
    number = str(at).replace("layers.", "").replace(".resid_pre", "")
    message = (
        f"^no block {number} in LlamaForCausalLM: model.layers has blocks 0 to 2. "
        "Layers count from 0 and the embedding is not one of them.$"
    )
    with pytest.raises(HookpointError, match=message):
        resolve(lm, at)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("layers.1.resid_mid", "no site 'resid_mid' .*resid_pre .*resid_post .*inside the block"),
        ("model.layers.1.resid_mid", "no site 'resid_mid' at model.layers.1"),
        ("model.layers.9", "no module 'model.layers.9'.*blocks 0 to 2"),
        ("model.layerz.1", "no module .*close to it: model.layers.1.*blocks 0 to 2"),
        ("transformer.h.1", "no module 'transformer.h.1' in LlamaForCausalLM"),
        ("q_proj", "several modules 'q_proj' .*model.layers.0.self_attn.q_proj"),
        ("model.layers", "is a ModuleList, which is never called.*model.layers.0"),
        ("", "no module ''"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_what_is(lm, at, message):
    with pytest.raises(HookpointError, match=message):
        resolve(lm, at)


def test_a_path_from_the_list_on_is_never_loosened():
    model = zoo.build("mixtral")[0]

    with pytest.raises(HookpointError, match="no module"):
        resolve(model, "model.layers.1.o_proj")


# What a block gets and gives

X, NEW = torch.zeros(2, 3), torch.ones(2, 3)
CACHE = object()


@pytest.mark.parametrize(
    "value",
    [
        X,
        (X,),
        (X, None, CACHE),
        (None, X, torch.tensor(5)),
        [X, CACHE],
        ((X, 1), torch.tensor(5)),
        Pair(X, torch.tensor(5)),
        {"feature_map": X, "other": CACHE},
        OrderedDict(a=None, b=[X]),
        BaseModelOutputWithPast(last_hidden_state=X, past_key_values=CACHE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_first_tensor_is_read_and_replaced_and_all_else_stays(value):
    replaced = replace_residual(value, NEW)

    assert read_residual(value) is X
    assert read_residual(replaced) is NEW
    assert type(replaced) is type(value)
    assert shape_of(replaced) == shape_of(value)


def shape_of(value):
    """The structure with the two tensors made equal; all other items by identity."""
    if value is X or value is NEW:
        return "here"
    if isinstance(value, dict):
        return {name: shape_of(item) for name, item in value.items()}
    return [shape_of(x) for x in value] if isinstance(value, list | tuple) else id(value)


@pytest.mark.parametrize("value", [None, (), (None, 3), {"a": None}, "x"])
def test_an_output_without_a_tensor_is_refused(value):
    for call in (read_residual, lambda v: replace_residual(v, NEW)):
        with pytest.raises(HookpointError, match="no tensor in the block's output"):
            call(value)


def test_a_replaced_model_output_agrees_by_attribute_and_by_key():
    replaced = replace_residual(BaseModelOutputWithPast(last_hidden_state=X), NEW)

    assert replaced.last_hidden_state is replaced["last_hidden_state"] is replaced[0] is NEW


IDS = torch.arange(3)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, IDS), {"attention_mask": torch.zeros(1)}),
        ((None, IDS, X), {}),
        ((X, torch.zeros(1)), {"hidden_states": torch.zeros(2)}),
        ((), {"mask": torch.zeros(1), "hidden_states": X}),
        ((IDS,), {"flag": True, "x": X}),
    ],
)
def test_the_input_stream_is_read_and_replaced_and_all_else_stays(args, kwargs):
    new_args, new_kwargs = replace_residual_input(args, kwargs, NEW)

    assert read_residual_input(args, kwargs) is X
    assert read_residual_input(new_args, new_kwargs) is NEW
    assert shape_of(new_args) == shape_of(args)
    assert shape_of(new_kwargs) == shape_of(kwargs)
    assert list(new_kwargs) == list(kwargs)


def test_arguments_without_a_floating_tensor_are_refused():
    with pytest.raises(
        HookpointError, match=r"no floating tensor .*\(Tensor, input_ids\).*resid_post"
    ):
        read_residual_input((IDS,), {"input_ids": IDS})
