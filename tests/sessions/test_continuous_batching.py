"""`generate_batch` packs requests into one row, step by step: each is a row, edited as if alone.

The oracle runs each request alone, without a cache, with a plain torch hook.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stores, tiny
from helpers.scopes import axes_sae
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from hf_switch_sae import Steer, attach

PROMPTS = tiny.prompts(8, 5, 11, 3, 6)
SHARED = [torch.cat([tiny.prompts(32, seed=9)[0], text]) for text in tiny.prompts(3, 5, seed=5)]
STRENGTH = 8.0
Where = Callable[[int, int, int], bool]
"""(row, position, tokens of the prompt) -> whether a token is edited."""

SCOPES: dict[str, tuple[dict[str, Any], Where]] = {
    "all": ({}, lambda row, at, prompt: True),
    "prompt": ({"positions": "prompt"}, lambda row, at, prompt: at < prompt),
    "generated": ({"positions": "generated"}, lambda row, at, prompt: at >= prompt),
    "rows": ({"rows": [1, 3]}, lambda row, at, prompt: row in (1, 3)),
    "slice": ({"positions": slice(2, 13, 3)}, lambda row, at, prompt: at in range(2, 13, 3)),
    "what a row generates": (
        {"rows": 1, "positions": "generated"},
        lambda row, at, prompt: row == 1 and at >= prompt,
    ),
}


@torch.no_grad()
def alone(lm: PreTrainedModel, row: int, text: Tensor, where: Where, steps: int) -> list[int]:
    """What a request says if nobody else is there."""
    prompt, along = len(text), axes_sae(32).W_dec.flatten(0, 1)[1] * STRENGTH

    def hook(_: Any, __: Any, out: Tensor) -> Tensor:
        edited = torch.tensor([where(row, at, prompt) for at in range(out.shape[1])])
        return out + edited[:, None] * along

    handle = lm.model.layers[2].register_forward_hook(hook)
    for _ in range(steps):
        text = torch.cat([text, lm(text[None], use_cache=False).logits[0, -1:].argmax(-1)])
    handle.remove()
    return text[prompt:].tolist()


def sizes(**changes: Any) -> ContinuousBatchingConfig:
    fields = {"page_size": 16, "num_blocks": 16, "max_batch_tokens": 64}
    return ContinuousBatchingConfig(**{**fields, "allow_block_sharing": False, **changes})


SIZES = {
    "all at once": {},
    "more than fit at once": {"num_blocks": 3, "max_batch_tokens": 8},
    "put off and begun anew": {"page_size": 8, "num_blocks": 6, "max_batch_tokens": 16},
}


def batch(
    lm: PreTrainedModel,
    texts: list[Tensor],
    config: ContinuousBatchingConfig,
    steps: int = 4,
    returns: int = 1,
    **options: Any,
) -> dict[str, list[int]]:
    """What each request says, by its name; raises what one of them raised."""
    choice = {"do_sample": True, "top_k": 1, "num_return_sequences": returns}
    generation = GenerationConfig(
        max_new_tokens=steps, eos_token_id=-1, **(choice if returns > 1 else {"do_sample": False})
    )
    done = lm.generate_batch(
        [text.tolist() for text in texts],
        generation_config=generation,
        continuous_batching_config=config,
        **options,
    )
    errors = {each.error for each in done.values()} - {None}
    assert not errors, errors
    return {name: each.generated_tokens for name, each in done.items()}


@contextmanager
def steered(lm: PreTrainedModel, **scope: Any) -> Iterator[None]:
    with attach(lm, axes_sae(32), at=2) as session:
        session.edit(Steer(1, STRENGTH, unit="raw", **scope))
        yield


CASES = [
    ("what a row generates", "all at once"),
    *((scope, "more than fit at once") for scope in SCOPES),
    *((scope, "put off and begun anew") for scope in ("prompt", "rows")),
]


@pytest.mark.parametrize(("scope", "size"), CASES)
def test_every_request_is_edited_as_if_it_were_alone(scope, size):
    lm = tiny.llama()
    edit, where = SCOPES[scope]
    steps = 14 if size == "put off and begun anew" else 4
    with steered(lm, **edit):
        said = batch(lm, PROMPTS, sizes(**SIZES[size]), steps)

    want = [alone(lm, row, text, where, steps) for row, text in enumerate(PROMPTS)]
    assert [said[f"req_{row}"] for row in range(5)] == want


@pytest.mark.parametrize("scope", ["prompt", "what a row generates"])
def test_return_sequences_belong_to_the_request_they_come_from(scope):
    lm = tiny.llama()
    edit, where = SCOPES[scope]
    edit = {**edit, "rows": 1} if "rows" in edit else edit
    with steered(lm, **edit):
        said = batch(lm, PROMPTS[:2], sizes(num_blocks=3, max_batch_tokens=16), returns=3)

    want = [alone(lm, row, text, where, 4) for row, text in enumerate(PROMPTS[:2])]
    assert len(said) == 6
    assert all(words == want[int(name.split("_")[1])] for name, words in said.items())


def managed(
    lm: PreTrainedModel, names: list[str | None], steps: list[int]
) -> dict[str, tuple[list[int], str | None]]:
    """Requests asked for one by one: name -> what it says, and its error."""
    generation = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=-1)
    with lm.continuous_batching_context_manager(
        generation_config=generation,
        continuous_batching_config=sizes(page_size=8, num_blocks=8, max_batch_tokens=16),
        block=True,
        timeout=5,
    ) as manager:
        for name, count, text in zip(names, steps, PROMPTS, strict=False):
            manager.add_request(text.tolist(), request_id=name, max_new_tokens=count)
        results = [manager.get_result(timeout=20) for _ in names]
    return {each.request_id: (each.generated_tokens, each.error) for each in results}


@pytest.mark.parametrize("scope", ["what a row generates"])
def test_requests_of_different_lengths_come_and_go(scope):
    lm = tiny.llama()
    steps = [2, 6, 3, 5, 4]
    edit, where = SCOPES[scope]
    with steered(lm, **edit):
        said = managed(lm, [None] * 5, steps)

    for row, (text, count) in enumerate(zip(PROMPTS, steps, strict=True)):
        assert said[f"req_{row}"] == (alone(lm, row, text, where, count), None)


def test_rows_of_requests_with_names_of_their_own_are_refused_out_loud():
    lm = tiny.llama()
    with steered(lm, rows=0):
        for words, error in managed(lm, ["a", "b"], [3, 3]).values():
            assert words == []
            assert "rows can't be told here: requests have names of their own" in str(error)
    with steered(lm, positions="generated"):
        said = managed(lm, ["a", "b"], [3, 3])
    where = SCOPES["generated"][1]
    assert said["b"] == (alone(lm, 1, PROMPTS[1], where, 3), None)


def test_a_session_of_a_thread_says_that_the_servers_thread_passes_it_by():
    lm = tiny.llama()
    said: list[Any] = []

    def work() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with steered(lm):
                said.append(batch(lm, PROMPTS[:2], sizes())["req_0"])
        said.append([str(each.message) for each in caught])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    never = lambda *_: False  # noqa: E731
    assert said[0] == alone(lm, 0, PROMPTS[0], never, 4)
    assert sum("passed by the edits" in message for message in said[1]) == 1


def test_an_edit_of_one_row_reaches_no_row_that_begins_alike():
    lm = tiny.llama()
    config = sizes(max_batch_tokens=16, allow_block_sharing=True)
    with steered(lm, rows=0):
        try:
            said = batch(lm, SHARED, config)
        except AssertionError as error:  # a refusal is right as well
            assert "rows" in str(error)  # noqa: PT017
            return

    def first(row: int, at: int, prompt: int) -> bool:
        return row == 0

    assert said == {f"req_{row}": alone(lm, row, SHARED[row], first, 4) for row in range(2)}


def test_rows_are_numbered_on_as_requests_are_where_the_manager_is_kept():
    lm = tiny.llama()
    options = {"persistent_manager": True}
    try:
        with steered(lm, rows=[0, 3]):
            first, second = (batch(lm, PROMPTS[:2], sizes(), **options) for _ in range(2))
    finally:
        lm.destroy_cached_continuous_batching_manager()

    def wanted(row: int, at: int, prompt: int) -> bool:
        return row in (0, 3)

    for said, start in ((first, 0), (second, 2)):
        want = {f"req_{start + n}": alone(lm, start + n, PROMPTS[n], wanted, 4) for n in range(2)}
        assert said == want


# Recorded


def recorded(
    texts: list[Tensor], folder: Path, config: ContinuousBatchingConfig, **options: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """The documents, and those that should be there: all but the last token of each text."""
    lm = tiny.llama()
    with attach(lm, axes_sae(32), at=2) as session, session.record(folder) as store:
        said = batch(lm, texts, config, **options)
    rows = {name: texts[int(name.split("_")[1])].tolist() for name in said}
    return sorted(stores.documents(store)), sorted(
        [*rows[name], *words[:-1]] for name, words in said.items()
    )


@pytest.mark.parametrize(
    ("size", "steps"),
    [
        ("all at once", 4),
        ("more than fit at once", 4),
        pytest.param("put off and begun anew", 14),
    ],
)
def test_every_token_of_every_request_is_recorded_once(size, steps, tmp_path):
    got, want = recorded(PROMPTS, tmp_path / "s", sizes(**SIZES[size]), steps=steps)

    assert got == want


def test_requests_of_one_length_are_recorded(tmp_path):
    got, want = recorded(tiny.prompts(5, 5), tmp_path / "s", sizes())

    assert got == want


def test_requests_that_share_what_was_computed_are_not_recorded(tmp_path):
    config = sizes(max_batch_tokens=16, allow_block_sharing=True)

    with pytest.raises(AssertionError, match="req_1 shares what another request has computed"):
        recorded(SHARED, tmp_path / "s", config)
