"""Router and experts: which expert a token goes to, and what its expert makes of it.

Room   tokens with their experts (`Routed`) and what to keep (`Rule`) -> acts, ids -> rows.
How    A device map places modules, not slices of a tensor. So the experts lie in groups, each a
       module that may be on another device, on the CPU or on disk. With one group, the default,
       nothing is ever copied or joined.
Beware An offloaded group's weights are on `meta` outside its forward: accelerate's hooks bring them
       in around `ExpertGroup.forward`. So every use of a weight is a function handed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from hf_switch_sae import ops
from hf_switch_sae.ops.precision import wide

_T = TypeVar("_T")


class Routed(NamedTuple):
    """Tokens, and the experts that each of them goes to."""

    x: Tensor
    """[n, d], floating, in the LM's own units, less `b_dec` where the SAE subtracts it."""
    expert_ids: Tensor
    """[n, t] int64."""
    gates: Tensor | None
    """[n, t], the router's weights; None for 1."""
    input_scale: Tensor
    """[], what thresholds and the encoder's bias are divided by."""
    center: Tensor | None = None
    """[d], `b_dec`, if it has been taken off x: only its gradient is of interest."""
    in_order: bool = False
    """A promise that expert_ids [n, 1] rise, so that nothing has to be sorted."""

    def visits_of(self, first: int, num_experts: int) -> tuple[Tensor, Routed]:
        """The (token, expert) pairs [p] that go to some experts, and these as tokens of their own.

        Pair p is of token p // t. Expert ids are then counted from `first`.
        """
        experts = self.expert_ids.reshape(-1)
        pairs = (experts // num_experts == first // num_experts).nonzero()[:, 0]
        gates = None if self.gates is None else self.gates.reshape(-1, 1)[pairs]
        own = (experts[pairs] - first)[:, None]
        x = self.x[pairs // self.expert_ids.shape[1]]
        # some of rising ids rise too
        return pairs, Routed(x, own, gates, self.input_scale, self.center, self.in_order)


class Rule(NamedTuple):
    """Which of its experts' activations a token keeps."""

    k: int | None
    """The k largest; None: all that are active."""
    threshold: Tensor | None = None
    """[E, m] in scaled units, what an activation must exceed; None for 0."""
    batch_topk: bool = False
    """The k * n largest of all tokens together instead, ties at the border included."""
    counted: Tensor | None = None
    """[n] bool, the tokens that `batch_topk` is over; None for all."""

    def of(self, first: int, num_experts: int) -> Rule:
        """The rule of some experts alone."""
        threshold = self.threshold
        return self._replace(
            threshold=None if threshold is None else threshold[first : first + num_experts]
        )


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

    def encode(self, tokens: Routed, rule: Rule) -> tuple[Tensor, Tensor]:
        """As `ops.routed_encode`, over the groups: acts, ids [n, slots] on the tokens' device."""
        x, alone = tokens.x, len(self) == 1
        if alone or not len(x):
            rule = rule if alone else rule._replace(batch_topk=False)
            acts, ids = next(iter(self))(_encode, tokens, rule)
            return acts.to(x.device), ids.to(x.device)
        # with `batch_topk` the border lies between all groups' features: each keeps all of its own
        in_group = Rule(None if rule.batch_topk else rule.k, rule.threshold)
        # each group takes the tokens that visit it, with expert ids counted within it
        (n, t), parts = tokens.expert_ids.shape, []
        for index, group in enumerate(self):
            first = index * self.experts_per_group
            pairs, own = tokens.visits_of(first, self.experts_per_group)
            if len(pairs):
                acts, ids = group(_encode, own, in_group.of(first, self.experts_per_group))
                ids = ids.to(x.device) + index * self.features_per_group
                parts.append((pairs, acts.to(x.device), ids))
        # a token's experts may lie in several groups: its k are chosen among all of them
        acts, ids = (part.reshape(n, -1) for part in _in_pair_order(parts, n * t))
        return ops.keep_largest(acts, ids, rule.k, rule.batch_topk, rule.counted)

    def reconstruct_with(self, candidates: Tensor, k: int, tokens: Routed) -> Tensor:
        """[n, d]: what some features alone would make of the tokens, decoder bias left out.

        Args:
            candidates: [E, m] bool, the features that may be active.
            k: how many of them per token, the largest.
            tokens: n of them.
        """
        # an infinite threshold keeps every other feature out without a gather
        open_to_none = torch.full(
            candidates.shape, torch.inf, dtype=torch.float32, device=candidates.device
        )
        threshold = open_to_none.masked_fill_(candidates, 0.0)
        acts, ids = self.encode(tokens, Rule(k, threshold))
        return self.decode(acts, ids, tokens.in_order)

    @torch.no_grad()
    def errors_of_each(
        self, wanted: Tensor, x: Tensor, gates: Tensor | None, input_scale: Tensor, rule: Rule
    ) -> Tensor:
        """[n, E]: the squared error of each token, had that expert been its only one.

        Args:
            wanted: [n, d], what to reconstruct, decoder bias left out.
            x: [n, d], what the experts see of them.
            gates: [n, 1] or None, the weight that any of them would have had.
            input_scale, rule: as of `encode`.
        """
        n, num_experts = len(x), len(self) * self.experts_per_group
        # every token once for each expert, sorted by expert already
        expert_ids = torch.arange(num_experts, device=x.device).repeat_interleave(n)[:, None]
        gates = None if gates is None else gates.repeat(num_experts, 1)
        everywhere = x.repeat(num_experts, 1)
        tokens = Routed(everywhere, expert_ids, gates, input_scale, in_order=True)
        acts, ids = self.encode(tokens, rule)
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
        # a wrong id would belong to no group, and vanish without a word
        ops.check_ids(ids, len(self) * self.features_per_group)
        for index, group in enumerate(self):
            # slots of 0 are padding and would bring in weights for nothing
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


def _encode(group: ExpertGroup, tokens: Routed, rule: Rule) -> tuple[Tensor, Tensor]:
    """As `Experts.encode`, of one group; expert ids and feature ids are counted within it."""
    W_enc: Tensor = group.W_enc
    b_enc: Tensor | None = group.b_enc
    expert_ids, threshold, first = tokens.expert_ids, rule.threshold, 0
    one_on_cpu = expert_ids.numel() == 1 and expert_ids.device.type == "cpu"
    if one_on_cpu and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        # views of the one expert needed: what is divided below may be as long as the dictionary
        first = int(expert_ids)
        own, expert_ids = slice(first, first + 1), torch.zeros_like(expert_ids)
        W_enc = W_enc[own]
        threshold = None if threshold is None else threshold[own]
        b_enc = None if b_enc is None else b_enc[own]
    acts, ids = ops.routed_encode(
        tokens.x,
        W_enc,
        None if b_enc is None else (wide(b_enc) / tokens.input_scale).to(W_enc.dtype),
        expert_ids,
        tokens.gates,
        rule.k,
        threshold=None if threshold is None else threshold / tokens.input_scale,
        batch_topk=rule.batch_topk,
        center=tokens.center,
        in_order=tokens.in_order,
        counted=rule.counted,
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
            # center goes into the bias, so that its gradient does not need x
            bias = -(weight @ center.to(weight.dtype))
        return ops.route(x, weight * scale, bias, num_experts_per_token)
