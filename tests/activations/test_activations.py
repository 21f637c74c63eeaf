"""Live and given activations: what text becomes, which tokens are kept, and exact cursors."""

import copy
import itertools
import json
import math
import random

import datasets
import pytest
import torch
from helpers import tiny
from helpers.activations import CONTEXT, DOCUMENTS, in_order, plain_rows, settings, tokenizer

from hf_switch_sae import AttachError, HookpointError, NonFiniteError, StoreError, TextError
from hf_switch_sae.activations.harvest import Harvest
from hf_switch_sae.activations.live import LiveActivations
from hf_switch_sae.activations.policy import TokenPolicy
from hf_switch_sae.activations.stored import TensorActivations
from hf_switch_sae.text.contexts import Cursor, Marks, Packer
from hf_switch_sae.text.documents import read_documents

PLACE = "layers.2.resid_post"
ROW = 4 * tiny.DIM
TOKENS = [token for document in DOCUMENTS for token in document]
BUFFER = 200 * ROW  # 136 rows, and a pass


def live(lm=None, hookpoints=PLACE, documents=DOCUMENTS, tok=None, **changes):
    return LiveActivations(
        lm or tiny.llama(),
        hookpoints,
        documents,
        tok,
        settings(**{"buffer_bytes": BUFFER, **changes}),
    )


def packer(documents=DOCUMENTS, tok=None, marks=None, windows=False, context=CONTEXT):
    return Packer(read_documents(documents), tok, context, marks or Marks(), windows)


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [Marks(), Marks((1,)), Marks((), (2,)), Marks((1,), (2, 3))])
def test_packed_contexts_are_the_documents_and_their_marks_one_after_another(marks):
    contexts = list(packer(marks=marks).contexts(epochs=1))

    want = [token for each in DOCUMENTS if each for token in [*marks.before, *each, *marks.after]]
    assert [token for context in contexts for token in context.tokens] == want[
        : len(want) // CONTEXT * CONTEXT
    ]
    assert all(len(context.tokens) == CONTEXT for context in contexts)
    assert [context.number for context in contexts] == list(range(len(contexts)))


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("marks", [Marks(), Marks((1,), (2,))], ids=["bare", "marked"])
def test_from_any_cursor_the_very_same_contexts_follow(windows, marks):
    both = packer(marks=marks, windows=windows)
    whole = list(both.contexts(epochs=2))
    for at in range(0, len(whole), 3):
        assert list(both.contexts(whole[at].end, epochs=2)) == whole[at + 1 :]


def test_a_second_epoch_begins_with_the_first_document_again():
    one = [context.tokens for context in packer().contexts(epochs=1)]
    three = list(packer().contexts(epochs=3))
    assert [context.tokens for context in three] == 3 * one
    assert [context.number for context in three] == list(range(3 * len(one)))


def test_documents_before_the_cursor_are_not_tokenized():
    seen = []

    def tok(texts, **_):
        seen.extend(texts)
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    texts = [letter * 10 for letter in "abcdef"]
    list(packer(texts, tok).contexts(Cursor(document=3, offset=2), epochs=1))
    assert seen == texts[3:]


def test_windows_lie_within_a_document_between_marks_and_the_last_may_be_short():
    marks = Marks((1,), (2,))
    contexts = [c.tokens for c in packer(marks=marks, windows=True).contexts(epochs=1)]

    assert all(tokens[0] == 1 and tokens[-1] == 2 for tokens in contexts)
    inside = [tokens[1:-1] for tokens in contexts]
    want = [d[i : i + CONTEXT - 2] for d in DOCUMENTS for i in range(0, len(d), CONTEXT - 2)]
    assert inside == want


def test_auto_takes_the_marks_that_the_tokenizer_adds_else_its_end_of_text_else_its_first():
    adds_first = tokenizer("<s> $A", bos_token="<s>", eos_token="</s>")
    adds_both = tokenizer("<s> $A </s>", cls_token="<s>", sep_token="</s>")
    assert Marks.of("auto", adds_first) == Marks((1,))
    assert Marks.of("auto", adds_both) == Marks((1,), (2,))
    assert Marks.of("auto", tokenizer(bos_token="<s>", eos_token="</s>")) == Marks((), (2,))
    assert Marks.of("auto", tokenizer(bos_token="<s>")) == Marks((1,))
    assert Marks.of("auto", tokenizer()) == Marks()
    assert Marks.of("auto", None) == Marks()


def test_marks_may_be_named_and_one_that_is_not_there_is_an_error():
    tok = tokenizer("<s> $A", bos_token="<s>")
    assert Marks.of("none", tok) == Marks()
    assert Marks.of("bos", tok) == Marks((1,))
    assert Marks.of("</s>", tok) == Marks((), (2,))
    with pytest.raises(TextError, match="no token for boundary='eos'"):
        Marks.of("eos", tok)
    with pytest.raises(TextError, match="needs the language model's tokenizer"):
        Marks.of("bos", None)


def test_a_mark_that_a_document_has_already_is_not_doubled():
    marks = Marks((1,), (2,))
    assert marks.around([1, 5, 2]) == marks.around([5]) == [1, 5, 2]


# --- which rows ---------------------------------------------------------------------------------


def contexts_of(documents=DOCUMENTS, **options):
    return [context.tokens for context in packer(documents, **options).contexts(epochs=1)]


def all_rows(found, batch_rows=10, epochs=1):
    rows = [batch[PLACE] for batch in found.batches(batch_rows, epochs=epochs)]
    left = found.state_dict()["carried"].get(PLACE, torch.empty(0, tiny.DIM))
    return torch.cat([*rows, left])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba", "bloom"])
def test_rows_are_those_of_plain_forwards_each_once_without_the_first_of_a_context(kind):
    lm = tiny.ALL[kind]()
    want = plain_rows(lm, contexts_of())

    found = all_rows(live(lm, skip_special=False))

    assert found.shape == want.shape
    torch.testing.assert_close(in_order(found), in_order(want), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, want)  # in another order


def test_of_a_model_that_looks_both_ways_documents_are_not_joined_and_marks_not_kept():
    lm = tiny.bert()
    tok = tokenizer("<s> $A </s>", cls_token="<s>", sep_token="</s>")
    texts = ["the ship sailed across the sea " * 4, "old harbour", "to the old ship"]

    activations = live(lm, documents=texts, tok=tok)

    policy = activations.policy
    assert policy["packing"] == "windows"
    assert policy["skip_first"] is False
    assert policy["special_ids"] == [0, 1, 2]
    contexts = contexts_of(texts, tok=tok, marks=Marks((1,), (2,)), windows=True)
    assert len({len(tokens) for tokens in contexts}) > 1
    want = torch.cat([plain_rows(lm, [tokens])[:-1] for tokens in contexts])
    found = all_rows(activations, batch_rows=4)
    torch.testing.assert_close(in_order(found), in_order(want), rtol=1e-4, atol=1e-5)


def test_special_tokens_are_left_out_and_seen_by_the_model():
    lm = tiny.llama()
    tok = tokenizer("<s> $A", bos_token="<s>", eos_token="</s>")
    texts = ["the ship sailed"] * 30

    found = all_rows(live(lm, documents=texts, tok=tok))

    contexts = contexts_of(texts, tok=tok, marks=Marks((1,)))
    kept = torch.tensor([token != 1 for tokens in contexts for token in tokens[1:]])
    torch.testing.assert_close(
        in_order(found), in_order(plain_rows(lm, contexts)[kept]), rtol=1e-4, atol=1e-5
    )
    assert len(found) < len(kept)
    everything = all_rows(live(lm, documents=texts, tok=tok, skip_special=False, skip_first=False))
    assert len(everything) == sum(map(len, contexts))


def outlying(lm):
    """Make token 7 an attention sink, a hundred times as long as others."""
    with torch.no_grad():
        lm.get_input_embeddings().weight[7] *= 300
    return lm


def test_tokens_of_six_times_the_median_norm_are_left_out_and_the_bound_is_in_the_policy():
    lm = outlying(tiny.llama())
    rows = plain_rows(lm, contexts_of())
    norm = rows.norm(dim=-1)
    bound = 6 * norm.median()
    assert (norm > bound).any()

    activations = live(lm, outlier_factor=6.0, skip_special=False)

    assert activations.policy["outlier_norm"][PLACE] == pytest.approx(float(bound), rel=1e-5)
    assert json.loads(json.dumps(activations.policy)) == activations.policy
    found = all_rows(activations)
    assert len(found) == (norm <= bound).sum()
    assert found.norm(dim=-1).max() <= bound
    assert activations.sample(10_000)[PLACE].norm(dim=-1).max() <= bound


def test_a_token_that_is_an_outlier_at_one_place_is_left_out_at_all():
    policy = TokenPolicy(False, (), 6.0, {"a": 6.0, "b": 3.0})
    a = torch.tensor([[[1.0], [7.0], [1.0], [-6.0], [2.0]]])
    b = torch.tensor([[[1.0], [1.0], [-4.0], [2.0], [3.0]]])
    assert policy.rows({"a": a, "b": b}, torch.ones(1, 5).bool()).tolist() == [0, 3, 4]
    assert policy.rows({"b": b, "a": a}, torch.ones(1, 5).bool()).tolist() == [0, 3, 4]


def test_several_places_in_one_pass_are_the_single_passes_and_rows_are_aligned():
    lm = tiny.llama()
    hookpoints = ["layers.0.resid_post", "layers.1.resid_pre", PLACE]
    calls = []
    handle = lm.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    together = list(live(lm, hookpoints, buffer_bytes=3 * BUFFER).batches(10, epochs=1))
    one_pass = len(calls)
    handle.remove()

    singles = [list(live(lm, place).batches(10, epochs=1)) for place in hookpoints]

    assert len(together) == len(singles[0]) > 5
    for batch, *each in zip(together, *singles, strict=True):
        for name, single in zip(hookpoints, each, strict=True):
            assert torch.equal(batch[name], single[name])
        assert torch.equal(batch[hookpoints[0]], batch[hookpoints[1]])  # one stream under two names
    handle = lm.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    list(live(lm).batches(10, epochs=1))
    handle.remove()
    assert len(calls) == 2 * one_pass


def test_rows_may_be_kept_narrower_than_the_stream():
    wide, narrow = live(), live(dtype="bfloat16", buffer_bytes=BUFFER // 2)
    for a, b in zip(wide.batches(10, epochs=1), narrow.batches(10, epochs=1), strict=True):
        assert b[PLACE].dtype == torch.bfloat16
        assert torch.equal(a[PLACE].bfloat16(), b[PLACE])
    assert live(tiny.llama().bfloat16()).sample(5)[PLACE].dtype == torch.float32


def test_a_dataset_streamed_or_not_gives_the_rows_of_the_list():
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    want = [batch[PLACE] for batch in live().batches(10, epochs=2)]
    for given in (rows, rows.to_iterable_dataset()):
        found = [batch[PLACE] for batch in live(documents=given).batches(10, epochs=2)]
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_the_model_is_left_as_it_was_between_batches_and_after():
    lm = tiny.llama()
    before = tiny.traces(lm)
    activations = live(lm)
    assert tiny.traces(lm) == before
    batches = activations.batches(10)
    next(batches)
    assert tiny.traces(lm) == before
    activations.sample(5)
    batches.close()
    assert tiny.traces(lm) == before


def test_batches_and_samples_can_be_trained_on():
    activations = live()
    x = next(activations.batches(10))[PLACE]
    weight = torch.zeros(tiny.DIM, requires_grad=True)
    ((x * weight).sum() + (activations.sample(5)[PLACE] * weight).sum()).backward()
    assert weight.grad.abs().sum() > 0


# --- order, buffer, cursor ----------------------------------------------------------------------


def three_kinds():
    torch.manual_seed(3)
    tensors = {PLACE: torch.randn(97, 5), "layers.0.resid_post": torch.randn(97, 3)}
    lm = tiny.llama()
    return {
        "live": lambda **changes: live(lm, **changes),
        "tensors": lambda seed=0: TensorActivations(tensors, seed=seed),
    }


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["live", "tensors"])
def test_after_a_resume_the_very_same_batches_follow(kind, tmp_path):
    make = three_kinds()[kind]
    activations = make()
    states, batches = [activations.state_dict()], []
    for batch in itertools.islice(activations.batches(7, epochs=3), 90):
        batches.append(batch)
        states.append(activations.state_dict())
    assert len(batches) > 25
    drawn = random.Random(0).sample(range(len(states)), 10)
    for at in [0, *drawn, len(states) - 1]:
        torch.save(states[at], tmp_path / "state.pt")
        resumed = make()
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        follow = list(itertools.islice(resumed.batches(7, epochs=3), len(batches) - at))
        assert len(follow) == len(batches) - at
        assert all(equal(a, b) for a, b in zip(follow, batches[at:], strict=True))


@pytest.mark.parametrize("kind", ["live", "tensors"])
def test_two_epochs_have_every_row_twice_in_another_order_and_a_seed_decides_which(kind):
    make = three_kinds()[kind]
    rows = torch.cat([batch[PLACE] for batch in make().batches(1, epochs=2)])
    once = torch.cat([batch[PLACE] for batch in make().batches(1, epochs=1)])
    assert torch.equal(in_order(rows)[::2], in_order(once))
    assert torch.equal(in_order(rows)[1::2], in_order(once))
    assert not torch.equal(rows[: len(once)], rows[len(once) :])
    assert torch.equal(torch.cat([b[PLACE] for b in make().batches(1, epochs=2)]), rows)
    assert not torch.equal(next(make(seed=1).batches(10))[PLACE], rows[:10])


def test_of_given_rows_each_epoch_has_every_row_once():
    rows = torch.cat([b[PLACE] for b in three_kinds()["tensors"]().batches(1, epochs=2)])
    assert torch.equal(in_order(rows[:97]), in_order(rows[97:]))


@pytest.mark.parametrize("kind", ["live", "tensors"])
def test_a_sample_leaves_the_cursor_where_it_is(kind):
    make = three_kinds()[kind]
    activations, other = make(), make()
    batches, others = activations.batches(10), other.batches(10)
    for _ in range(30):
        assert equal(next(batches), next(others))
        sample = activations.sample(7)
        assert {name: tuple(x.shape) for name, x in sample.items()} == {
            name: (7, activations.hidden_size[name]) for name in activations.hookpoints
        }
    assert equal(activations.sample(7), other.sample(7))


def test_the_buffer_shuffles_over_its_rows_and_holds_no_more_than_its_bytes():
    activations = live()
    estimate = activations.estimate()
    assert estimate["buffer_bytes"] <= BUFFER
    assert estimate["buffer_rows"] == 200 - 64
    assert json.dumps(estimate)
    contexts = contexts_of()
    lm = tiny.llama()
    rows = plain_rows(lm, contexts)
    first = torch.cat([b[PLACE] for b in itertools.islice(activations.batches(10), 13)])
    place = [int((rows - row).abs().sum(-1).argmin()) for row in first]
    assert max(place) < 200  # only what the buffer holds has been computed
    assert abs(sum(place[:65]) / 65 - sum(place) / len(place)) < 20  # early rows from all over it


def test_with_live_ranks_each_context_is_one_ranks_and_texts_differ():
    lm = tiny.llama()
    shares = []
    for rank in range(3):
        activations = live(lm)
        got = [batch[PLACE] for batch in activations.batches(5, rank, 3, epochs=1)]
        shares.append(torch.cat([*got, activations.state_dict()["carried"][PLACE]]))
    want = plain_rows(lm, contexts_of())
    torch.testing.assert_close(in_order(torch.cat(shares)), in_order(want), rtol=1e-4, atol=1e-5)
    assert len({len(share) for share in shares}) <= 2
    assert not torch.allclose(shares[0][0], shares[1][0])


def test_a_live_rank_goes_on_as_itself_only():
    activations = live()
    next(activations.batches(5, 1, 2))
    resumed = live()
    resumed.load_state_dict(activations.state_dict())
    with pytest.raises(StoreError, match="that of rank"):
        resumed.batches(5, 0, 2)
    assert equal(next(resumed.batches(5, 1, 2)), next(activations.batches(5, 1, 2)))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_a_part_of_the_batch_see_the_rows_of_one_rank(world):
    make = three_kinds()["tensors"]
    alone = list(make().batches(12, epochs=2))
    shares = [list(make().batches(12 // world, rank, world, epochs=2)) for rank in range(world)]
    assert len(alone) == 2 * 97 // 12
    for batch, *parts in zip(alone, *shares, strict=True):
        assert equal(batch, {name: torch.cat([p[name] for p in parts]) for name in batch})


def test_rows_of_several_places_in_tensors_stay_aligned():
    tensors = {"a": torch.arange(50.0)[:, None], "b": 2 * torch.arange(50.0)[:, None]}
    for batch in TensorActivations(tensors).batches(7, epochs=3):
        assert torch.equal(2 * batch["a"], batch["b"])


def test_batches_that_are_superseded_say_so():
    for make in three_kinds().values():
        activations = make()
        old = activations.batches(10)
        next(old)
        new = activations.batches(10)
        next(new)
        with pytest.raises(StoreError, match="superseded"):
            next(old)
        next(new)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "changes", "says"),
    [
        ([], {}, "data set is empty"),
        ([[], []], {}, "2 documents are all empty"),
        ([[5, 6], [7]], {}, "have 3 tokens together, fewer than one context of 16"),
        (["text"], {}, "tokenizer is needed"),
        ([[1] * 40], {}, "leaves nothing of this text"),
        ([[tiny.VOCAB] * 40], {}, "token id 99 is beyond the 99 embeddings of LlamaForCausalLM"),
        (DOCUMENTS, {"context": 300}, "more than the 256 positions"),
        (DOCUMENTS, {"boundary": "bos"}, "needs the language model's tokenizer"),
    ],
)
def test_bad_text_is_an_error_before_the_first_step(documents, changes, says):
    with pytest.raises(TextError, match=says):
        live(documents=documents, **changes)


def test_a_tokenizer_of_another_model_is_an_error():
    with pytest.raises(TextError, match=r"11 tokens with ids up to 10, and .* has 9 embeddings"):
        live(tiny.llama(vocab_size=9), documents=["the ship"], tok=tokenizer())
    with pytest.raises(TextError, match=r"11 tokens, and .* 2000 embeddings"):
        live(tiny.llama(vocab_size=2000), documents=["the ship"], tok=tokenizer())


def test_bad_models_and_places_are_errors():
    with pytest.raises(HookpointError, match="no block 9"):
        live(hookpoints=9)
    with pytest.raises(HookpointError, match="no place"):
        live(hookpoints=[])
    with pytest.raises(AttachError, match="training mode"):
        live(tiny.llama().train())
    with pytest.raises(HookpointError, match=r"\[seq, batch, d\]"):
        live(tiny.xlnet())
    lm = tiny.llama()
    with torch.no_grad():
        lm.get_input_embeddings().weight[8] = math.nan
    with pytest.raises(NonFiniteError, match=r"layers\.2\.resid_post"):
        live(lm)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"buffer_bytes": 64 * ROW}, StoreError, "holds 64 rows, no more than one pass"),
        ({"context": 0}, TextError, "context=0 is not at least 1"),
        ({"outlier_factor": 0.5}, TextError, "every other token"),
        ({"dtype": "int8"}, TextError, "dtype='int8'"),
        ({"packing": "loose"}, TextError, "packing='loose'"),
    ],
)
def test_bad_settings_are_errors(changes, error, says):
    with pytest.raises(error, match=says):
        live(**changes)


def test_batches_that_can_not_be_are_errors():
    activations = live()
    with pytest.raises(StoreError, match="does not fit the shuffle buffer of 136"):
        activations.batches(137)
    with pytest.raises(StoreError, match="rank=2"):
        activations.batches(5, 2, 2)
    with pytest.raises(StoreError, match="batch_rows=0"):
        activations.batches(0)
    with pytest.raises(TextError, match="30 rows to train on, fewer than a batch of 40"):
        next(live(documents=[[5] * 32]).batches(40, epochs=1))
    with pytest.raises(StoreError, match="97 rows, fewer than a batch of 100"):
        three_kinds()["tensors"]().batches(50, 0, 2)
    with pytest.raises(StoreError, match="equally many"):
        TensorActivations({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"documents": DOCUMENTS[1:]}, "dataset"),
        ({"context": 8}, "policy"),
        ({"seed": 1}, "seed"),
        ({"hookpoints": 1}, "hookpoints"),
        ({"tokens_per_pass": 32}, "contexts_per_pass"),
    ],
)
def test_a_cursor_of_another_run_is_an_error(changes, says):
    state = live().state_dict()
    with pytest.raises(StoreError, match=f"other live activations: .*{says}"):
        live(**changes).load_state_dict(state)
    with pytest.raises(StoreError, match="no state of"):
        live().load_state_dict({})


def test_a_resume_keeps_the_bounds_and_the_buffer_of_the_run_it_goes_on_with():
    lm = outlying(tiny.llama())
    first = live(lm, outlier_factor=6.0)
    state = copy.deepcopy(first.state_dict())
    state["outlier_norm"][PLACE] *= 1.5
    second = live(lm, outlier_factor=6.0, buffer_bytes=2 * BUFFER)
    second.load_state_dict(state)
    assert second.policy["outlier_norm"][PLACE] == 1.5 * first.policy["outlier_norm"][PLACE]
    assert second.estimate()["buffer_rows"] == first.estimate()["buffer_rows"]


def test_what_a_pass_keeps_of_tokens_is_their_ids():
    harvest = Harvest(tiny.llama(), 2, DOCUMENTS, None, settings(skip_special=False))
    tokens = [t for found in harvest.passes(harvest.contexts(epochs=1)) for t in found.token_ids]
    assert tokens == [token for context in contexts_of() for token in context[1:]]
