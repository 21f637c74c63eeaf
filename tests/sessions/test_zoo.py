"""The laws of a hook on the residual stream, over every model type of transformers we can build.

The core types run always, the rest with `-m slow`. A type that breaks a law for a reason of its own
is in the table of that law with the reason, and a reason that no longer holds fails too.
"""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import zoo
from torch import Tensor, nn

from hf_switch_sae import HookpointError, Steer, SwitchSAE, SwitchSAEConfig, attach
from hf_switch_sae.lm.hookpoints import Hookpoint, find_residual_blocks, resolve
from hf_switch_sae.lm.hooks import hook_residual
from hf_switch_sae.lm.residuals import _LOOPS, residuals

torch.set_num_threads(1)
# LASR convolves with padding="same" and an even kernel, which torch warns about; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")

# (c) an added vector changes nothing
UNMOVED: dict[str, str] = {
    "uvdoc_backbone": "its blocks run side by side and only the last one's output is returned",
    "slanext": "its neck with random weights passes 1e-10 of an edit, which the head rounds away",
}
# (e) hidden_states is another view of the stream
VIEWS: dict[str, str] = {
    "falcon_mamba": "no entry for the embedding: hidden_states[i] is the output of layer i",
    "mamba": "no entry for the embedding: hidden_states[i] is the output of layer i",
    "mamba2": "no entry for the embedding: hidden_states[i] is the output of layer i",
    "rwkv": "no entry for the embedding: hidden_states[i] is the output of layer i",
    "fsmt": "the stream is [seq, batch, d] inside",
    "xlnet": "the stream is [seq, batch, d] inside",
    "squeezebert": "the stream is [batch, d, seq] inside",
    "cpmant": "hidden_states leaves out the prompt slots before the text",
    "longformer": "hidden_states leaves out the padding to whole attention windows",
    "maskformer-swin": "hidden_states nests one tuple a stage, before the patches are merged",
    "prophetnet": "hidden_states leaves out the n-gram streams",
    "blip": "hidden_states of the output are those of the vision tower",
    "pvt": "no entry for the embedding: hidden_states[i] is the output of stage i",
}
# the hook fires more than once in a forward
REPEATED: dict[str, str] = {
    "albert": "one block is all layers",
    "hrm_text": "two stacks run in nested loops",
}


@dataclass
class Case:
    entry: zoo.Entry
    model: nn.Module
    inputs: dict[str, Any]
    place: Hookpoint

    def at(self, site: str) -> str:
        return f"{self.place.path}.{site}"

    def run(self, **options: Any) -> Any:
        torch.manual_seed(2)  # some models draw numbers in eval mode too
        with torch.no_grad():
            return self.model(**self.inputs, **options)


def params() -> list[Any]:
    slow = pytest.mark.slow
    return [
        pytest.param(entry, id=entry.model_type, marks=() if entry.core else slow)
        for entry in zoo.ENTRIES
    ]


@pytest.fixture(scope="module", params=params())
def case(request: pytest.FixtureRequest) -> Case:
    entry = request.param
    model, inputs = entry.build()
    return Case(entry, model, inputs, middle(model, entry))


def middle(model: nn.Module, entry: zoo.Entry) -> Hookpoint:
    if entry.at is not None and type(model.get_submodule(entry.at)) is not nn.ModuleList:
        return resolve(model, entry.at)
    blocks = find_residual_blocks(model, at=entry.at)
    return resolve(model, blocks.paths[len(blocks) // 2])


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def same(one: Any, other: Any) -> bool:
    left, right = tensors(one), tensors(other)
    assert left
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(bits(a), bits(b)) for a, b in pairs
    )


def bits(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor) if tensor.is_floating_point() else tensor


def hooks(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_the_hook_fires_once_a_forward_and_sees_a_stream(case):
    seen = []
    with hook_residual(case.model, case.at("resid_post"), seen.append):
        case.run()

    assert (len(seen) == 1) == (case.entry.model_type not in REPEATED)
    assert seen
    assert all(x.is_floating_point() and x.ndim >= 2 and x.numel() > 1 for x in seen)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("returned", ["None", "itself"])
def test_a_hook_that_changes_nothing_leaves_the_output_bit_identical(case, site, returned):
    before = case.run()
    seen = []

    def probe(resid: Tensor) -> Tensor | None:
        seen.append(resid)
        return None if returned == "None" else resid

    with hook_residual(case.model, case.at(site), probe):
        hooked = case.run()

    assert seen
    assert same(before, hooked)


def test_an_added_vector_changes_the_output(case):
    before = case.run()
    with hook_residual(case.model, case.at("resid_post"), lambda x: x + torch.randn_like(x)):
        changed = case.run()

    assert same(before, changed) == (case.entry.model_type in UNMOVED)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_a_forward_that_stops_at_the_place_reads_the_same_stream(case, site):
    whole: list[Tensor] = []
    with hook_residual(case.model, case.at(site), lambda x: whole.append(x.clone())):
        case.run()
    counts = hooks(case.model)

    with torch.no_grad(), residuals(case.model, [case.at(site)]) as read:
        found = []
        for _ in range(2):  # the first may be run to its end, to count
            torch.manual_seed(2)
            found += read(**case.inputs).values()

    assert same(found, [whole[-1], whole[-1]])
    assert hooks(case.model) == counts


def test_models_that_loop_over_their_blocks_are_known_to(case):
    assert (case.entry.model_type in _LOOPS) == (case.entry.model_type in REPEATED)


def test_removing_the_hook_leaves_no_trace(case):
    before, counts = case.run(), hooks(case.model)
    handle = hook_residual(case.model, case.at("resid_post"), lambda x: x + 1)
    case.run()
    assert hooks(case.model) != counts

    handle.remove()

    assert hooks(case.model) == counts
    assert same(before, case.run())


def test_the_residual_is_the_hidden_state_of_the_next_layer(case):
    blocks, layer = case.place.blocks, case.place.layer
    seen = []
    try:
        with hook_residual(case.model, case.at("resid_post"), seen.append):
            out = case.run(output_hidden_states=True)
    except TypeError as error:
        if "output_hidden_states" not in str(error):
            raise
        pytest.skip("its forward does not know output_hidden_states")
    states = getattr(out, "decoder_hidden_states", None) or getattr(out, "hidden_states", None)
    if not states or blocks is None or len(states) != len(blocks) + 1 or layer + 1 >= len(blocks):
        pytest.skip("hidden_states are not those of this stack")

    assert same(seen[0], states[layer + 1]) == (case.entry.model_type not in VIEWS)


def test_generate_with_an_identity_hook_fires_each_step_and_gives_the_same_tokens(case):
    if not case.entry.generates or not case.model.can_generate():
        pytest.skip("this class does not generate")
    inputs = {name: x for name, x in case.inputs.items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    if case.model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 1
    options = {**inputs, **options, **zoo.GENERATE.get(case.entry.model_type, {})}
    options = {name: value for name, value in options.items() if value is not None}
    torch.manual_seed(2)
    before = case.model.generate(**options)
    seen = []

    with hook_residual(case.model, case.at("resid_post"), seen.append):
        torch.manual_seed(2)
        hooked = case.model.generate(**options)

    assert same(before, hooked)
    assert len(seen) >= 3


def test_the_name_of_a_hookpoint_resolves_to_itself(case):
    again = resolve(case.model, case.place.name)

    assert (again.path, again.site) == (case.place.path, case.place.site)
    assert again.module is case.place.module


def test_the_core_has_sixty_types_and_every_family():
    core = [entry for entry in zoo.ENTRIES if entry.core]

    assert len(core) >= 60
    assert {entry.family for entry in core} == set(zoo.CORE)
    assert {entry.family for entry in zoo.ENTRIES} <= set(zoo.CORE)
    assert {e.model_type for e in core} == {t for types in zoo.CORE.values() for t in types.split()}


def test_every_type_that_is_not_built_has_a_reason():
    assert all(re.search(r"\w+ \w+", reason) for reason in zoo.CANNOT.values())


def test_every_type_with_a_model_is_built_or_excused_and_the_rest_are_parts_of_configs():
    built, excused = {entry.model_type for entry in zoo.ENTRIES}, set(zoo.CANNOT)
    rest = set(zoo.CONFIG_MAPPING) - built - excused

    assert built | excused == set(zoo.OWN_MODEL)
    assert not built & excused
    # No auto class builds these: towers, decoders, codecs and adapters inside of other configs.
    mappings = [getattr(zoo.auto, name) for name in zoo._AUTO_MAPPINGS]
    assert not [kind for kind in rest if any(kind in mapping for mapping in mappings)]


def width_of(stream: Tensor) -> int:
    """Of stages [batch, d, side, side] the second dimension, else the last."""
    return (
        stream.shape[1]
        if stream.ndim == 4 and stream.shape[2] == stream.shape[3]
        else stream.shape[-1]
    )


def test_an_attached_sae_reads_without_a_trace_and_steers_and_leaves(case):
    before, names, hooked = case.run(), set(vars(case.model)), hooks(case.model)
    seen: list[Tensor] = []
    with hook_residual(case.model, case.at("resid_post"), seen.append):
        case.run()
    config = SwitchSAEConfig(hidden_size=width_of(seen[0]), num_features=16, num_experts=4, k=2)
    sae = SwitchSAE(config).eval()
    if seen[0].ndim == 4 and width_of(seen[0]) == seen[0].shape[1] == seen[0].shape[-1]:
        # as wide as it is deep: nothing tells which dimension the features are in
        with (
            attach(case.model, sae, at=case.at("resid_post")),
            pytest.raises(HookpointError, match="can't be told"),
        ):
            case.run()
        return

    with attach(case.model, sae, at=case.at("resid_post")) as session:
        read = case.run()
        features = session.features
        session.edit(Steer([0, 5, 10], 10.0, unit="raw"))
        steered = case.run()
    after = case.run()

    assert same(before, read)
    assert features.acts.isfinite().all()
    assert same(before, after)
    assert (not same(before, steered)) == (case.entry.model_type not in UNMOVED)
    assert hooks(case.model) == hooked
    assert set(vars(case.model)) == names
