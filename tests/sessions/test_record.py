"""Recording: what is in the store is what the model and the SAE say, however it came there."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from helpers import stores, tiny
from helpers.texts import TEXTS

from hf_switch_sae import (
    AttachError,
    BaseModelError,
    FeatureStore,
    HookpointError,
    Steer,
    StoreError,
    TextError,
    record,
)

DOCUMENTS = [x.tolist() for x in tiny.prompts(9, 40, 1, 3, 26, 0, 12, 5, 33, 2, 2, 18)]
OPTIONS = {"context": 16, "shard_tokens": 40, "batch_tokens": 64, "progress": False}


def reference(lm, sae, documents, at=2, context=16, prefix=()):
    """Tokens one window at a time, by plain forwards: {(document, position): (token, features)}."""
    found = {}
    with torch.no_grad(), sae.attach(lm, at=at, allow_mismatch=True) as session:
        for number, tokens in enumerate(documents):
            for start in range(0, len(tokens), context):
                window = tokens[start : start + context]
                lm(input_ids=torch.tensor([[*prefix, *window]]))
                for i, token in enumerate(window):
                    features = session.features[0, len(prefix) + i]
                    found[number, start + i] = (token, features)
    return found


def check_rows(store, want):
    rows = stores.all_rows(store)
    assert list(zip(rows.document.tolist(), rows.position.tolist(), strict=True)) == list(want)
    assert rows.token.tolist() == [token for token, _ in want.values()]
    dense = rows.features(store.num_features).to_dense().float()
    plain = torch.stack([features.to_dense() for _, features in want.values()])
    # float16 rounds by 2**-11; padding to another batch moves the last bits of a float32
    torch.testing.assert_close(dense, plain, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba", "bert", "xlnet"])
def test_the_store_holds_every_token_with_the_features_of_a_plain_forward(tmp_path, kind):
    lm = tiny.ALL[kind]()
    sae = tiny.sae_for(lm)
    # XLNet's relative positions depend on padding, so there each row is alone
    options = {**OPTIONS, "batch_tokens": 1} if kind == "xlnet" else OPTIONS

    store = record(lm, sae, DOCUMENTS, tmp_path / "s", at=2, **options)

    check_rows(store, reference(lm, sae, DOCUMENTS))
    assert len(store.shards) > 3


def test_ids_are_exactly_the_models_and_acts_its_float16_where_nothing_is_padded(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    documents = [x.tolist() for x in tiny.prompts(16, 16, 16, 16)]

    store = record(lm, sae, documents, tmp_path / "s", at=2, **OPTIONS)

    with torch.no_grad(), sae.attach(lm, at=2) as session:
        lm(input_ids=torch.tensor(documents[:3]))
        first = session.features.reshape(-1).topk(4)
        lm(input_ids=torch.tensor(documents[3:]))
        want = first.cat([first, session.features.reshape(-1).topk(4)])
    found = stores.all_rows(store).features(64, k=4)
    assert torch.equal(found.acts, want.acts.half())
    assert torch.equal(found.ids[found.acts > 0], want.ids[want.acts > 0])


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts_per_token": 2},
        {"num_experts": 1},
        {"activation": "relu", "k": None, "num_experts": 1},
    ],
    ids=["two experts", "plain", "relu"],
)
def test_saes_of_other_kinds_are_recorded_too(tmp_path, config):
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **config)
    store = record(lm, sae, DOCUMENTS, tmp_path / "s", at=2, **OPTIONS)
    check_rows(store, reference(lm, sae, DOCUMENTS))


def test_a_prefix_is_seen_by_the_model_and_not_recorded(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    store = record(lm, sae, DOCUMENTS, tmp_path / "s", at=2, prefix=[7, 8], **OPTIONS)
    check_rows(store, reference(lm, sae, DOCUMENTS, prefix=(7, 8)))


def test_several_hookpoints_are_recorded_in_one_pass_to_stores_of_their_own(tmp_path):
    lm = tiny.llama()
    saes = {"layers.1.resid_post": tiny.sae_for(lm, 1), "layers.3.resid_pre": tiny.sae_for(lm, 3)}
    calls = []
    handle = lm.model.layers[0].register_forward_hook(lambda *_: calls.append(1))

    found = record(lm, saes, DOCUMENTS, tmp_path / "s", **OPTIONS)

    handle.remove()
    batches = len(calls)
    assert list(found) == list(saes)
    for name, store in found.items():
        assert store.path == tmp_path / "s" / name
        check_rows(store, reference(lm, saes[name], DOCUMENTS, at=name))
    shutil.rmtree(tmp_path)
    handle = lm.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    record(lm, saes["layers.1.resid_post"], DOCUMENTS, tmp_path / "s", at=1, **OPTIONS)
    handle.remove()
    assert len(calls) == 2 * batches


def test_a_mapping_of_one_sae_gives_a_mapping_and_a_folder_of_its_name(tmp_path):
    lm = tiny.llama()
    sae, name = tiny.sae_for(lm, 2), "layers.2.resid_post"

    found = record(lm, {2: sae}, DOCUMENTS, tmp_path / "s", **OPTIONS)

    assert list(found) == [name]
    assert found[name].path == tmp_path / "s" / name
    check_rows(found[name], reference(lm, sae, DOCUMENTS))


def test_a_shard_that_only_one_of_two_stores_has_is_made_again_for_the_other(tmp_path):
    lm = tiny.llama()
    saes = {1: tiny.sae_for(lm, 1), 2: tiny.sae_for(lm, 2)}
    found = record(lm, saes, DOCUMENTS, tmp_path / "s", **OPTIONS)
    before = stores.contents(tmp_path)
    found["layers.2.resid_post"].shards[1].path.unlink()

    record(lm, saes, DOCUMENTS, tmp_path / "s", **OPTIONS)

    assert stores.contents(tmp_path) == before


def test_killed_between_two_stores_a_larger_limit_goes_on_with_both(tmp_path, monkeypatch):
    lm = tiny.llama()
    saes = {1: tiny.sae_for(lm, 1), 2: tiny.sae_for(lm, 2)}
    options = {**OPTIONS, "shard_tokens": 1000}
    real = FeatureStore.append

    def killed(store, *args):
        if store.path.name == "layers.2.resid_post":
            raise KeyboardInterrupt
        return real(store, *args)

    monkeypatch.setattr(FeatureStore, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        record(lm, saes, DOCUMENTS, tmp_path / "s", max_documents=6, **options)
    monkeypatch.setattr(FeatureStore, "append", real)
    few = sum(map(len, DOCUMENTS[:6]))

    # the first store's tokens count once: so many, and no more than the limit
    found = record(lm, saes, DOCUMENTS, tmp_path / "s", max_tokens=few, **options)
    assert [store.num_tokens for store in found.values()] == [few, few]
    found = record(lm, saes, DOCUMENTS, tmp_path / "s", **options)

    for name, store in found.items():
        assert [(each.first, each.last) for each in store.shards] == [(0, 5), (6, 11)]
        check_rows(store, reference(lm, saes[int(name[7])], DOCUMENTS, at=name))


def test_what_one_of_two_stores_holds_counts_once_against_the_limits(tmp_path):
    lm = tiny.llama()
    saes = {1: tiny.sae_for(lm, 1), 2: tiny.sae_for(lm, 2)}
    whole = record(lm, saes, DOCUMENTS, tmp_path / "s", **OPTIONS)
    sizes = sum(shard.size for store in whole.values() for shard in store.shards)
    before = stores.contents(tmp_path)
    for name in whole:
        for limit in ({"max_tokens": 151}, {"max_bytes": sizes}):
            for shard in whole[name].shards[1:]:
                shard.path.unlink()
            record(lm, saes, DOCUMENTS, tmp_path / "s", **limit, **OPTIONS)
            assert stores.contents(tmp_path) == before


def test_edits_of_an_open_session_do_not_act_on_what_is_recorded(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    record(lm, sae, DOCUMENTS, tmp_path / "plain", at=2, **OPTIONS)

    with sae.attach(lm, at=1) as session, session.record(tmp_path / "live") as live:
        session.edit(Steer(5, 30.0, unit="raw"))
        record(lm, sae, DOCUMENTS, tmp_path / "edited", at=2, **OPTIONS)
        lm(input_ids=torch.tensor([DOCUMENTS[0]]))

    assert stores.contents(tmp_path / "edited") == stores.contents(tmp_path / "plain")
    assert live.num_tokens == len(DOCUMENTS[0])


def test_the_commit_an_sae_was_loaded_at_is_noted_unless_it_is_of_another_repository(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    sae.config.source = {"repo": "org/sae", "revision": "0123abcd"}
    found = {}
    for name, options in [
        ("org/sae", {}),
        ("org/copy", {}),
        ("org/sae", {"sae_revision": "4567"}),
    ]:
        sae.name_or_path = name
        folder = tmp_path / str(len(found))
        store = record(lm, sae, DOCUMENTS[:1], folder, at=2, **options, **OPTIONS)
        found[folder] = store.provenance.sae["revision"]
    assert list(found.values()) == ["0123abcd", None, "4567"]


def test_layers_after_the_last_place_and_the_head_are_never_computed(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)

    def explode(*_):
        raise AssertionError("computed for nothing")

    for path in ("model.layers.3", "model.norm", "lm_head"):
        lm.get_submodule(path).register_forward_pre_hook(explode)
    assert record(lm, sae, DOCUMENTS, tmp_path / "s", at=2, **OPTIONS).num_tokens == 151


# --- text ---------------------------------------------------------------------------------------


def test_texts_are_tokenized_and_special_tokens_kept_or_left_out(tmp_path, tokenizer):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    options = {"tokenizer": tokenizer, "at": 2, **OPTIONS}

    kept = record(lm, sae, TEXTS, tmp_path / "kept", **options)
    left_out = record(lm, sae, TEXTS, tmp_path / "out", skip_special_tokens=True, **options)
    without = record(lm, sae, TEXTS, tmp_path / "no", add_special_tokens=False, **options)

    tokens = [tokenizer(each)["input_ids"] for each in TEXTS]
    check_rows(kept, reference(lm, sae, tokens))
    want = {place: v for place, v in reference(lm, sae, tokens).items() if place[1] > 0}
    check_rows(left_out, want)
    check_rows(without, reference(lm, sae, [each[1:] for each in tokens]))
    kept.index()
    kept.tokenizer = tokenizer
    assert kept.features_of("ship", 3) == kept.features_of([3], 3)
    assert left_out.provenance.differences(kept.provenance) == [
        "text skip_special_tokens: True there, False now"
    ]
    with pytest.raises(TextError, match="tokenizer is needed"):
        record(lm, sae, TEXTS, tmp_path / "x", at=2, **OPTIONS)


# --- going on -----------------------------------------------------------------------------------


def test_recording_again_computes_nothing_and_changes_nothing(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    record(lm, sae, DOCUMENTS, tmp_path / "s", at=2, **OPTIONS)
    before = stores.contents(tmp_path)

    def explode(*_):
        raise AssertionError("computed again")

    handle = lm.model.layers[0].register_forward_pre_hook(explode)
    record(lm, sae, DOCUMENTS, tmp_path / "s", at=2, **OPTIONS)
    handle.remove()

    assert stores.contents(tmp_path) == before


def test_larger_limits_go_on_where_smaller_ones_ended(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    want = reference(lm, sae, DOCUMENTS)
    for limit in (1, 2, 5, 9, None):
        store = record(lm, sae, DOCUMENTS, tmp_path / "s", at=2, max_documents=limit, **OPTIONS)
        held = {place: v for place, v in want.items() if limit is None or place[0] < limit}
        check_rows(store, held)


def test_token_and_byte_budgets_stop_at_a_shard(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    options = {"at": 2, **OPTIONS}
    whole = record(lm, sae, DOCUMENTS, tmp_path / "whole", **options)
    sizes = [shard.size for shard in whole.shards]

    few = record(lm, sae, DOCUMENTS, tmp_path / "few", max_tokens=60, **options)
    small = record(lm, sae, DOCUMENTS, tmp_path / "s", max_bytes=sum(sizes[:2]), **options)
    nothing = record(lm, sae, DOCUMENTS, tmp_path / "n", max_bytes=100, **options)

    assert 60 <= few.num_tokens < 60 + 50
    assert [shard.size for shard in small.shards] == sizes[:2]
    assert nothing.num_tokens == 0
    for path in ("few", "s", "n"):
        again = record(lm, sae, DOCUMENTS, tmp_path / path, **options)
        assert stores.contents(again.path) == stores.contents(whole.path)


def test_a_damaged_shard_that_was_deleted_is_recorded_anew_to_the_same_bytes(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    store = record(lm, sae, DOCUMENTS, tmp_path / "s", at=2, **OPTIONS)
    before = stores.contents(tmp_path)
    store.shards[1].path.unlink()

    record(lm, sae, DOCUMENTS, tmp_path / "s", at=2, **OPTIONS)

    assert stores.contents(tmp_path) == before


def test_another_sae_or_other_settings_are_refused_and_nothing_is_overwritten(tmp_path):
    lm = tiny.llama()
    record(lm, tiny.sae_for(lm), DOCUMENTS, tmp_path / "s", at=2, **OPTIONS)
    before = stores.contents(tmp_path)
    sae = tiny.sae_for(lm)

    for changed, options, says in [
        (tiny.sae_for(lm, seed=5), {}, "sae weights"),
        (sae, {"context": 15}, "text context: 16 there, 15 now"),
        (sae, {"at": 1}, "hookpoint"),
        (sae, {"shard_tokens": 41}, "text shard_tokens"),
    ]:
        with pytest.raises(StoreError, match=says):
            record(lm, changed, DOCUMENTS, tmp_path / "s", **{"at": 2, **OPTIONS, **options})
    with pytest.raises(StoreError, match="dataset sha256"):
        record(lm, sae, DOCUMENTS[:3], tmp_path / "s", at=2, **OPTIONS)
    other = tiny.llama(seed=3)
    with pytest.raises(StoreError, match="lm fingerprint"):
        record(other, sae, DOCUMENTS, tmp_path / "s", at=2, allow_mismatch=True, **OPTIONS)
    assert stores.contents(tmp_path) == before


def test_what_can_not_be_recorded_is_an_error_before_a_store_is_made(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)

    def attempt(**changes):
        given = {"lm": lm, "saes": sae, "dataset": DOCUMENTS, "at": 2, **OPTIONS, **changes}
        record(given.pop("lm"), given.pop("saes"), given.pop("dataset"), tmp_path / "s", **given)

    with pytest.raises(TextError, match="256 positions"):
        attempt(context=300)
    with pytest.raises(TextError, match="batch_tokens=0"):
        attempt(batch_tokens=0)
    with pytest.raises(HookpointError):
        attempt(at=9)
    with pytest.raises(BaseModelError):
        attempt(lm=tiny.llama(seed=3))
    with pytest.raises(AttachError, match=r"lm\.eval\(\)"):
        attempt(lm=tiny.llama().train())
    assert not (tmp_path / "s").exists()


def test_an_error_on_the_way_leaves_the_model_and_the_finished_shards_as_they_are(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    before = tiny.traces(lm)
    bad = [*DOCUMENTS, [tiny.VOCAB + 1] * 5]

    with pytest.raises(IndexError):
        record(lm, sae, bad, tmp_path / "s", at=2, **OPTIONS)

    assert tiny.traces(lm) == before
    store = FeatureStore(tmp_path / "s")
    assert len(store.shards) > 2
    store.verify()


# --- killed -------------------------------------------------------------------------------------


def record_all(path, started):
    torch.set_num_threads(1)
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    started.set()
    record(lm, sae, DOCUMENTS * 12, path, at=2, **OPTIONS)


def test_killed_20_times_while_recording_it_goes_on_to_the_very_same_store(tmp_path):
    started = stores.forks().Event()
    process = stores.forks().Process(target=record_all, args=(tmp_path / "whole", started))
    process.start()
    assert started.wait(60)
    begin = time.monotonic()
    process.join()
    within = 0.4 * (time.monotonic() - begin)
    started.clear()
    want = stores.contents(tmp_path / "whole")
    assert len(want) > 30

    def after_each():
        if (tmp_path / "s" / "store.json").exists():
            FeatureStore(tmp_path / "s").verify()
            found = stores.contents(tmp_path / "s")
            assert found.items() <= want.items()

    kills = stores.kill_at_random(
        record_all,
        (tmp_path / "s", started),
        within,
        20,
        after_each,
        lambda: shutil.rmtree(tmp_path / "s"),
    )

    assert kills == 20
    assert stores.contents(tmp_path / "s") == want
    assert not list((tmp_path / "s").rglob(".tmp-*"))


# --- several processes --------------------------------------------------------------------------

RANK = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/sessions"]
import test_record, torch
from helpers import tiny
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
lm = tiny.llama()
ddp = torch.nn.parallel.DistributedDataParallel(lm)
from hf_switch_sae import record
record(ddp, tiny.sae_for(lm), test_record.DOCUMENTS * 3, sys.argv[2], at=2, **test_record.OPTIONS)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_ranks_make_the_same_store_as_one(tmp_path):
    lm = tiny.llama()
    one = record(lm, tiny.sae_for(lm), DOCUMENTS * 3, tmp_path / "one", at=2, **OPTIONS)
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    with __import__("socket").socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, Path(__file__).parents[1], tmp_path / "two"],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]

    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert stores.contents(tmp_path / "two") == stores.contents(one.path)


def test_each_process_of_a_launcher_takes_its_share_of_the_shards(tmp_path, monkeypatch):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    whole = record(lm, sae, DOCUMENTS, tmp_path / "one", at=2, **OPTIONS)
    monkeypatch.setenv("WORLD_SIZE", "3")
    firsts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        before = {shard.first for shard in whole.shards if rank > 0} and set(firsts)
        store = record(lm, sae, DOCUMENTS, tmp_path / "three", at=2, **OPTIONS)
        new = [shard.first for shard in store.shards if shard.first not in before]
        assert new == [shard.first for shard in whole.shards][rank::3]
        firsts += new

    assert stores.contents(tmp_path / "three") == stores.contents(tmp_path / "one")


# --- memory -------------------------------------------------------------------------------------

PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from helpers import tiny
import torch
from hf_switch_sae import record
torch.set_num_threads(1)
lm = tiny.llama()
sae = tiny.sae_for(lm)
documents = [[5 + i % 90] * 100 for i in range(1500)]
peaks = []
for limit in (150, 1500):
    record(
        lm, sae, documents, sys.argv[2], at=2, context=100, shard_tokens=2000, batch_tokens=1000,
        max_documents=limit,
    )
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print((peaks[1] - peaks[0]) // 1024)
"""


def test_recording_ten_times_as_much_takes_no_more_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, Path(__file__).parents[1], tmp_path / "s"],
        capture_output=True,
        text=True,
        check=True,
    )
    # all 135 000 further tokens with their features are 15 MB, as tensors 100
    assert int(done.stdout) < 12
    assert FeatureStore(tmp_path / "s").num_tokens == 150_000


# --- sessions -----------------------------------------------------------------------------------


def whole_texts(lm, sae, sequences):
    """Features of each sequence, unpadded and without its last token, by one plain forward."""
    return reference(lm, sae, [sequence[:-1].tolist() for sequence in sequences], context=999)


def test_generate_is_recorded_token_by_token_as_if_it_were_one_forward(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    prompts = tiny.prompts(5, 3, 7)
    inputs = tiny.padded(prompts)

    with sae.attach(lm, at=2) as session, session.record(tmp_path / "s") as store:
        session.edit(Steer(5, 3.0, unit="raw"))  # features are those before edits, of what ran
        session.edit()
        out = lm.generate(**inputs, max_new_tokens=6, do_sample=False)

    sequences = [row[7 - len(prompt) :] for row, prompt in zip(out, prompts, strict=True)]
    check_rows(store, whole_texts(lm, sae, sequences))
    assert session.lm is lm
    assert tiny.traces(lm) == tiny.traces(tiny.llama())


def test_sampled_return_sequences_are_documents_of_their_own(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    inputs = tiny.padded(tiny.prompts(5))
    with sae.attach(lm, at=2) as session, session.record(tmp_path / "s") as store:
        out = lm.generate(**inputs, max_new_tokens=6, do_sample=True, num_return_sequences=3)
    check_rows(store, whole_texts(lm, sae, list(out)))


def test_rejected_drafts_leave_no_rows(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    inputs = tiny.padded([torch.tensor([5, 6, 7, 8] * 4)])
    with sae.attach(lm, at=2) as session, session.record(tmp_path / "s") as store:
        out = lm.generate(
            **inputs, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3,
            use_cache=True,
        )  # fmt: skip
    rows = stores.all_rows(store)
    count = len(out[0]) - 1
    assert rows.position.tolist()[:count] == list(range(count))
    assert rows.token.tolist()[:count] == out[0][:-1].tolist()
    assert len(rows) <= count + 3  # drafts after the end may be the last that was seen


def test_padding_after_the_end_of_a_text_is_left_out(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    inputs = tiny.padded(tiny.prompts(5, 5))
    plain = lm.generate(**inputs, max_new_tokens=8, do_sample=False)
    # the token that row 0 says first and row 1 says later or never ends texts
    eos = int(plain[0, 6])
    lm.generation_config.eos_token_id = eos
    with sae.attach(lm, at=2) as session, session.record(tmp_path / "s") as store:
        out = lm.generate(**inputs, max_new_tokens=8, do_sample=False)
    lengths = [
        int((row[5:] == eos).nonzero()[0]) + 6 if (row[5:] == eos).any() else len(row) - 1
        for row in out
    ]
    rows = stores.all_rows(store)
    assert np.bincount(rows.document).tolist() == lengths
    assert lengths[0] < out.shape[1] - 1


def test_plain_forwards_are_documents_and_a_cache_goes_on_with_one(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    text = tiny.prompts(10)[0]
    with (
        torch.no_grad(),
        sae.attach(lm, at=2) as session,
        session.record(tmp_path / "s", shard_tokens=4) as store,
    ):
        lm(input_ids=text[None])
        session.preflight({"input_ids": text[None]})  # a look, not a text
        cache = lm(input_ids=text[None, :6], use_cache=True).past_key_values
        lm(input_ids=text[None, 6:], past_key_values=cache)
        lm(**tiny.padded([text, text[:4]], side="right"))

    ids = text.tolist()
    check_rows(store, reference(lm, sae, [ids, ids, ids, ids[:4]]))
    assert len(store.shards) > 1
    with pytest.raises(AttachError, match="detached"):
        session.record(tmp_path / "t")
    with sae.attach(lm, at=2) as session, session.record(tmp_path / "s") as more:
        lm(input_ids=text[None])
    assert more.shards[-1].last == 4


def test_recording_with_gradients_on_keeps_no_graph_and_several_hookpoints_several_stores(tmp_path):
    lm = tiny.llama()
    saes = {1: tiny.sae_for(lm, 1), 3: tiny.sae_for(lm, 3)}
    from hf_switch_sae import attach

    with attach(lm, saes) as session, session.record(tmp_path / "s") as found:
        lm(**tiny.padded(tiny.prompts(6))).logits.sum().backward()

    assert list(found) == ["layers.1.resid_post", "layers.3.resid_post"]
    assert [store.num_tokens for store in found.values()] == [6, 6]


def test_a_store_that_can_not_be_written_loses_no_other_hookpoints_documents(tmp_path, monkeypatch):
    from hf_switch_sae import attach

    lm = tiny.llama()
    saes = {layer: tiny.sae_for(lm, layer) for layer in (1, 2, 3)}
    real = FeatureStore.append_documents

    def full(store, documents):
        if store.path.name == broken:
            raise StoreError("the disk is full")
        return real(store, documents)

    monkeypatch.setattr(FeatureStore, "append_documents", full)
    for number, broken in enumerate(f"layers.{layer}.resid_post" for layer in saes):
        with (
            pytest.raises(StoreError, match="disk is full"),
            attach(lm, saes) as session,
            session.record(tmp_path / str(number)) as found,
        ):
            lm(**tiny.padded(tiny.prompts(6)))
        want = {name: 0 if name == broken else 6 for name in found}
        assert {name: store.num_tokens for name, store in found.items()} == want


def test_beams_are_refused_before_a_token_is_generated_and_only_while_recording(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    inputs = tiny.padded(tiny.prompts(5))
    options = {"max_new_tokens": 3, "do_sample": False}
    with sae.attach(lm, at=2) as session:
        with session.record(tmp_path / "s") as store:
            with pytest.raises(AttachError, match="num_beams=2"):
                lm.generate(**inputs, num_beams=2, **options)
            config = tf.GenerationConfig(num_beams=3, max_new_tokens=3)
            with pytest.raises(AttachError, match="num_beams=3"):
                lm.generate(**inputs, generation_config=config)
        lm.generate(**inputs, num_beams=2, **options)
    assert store.num_tokens == 0


def test_two_recordings_of_one_session_are_refused_and_the_first_goes_on(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    with sae.attach(lm, at=2) as session, session.record(tmp_path / "a") as store:
        with pytest.raises(StoreError, match="recorded already"), session.record(tmp_path / "b"):
            pass
        lm(input_ids=tiny.prompts(4)[0][None])
    assert store.num_tokens == 4


def test_what_came_by_before_an_error_is_recorded(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)

    class Mine(Exception):
        pass

    def record_and_raise():
        with sae.attach(lm, at=2) as session, session.record(tmp_path / "s"):
            lm(input_ids=tiny.prompts(4)[0][None])
            raise Mine

    with pytest.raises(Mine):
        record_and_raise()
    assert FeatureStore(tmp_path / "s").num_tokens == 4


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_virtual_tokens_of_a_prompt_tuned_model_are_no_tokens_of_a_document(tmp_path):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(lm, tuning).eval()

    store = record(tuned, sae, DOCUMENTS, tmp_path / "s", at=2, **OPTIONS)

    rows = stores.all_rows(store)
    assert rows.token.tolist() == [token for document in DOCUMENTS for token in document]


def test_recording_works_with_offloaded_layers_and_leaves_the_sae_where_it_is(tmp_path):
    from accelerate import cpu_offload

    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    plain = record(lm, sae, DOCUMENTS, tmp_path / "plain", at=2, **OPTIONS)
    cpu_offload(lm, torch.device("cpu"))

    again = record(lm, sae, DOCUMENTS, tmp_path / "again", at=2, **OPTIONS)

    assert stores.contents(again.path) == stores.contents(plain.path)
