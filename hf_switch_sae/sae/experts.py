"""The experts' weights and where they lie: rows in, sparse code out, and back.

A device map places modules, not slices of a tensor, so the experts are cut into groups, each a
module of its own that may be on another device, on the CPU or on disk. With one group (the default)
nothing is ever copied or joined.

Beware An offloaded group's weights are on `meta` outside its forward: accelerate's hooks bring them
       in around `ExpertGroup.forward`, which is why every use of a weight is a function handed to
       it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from hf_switch_sae import ops
from hf_switch_sae.errors import ConfigError
from hf_switch_sae.ops.precision import wide, wide_dtype

_T = TypeVar("_T")

_CACHED_BYTES = 2 * 2**20  # of one weight, when a weight is changed block by block


class ExpertGroup(nn.Module):
    """Experts that a device map moves as one: W_enc, W_dec [e, m, d], b_enc [e, m] or None."""

    def __init__(
        self, num_experts: int, features_per_expert: int, hidden_size: int, bias: bool
    ) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.empty(num_experts, features_per_expert, hidden_size))
        self.W_dec = nn.Parameter(torch.empty(num_experts, features_per_expert, hidden_size))
        self.b_enc = nn.Parameter(torch.empty(num_experts, features_per_expert)) if bias else None

    def forward(self, compute: Callable[..., _T], *args: Any) -> _T:
        """`compute(self, *args)` with the weights in place and tensors in `args` beside them."""
        return compute(self, *args)


class Experts(nn.ModuleList):
    """All experts, in `num_groups` groups of equal size."""

    def __init__(
        self,
        num_groups: int,
        num_experts: int,
        features_per_expert: int,
        hidden_size: int,
        bias: bool,
    ) -> None:
        self.experts_per_group = num_experts // num_groups
        self.features_per_group = self.experts_per_group * features_per_expert
        groups = (
            ExpertGroup(self.experts_per_group, features_per_expert, hidden_size, bias)
            for _ in range(num_groups)
        )
        super().__init__(groups)

    def __iter__(self) -> Iterator[ExpertGroup]:
        """The groups in the order of their experts."""
        return cast(Iterator[ExpertGroup], super().__iter__())

    def joined(self, name: str) -> Tensor:
        """One parameter of all groups as a single tensor; of one group, the parameter itself."""
        parts: list[Tensor] = [group(lambda g: getattr(g, name)) for group in self]
        return (
            parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])
        )

    def encode(
        self,
        x: Tensor,
        expert_ids: Tensor,
        gates: Tensor | None,
        k: int | None,
        threshold: Tensor | None,
        batch_topk: bool,
        center: Tensor | None,
        input_scale: Tensor,
        in_order: bool = False,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `ops.routed_encode`, over the groups.

        `threshold` [E, m] and `b_enc` are in scaled units: divided by `input_scale` [] here, where
        only one expert's may be needed.
        """

        def encode(g: ExpertGroup, *tensors: Any) -> tuple[Tensor, Tensor]:
            return _encode(g, *tensors, k=k, batch_topk=batch_topk and alone, in_order=in_order)

        first, alone = next(iter(self)), len(self) == 1
        if alone or not len(x):
            given = x, expert_ids, gates, threshold, center, input_scale, counts
            acts, ids = first(encode, *given)
            return acts.to(x.device), ids.to(x.device)
        if batch_topk:
            # the border lies between all groups' features: first keep all, then the k * n largest
            wanted, k = k, None
        parts = []
        (n, t), size = expert_ids.shape, self.experts_per_group
        pair_experts, pair_gates = (
            expert_ids.reshape(-1),
            None if gates is None else gates.reshape(-1, 1),
        )
        for index, group in enumerate(self):
            pairs = (pair_experts // size == index).nonzero()[:, 0]
            if len(pairs):
                own = slice(index * size, (index + 1) * size)
                acts, ids = group(
                    encode,
                    x[pairs // t],
                    (pair_experts[pairs] - own.start)[:, None],
                    None if pair_gates is None else pair_gates[pairs],
                    None if threshold is None else threshold[own],
                    center,
                    input_scale,
                    None,
                )
                parts.append(
                    (pairs, acts.to(x.device), ids.to(x.device) + index * self.features_per_group)
                )
        acts, ids = (part.reshape(n, -1) for part in _in_pair_order(parts, n * t))
        return ops.keep_largest(acts, ids, wanted if batch_topk else k, batch_topk, counts)

    def reconstruct_with(
        self,
        candidates: Tensor,
        k: int,
        x: Tensor,
        expert_ids: Tensor,
        gates: Tensor | None,
        input_scale: Tensor,
        in_order: bool = False,
    ) -> Tensor:
        """[n, d]: what some features alone would make of the tokens, decoder bias left out.

        Args:
            candidates: [E, m] bool, the features that may be active.
            k: how many of them per token, the largest; as the other arguments, as of `encode`.
        """
        threshold = torch.where(candidates, 0.0, torch.inf)
        acts, ids = self.encode(
            x, expert_ids, gates, k, threshold, False, None, input_scale, in_order
        )
        return self.decode(acts, ids, in_order)

    @torch.no_grad()
    def errors_of_each(
        self,
        wanted: Tensor,
        x: Tensor,
        gates: Tensor | None,
        k: int | None,
        threshold: Tensor | None,
        input_scale: Tensor,
    ) -> Tensor:
        """[n, E]: the squared error of each token, had that expert been its only one.

        Args:
            wanted: [n, d], what to reconstruct, decoder bias left out.
            gates: [n, 1] or None, the weight that any of them would have had.
            x, k, threshold, input_scale: as of `encode`.
        """
        n, num_experts = len(x), len(self) * self.experts_per_group
        expert_ids = torch.arange(num_experts, device=x.device).repeat_interleave(n)[:, None]
        gates = None if gates is None else gates.repeat(num_experts, 1)
        acts, ids = self.encode(
            x.repeat(num_experts, 1),
            expert_ids,
            gates,
            k,
            threshold,
            False,
            None,
            input_scale,
            in_order=True,
        )
        found = self.decode(acts, ids).view(num_experts, n, -1)
        return (wanted - found).square().sum(-1).T

    def decode(self, acts: Tensor, ids: Tensor, in_order: bool = False) -> Tensor:
        """As `ops.sparse_decode`, over the groups: acts, ids [n, k] -> [n, d], beside `acts`.

        `in_order` is a hint: with several groups tokens are not in the order of each.

        Raises:
            FeatureIdError: on a CPU, an id of no feature.
        """

        def decode(g: ExpertGroup, acts: Tensor, ids: Tensor) -> Tensor:
            acts = acts.to(g.W_dec.dtype)
            return ops.sparse_decode(acts, ids, g.W_dec, in_order and len(self) == 1)

        first, total = next(iter(self)), None
        if len(self) == 1:
            alone: Tensor = first(decode, acts, ids)
            return alone.to(acts.device)
        ops.check_ids(ids, len(self) * self.features_per_group)
        for index, group in enumerate(self):
            mine = (ids // self.features_per_group == index) & (acts != 0)
            rows = mine.any(1).nonzero()[:, 0]
            if len(rows):
                local = torch.where(mine, ids - index * self.features_per_group, 0)[rows]
                part: Tensor = group(decode, torch.where(mine, acts, 0)[rows], local)
                part = part.to(acts.device)
                total = part.new_zeros(len(acts), part.shape[1]) if total is None else total
                total = total.index_add(0, rows, part)
        if total is None:  # no activation at all
            total = first(decode, acts, torch.zeros_like(ids)).to(acts.device)
        return total


def _encode(
    group: ExpertGroup,
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor | None,
    threshold: Tensor | None,
    center: Tensor | None,
    input_scale: Tensor,
    counts: Tensor | None,
    *,
    k: int | None,
    batch_topk: bool,
    in_order: bool,
) -> tuple[Tensor, Tensor]:
    """As `Experts.encode`, of one group; expert ids and feature ids are counted within it."""
    W_enc: Tensor = group.W_enc
    b_enc: Tensor | None = group.b_enc
    first = 0
    one_on_cpu = expert_ids.numel() == 1 and expert_ids.device.type == "cpu"
    if one_on_cpu and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        # views of the one expert needed: what is divided below may be as long as the dictionary
        first = int(expert_ids)
        own, expert_ids = slice(first, first + 1), torch.zeros_like(expert_ids)
        W_enc = W_enc[own]
        threshold = None if threshold is None else threshold[own]
        b_enc = None if b_enc is None else b_enc[own]
    acts, ids = ops.routed_encode(
        x,
        W_enc,
        None if b_enc is None else (wide(b_enc) / input_scale).to(W_enc.dtype),
        expert_ids,
        gates,
        k,
        None if threshold is None else threshold / input_scale,
        batch_topk,
        center,
        in_order,
        counts,
    )
    return acts, ids + first * W_enc.shape[1]


def _in_pair_order(
    parts: list[tuple[Tensor, Tensor, Tensor]], num_pairs: int
) -> tuple[Tensor, Tensor]:
    """(pairs, acts, ids) of each group -> acts, ids [num_pairs, s], padded with empty slots."""
    width = max((acts.shape[1] for _, acts, _ in parts), default=1)
    like_acts, like_ids = parts[0][1:]
    out_acts, out_ids = like_acts.new_zeros(num_pairs, width), like_ids.new_zeros(num_pairs, width)
    for pairs, acts, ids in parts:
        short = width - acts.shape[1]
        out_acts = out_acts.index_copy(0, pairs, nn.functional.pad(acts, (0, short)))
        # an empty slot repeats the row's first id, so that it still names the token's own expert
        out_ids[pairs] = torch.cat([ids, ids[:, :1].expand(-1, short)], 1)
    return out_acts, out_ids


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors [..., d] of one shape, in views [rows, d]; on a CPU so few at a time
    that they stay in cache. What is a single row, or not laid out row by row, comes as it is; of
    what is sharded over processes, the part that is this one's.

    Raises:
        ConfigError: it is sharded within rows.
    """
    tensors = tuple(held_here(t, whole_rows=True) for t in tensors)
    if tensors[0].ndim < 2 or not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    rows = [t.flatten(0, -2) for t in tensors]
    num, d = rows[0].shape
    block = max(1, _CACHED_BYTES // max(1, d * rows[0].element_size()))
    if rows[0].device.type != "cpu":
        block = max(1, num)
    yield from zip(*(torch.split(r, block) for r in rows), strict=True)


def held_here(weight: Tensor, whole_rows: bool = False) -> Tensor:
    """The part of a weight [..., d], sharded over processes (FSDP2), that is this process's.

    Raises:
        ConfigError: with `whole_rows`: its rows are cut, so that their lengths can't be kept here.
    """
    if not isinstance(weight, DTensor):
        return weight
    if whole_rows and any(place.is_shard(dim=weight.ndim - 1) for place in weight.placements):
        raise ConfigError(
            "a decoder is sharded within its rows, which are to keep length 1: shard experts or "
            "features."
        )
    return weight.to_local()


def project_rows(grads: Tensor, rows: Tensor) -> None:
    """Take away in place what of gradients [..., d] lies along their rows of length 1."""
    grads.addcmul_(rows, (grads * rows).sum(-1, keepdim=True), value=-1)


def normalize_rows(rows: Tensor) -> None:
    """Scale rows [..., d] in place to length 1, measured in at least float32; rows of 0 stay."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide_dtype(rows))
    rows.div_(length.clamp_min_(1e-12))


class _SplitExperts(Chunk):
    """W [E, m, d] of a checkpoint -> one part for each expert group of the model being loaded."""

    def get_target_patterns(self, target_patterns: list[str], **kwargs: Any) -> list[str]:
        return [
            target_patterns[0].replace(".0.", f".{index}.")
            for index in range(len(kwargs["model"].experts))
        ]


class _GroupedWeight(WeightConverter):
    """One tensor in the checkpoint, `experts.<group>.<name>` in memory, however many groups."""

    def reverse_transform(self) -> WeightConverter:
        (name,) = self.source_patterns
        return WeightConverter(f"experts.*.{name}", name, operations=[Concatenate(dim=0)])


def register_checkpoint_layout(model_type: str) -> None:
    """Tell transformers that checkpoints of this model type hold W_enc, W_dec, b_enc whole."""
    register_checkpoint_conversion_mapping(
        model_type,
        [
            _GroupedWeight(name, f"experts.0.{name}", operations=[_SplitExperts(dim=0)])
            for name in ("W_enc", "W_dec", "b_enc")
        ],
        overwrite=True,
    )


class Router(nn.Module):
    """Scores the experts for a token, in float32, so that all devices and dtypes choose alike."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))

    def forward(
        self, x: Tensor, center: Tensor, scale: Tensor, num_experts_per_token: int
    ) -> tuple[Tensor, ...]:
        """Route scale * x - center: x [n, d] -> logits, probs [n, E], expert ids [n, t]."""
        weight = wide(self.weight)
        with torch.autocast(x.device.type, enabled=False):
            # center goes into the bias: its gradient needs none of x
            bias = -(weight @ center.to(weight.dtype))
        return ops.route(x, weight * scale, bias, num_experts_per_token)
