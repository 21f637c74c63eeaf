"""SparseFeatures is its dense matrix: every operation on it commutes with `to_dense()`."""

import numpy as np
import pytest
import torch
from helpers import saes
from hypothesis import given
from hypothesis import strategies as st

from hf_switch_sae import FeatureIdError, SparseFeatures
from hf_switch_sae.features import check_feature_ids

WIDTH = 13


@st.composite
def features(draw, rows=None, columns=None):
    """[rows, columns] tokens with distinct ids and some empty slots, as an encoder gives them."""
    shape = (rows or draw(st.integers(1, 4)), columns or draw(st.integers(1, 3)))
    k = draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    acts = torch.rand(*shape, k) + 0.1
    acts = acts * (torch.rand(*shape, k) < draw(st.sampled_from([0.0, 0.6, 1.0])))
    ids = torch.rand(*shape, WIDTH).argsort(-1)[..., :k]
    # an empty slot may name the feature of another slot
    ids = torch.where((acts == 0) & (torch.rand(*shape, k) < 0.5), ids[..., :1], ids)
    return SparseFeatures(acts, ids, WIDTH)


@given(features())
def test_the_dense_matrix_has_each_act_at_its_id_and_zero_elsewhere(sparse):
    dense = sparse.to_dense()
    assert dense.shape == (*sparse.shape, WIDTH)
    total = torch.zeros_like(dense)
    for index in torch.cartesian_prod(*(torch.arange(s) for s in sparse.acts.shape)):
        *token, slot = index.tolist()
        total[(*token, sparse.ids[(*token, slot)])] += sparse.acts[(*token, slot)]
    torch.testing.assert_close(dense, total)


@given(features(), st.lists(st.integers(0, WIDTH - 1), max_size=6))
def test_select_is_columns_of_the_dense_matrix_in_the_order_asked(sparse, ids):
    wanted = sparse.to_dense()[..., ids]
    torch.testing.assert_close(sparse.select(ids), wanted)
    torch.testing.assert_close(sparse.select(torch.tensor(ids, dtype=torch.int32)), wanted)
    for column, feature in enumerate(ids):
        torch.testing.assert_close(sparse.select(feature), wanted[..., column])


@given(features(), st.integers(0, 8))
def test_topk_keeps_the_largest_of_each_token_strongest_first(sparse, n):
    top = sparse.topk(n)
    kept = min(n, sparse.k)
    assert top.shape == sparse.shape
    assert top.k == kept
    torch.testing.assert_close(
        top.acts, sparse.to_dense().sort(-1, descending=True).values[..., :kept]
    )
    active = top.acts > 0
    torch.testing.assert_close(sparse.to_dense().gather(-1, top.ids)[active], top.acts[active])


@given(features())
def test_csr_is_the_dense_matrix_without_stored_zeros(sparse):
    csr = sparse.to_csr()
    dense = sparse.to_dense().reshape(-1, WIDTH)
    torch.testing.assert_close(csr.to_dense(), dense)
    assert csr.values().numel() == int((dense > 0).sum())
    for start, stop in zip(csr.crow_indices()[:-1], csr.crow_indices()[1:], strict=True):
        columns = csr.col_indices()[start:stop]
        assert (columns[1:] > columns[:-1]).all()


@given(st.lists(features(columns=2), min_size=1, max_size=3))
def test_cat_of_rows_is_cat_of_dense_rows(parts):
    joined = SparseFeatures.cat(parts)
    assert joined.k == max(part.k for part in parts)
    torch.testing.assert_close(joined.to_dense(), torch.cat([part.to_dense() for part in parts]))


@given(st.lists(features(rows=2), min_size=1, max_size=3), st.sampled_from([1, -1]))
def test_cat_along_the_last_token_dimension_leaves_the_slots_alone(parts, dim):
    joined = SparseFeatures.cat(parts, dim)
    torch.testing.assert_close(joined.to_dense(), torch.cat([part.to_dense() for part in parts], 1))


@given(sparse=features(rows=3, columns=2))
@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        (0, -1),
        slice(1, None),
        (slice(None), 0),
        (..., 1),
        (..., -1),
        (None, 0),
        [2, 0],
        (slice(None, None, 2), slice(None)),
        torch.tensor([[True, False], [False, True], [True, True]]),
        torch.tensor([1, 1]),
    ],
    ids=str,
)
def test_indexing_is_indexing_of_the_tokens(sparse, index):
    part = sparse[index]
    numbers = torch.arange(sparse.shape.numel()).reshape(sparse.shape)[index]
    assert part.shape == numbers.shape
    torch.testing.assert_close(part.to_dense(), sparse.to_dense().reshape(-1, WIDTH)[numbers])
    assert part.k == sparse.k


def test_an_index_can_not_reach_into_the_slots():
    sparse = SparseFeatures(torch.rand(2, 3, 4), torch.arange(24).reshape(2, 3, 4), 24)
    with pytest.raises(IndexError):
        sparse[0, 0, 0]


@given(features())
def test_reshape_and_moving_keep_every_token(sparse):
    flat = sparse.reshape(-1)
    torch.testing.assert_close(flat.to_dense(), sparse.to_dense().reshape(-1, WIDTH))
    torch.testing.assert_close(flat.reshape(*sparse.shape).to_dense(), sparse.to_dense())
    half = sparse.to(torch.float16)
    assert half.dtype == torch.float16
    assert half.ids.dtype == torch.int64
    torch.testing.assert_close(sparse.cpu().detach().to_dense(), sparse.to_dense())


@given(features())
def test_l0_is_the_mean_count_of_nonzero_columns(sparse):
    torch.testing.assert_close(sparse.l0(), (sparse.to_dense() > 0).sum(-1).float().mean())


def test_gradients_flow_through_every_reading():
    acts = torch.rand(3, 4, requires_grad=True)
    sparse = SparseFeatures(acts, torch.arange(12).reshape(3, 4), 12)
    for read in (sparse.to_dense, lambda: sparse.select([5]), lambda: sparse.topk(2).acts):
        (grad,) = torch.autograd.grad(read().sum(), acts)
        assert grad.any()
    assert not sparse.detach().acts.requires_grad


def test_no_tokens_are_features_too():
    none = SparseFeatures(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), WIDTH)
    assert len(none) == 0
    assert none.to_dense().shape == (0, WIDTH)
    assert none.to_csr().shape == (0, WIDTH)
    assert none.select([1, 2]).shape == (0, 2)
    assert none.reshape(-1).shape == (0,)


def test_feature_ids_out_of_range_or_not_integers_are_refused_by_name():
    sparse = SparseFeatures(torch.rand(2, 3), torch.arange(6).reshape(2, 3), WIDTH)
    for wrong in (WIDTH, -1, [0, WIDTH], torch.tensor([-5])):
        with pytest.raises(FeatureIdError, match=f"features 0 to {WIDTH - 1}"):
            sparse.select(wrong)
    with pytest.raises(FeatureIdError, match="no feature 99"):
        sparse.select([1, 99])
    with pytest.raises(FeatureIdError, match=r"nonzero\(\)"):
        sparse.select(torch.ones(WIDTH, dtype=torch.bool))  # a mask is not a list of ids
    with pytest.raises(FeatureIdError, match="integers"):
        sparse.select([1.5])
    assert sparse.select([]).shape == (2, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        True,
        np.True_,
        [True, False],
        (True,),
        [2, True],
        np.array([False, True]),
        np.array([3, True], object),
        [np.True_, 4],
        torch.tensor(True),
        torch.zeros(0, dtype=torch.bool),
        [torch.tensor(True), torch.tensor(2)],
    ],
    ids=repr,
)
def test_truth_values_are_no_feature_ids(wrong):
    sparse = SparseFeatures(torch.rand(2, 3), torch.arange(6).reshape(2, 3), WIDTH)
    sae = saes.make()
    for asked in (sparse.select, sae.decoder_rows, lambda ids: check_feature_ids(ids, WIDTH)):
        with pytest.raises(FeatureIdError, match=r"feature ids are integers.*mask.nonzero\(\)"):
            asked(wrong)


@pytest.mark.parametrize("wrong", ["3", None, [[1], [2, 3]], 1j, [1 + 2j]], ids=repr)
def test_what_is_no_number_is_no_feature_id(wrong):
    with pytest.raises(FeatureIdError, match="feature ids are integers"):
        check_feature_ids(wrong, WIDTH)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64])
def test_ids_of_a_code_are_integers(dtype):
    with pytest.raises(FeatureIdError, match="feature ids are integers"):
        SparseFeatures(torch.rand(2, 3), torch.ones(2, 3, dtype=dtype), WIDTH)


def test_parts_that_do_not_belong_together_are_refused():
    one = SparseFeatures(torch.rand(2, 3), torch.arange(6).reshape(2, 3), 6)
    other = SparseFeatures(torch.rand(2, 3), torch.arange(6).reshape(2, 3), 7)
    with pytest.raises(ValueError, match=r"different width: \[6, 7\]"):
        SparseFeatures.cat([one, other])
    with pytest.raises(ValueError, match="at least one"):
        SparseFeatures.cat([])
    with pytest.raises(ValueError, match=r"acts \(2, 3\) and ids \(2, 2\)"):
        SparseFeatures(torch.rand(2, 3), torch.zeros(2, 2, dtype=torch.int64), 6)


def test_the_repr_says_how_many_and_of_what():
    sparse = SparseFeatures(torch.rand(2, 5, 3), torch.zeros(2, 5, 3, dtype=torch.int64), 6)
    text = "SparseFeatures(tokens=[2, 5], k=3, num_features=6, dtype=torch.float32, device=cpu)"
    assert repr(sparse) == text
