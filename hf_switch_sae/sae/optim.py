"""Adam for an SAE: clipping, projection, Adam and unit decoder rows in one pass over the weights.

How    At these sizes memory limits an optimizer step: every weight, gradient and moment is read
       once, and all but the gradient are written once. One after another, the four things would
       read and write weights and gradients twice more. A backend's kernel (`adam_rows`) takes each
       row through all four. Without a kernel a block of rows goes through them while it is in the
       CPU's cache; on other devices a block is a whole weight.
Beware Of a weight sharded over processes (FSDP2) each process steps the rows it holds; the norm is
       that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adam import Adam

from hf_switch_sae import ops
from hf_switch_sae.errors import ConfigError
from hf_switch_sae.lm.hookpoints import unwrap
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sae.rows import held_here, normalize_rows, project_rows, row_blocks


class SwitchSAEAdam(Adam):
    """`torch.optim.Adam(fused=True)` that also clips, and keeps the decoder's rows at length 1.

    One step does what these do, to rounding, in the same order:

        clip_grad_norm_(sae.parameters(), max_grad_norm)
        sae.project_decoder_grad()
        adam.step()
        sae.normalize_decoder()

    What `.grad` holds afterward is not defined. A weight without a gradient stays as it is. State
    and `state_dict()` are those of `torch.optim.Adam`, so it works with checkpoints, schedulers and
    accelerate.

    Args:
        sae: the SAE whose parameters are optimized, wrapped or not; or several. Each is a parameter
            group and is clipped by itself, as if it had an optimizer of its own.
        lr, betas, eps: as of `torch.optim.Adam`; `lr` may be a list with one rate for each SAE.
        max_grad_norm: gradients of a larger global norm are scaled down to it; None: never.

    Raises:
        ConfigError: no SAE, rates that are not one for each, or experts are offloaded.

    Attributes:
        grad_norm: the last step's global norm before clipping, 0-d; None before the first step or
            without `max_grad_norm`. Of several SAEs the first's; `grad_norms` has one for each.
    """

    def __init__(
        self,
        sae: nn.Module | Sequence[nn.Module],
        lr: float | Tensor | Sequence[float] = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        several = not isinstance(sae, nn.Module) or isinstance(sae, nn.ModuleList)
        given: list[Any] = [*cast(Sequence[Any], sae)] if several else [sae]
        inner = [unwrap(each) if isinstance(each, nn.Module) else each for each in given]
        saes = [each for each in inner if isinstance(each, SwitchSAE)]
        if not saes or len(saes) != len(given):
            names = ", ".join(type(each).__name__ for each in given) or "nothing"
            raise ConfigError(f"SwitchSAEAdam takes a SwitchSAE, or several; this is {names}.")
        rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(saes)
        if len(rates) != len(saes):
            raise ConfigError(f"{len(rates)} rates for {len(saes)} SAEs: give one for each.")
        if any(group.W_dec.device.type == "meta" for each in saes for group in each.experts):
            raise ConfigError("offloaded experts can't be trained: load the SAE without offload.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm={max_grad_norm} must be above 0, or None.")
        # a group each, as clipping takes the norm over one SAE's gradients
        groups = [
            {"params": list(each.parameters()), "lr": rate}
            for each, rate in zip(saes, rates, strict=True)
        ]
        super().__init__(groups, lr=rates[0], betas=betas, eps=eps, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler must unscale before clipping
        self.max_grad_norm = max_grad_norm
        self.grad_norms: list[Tensor] = []
        self.keep_unit_rows_of(saes)

    def keep_unit_rows_of(self, saes: Sequence[SwitchSAE]) -> None:
        """Note whose decoder rows are kept at length 1; again if the parameters were replaced."""
        self._decoders = {id(group.W_dec) for sae in saes for group in sae.experts}

    @property
    def grad_norm(self) -> Tensor | None:
        """The first SAE's, of the last step, before clipping."""
        return self.grad_norms[0] if self.grad_norms else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, recomputes the loss, which is returned.

        Raises:
            ConfigError: the optimizer is a copy, the SAE's parameters have been replaced since it
                was made, its decoder is sharded within rows, or a loaded state is of an Adam with
                `amsgrad`.
            BackendError: the backend asked for with `use_backend` can't compute these weights.
        """
        self._check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # everything that can be refused is looked at before the first value changes
        found = [self._weights_of(group) for group in self.param_groups]
        self.grad_norms = []
        for group, weights in zip(self.param_groups, found, strict=True):
            scale = self._clip(group)
            if weights:
                # one launch for all steps' counters
                torch._foreach_add_([each.step for each in weights], 1)
            for each in weights:
                _step_weight(group, scale, each)
        return loss

    def _weights_of(self, group: dict[str, Any]) -> list[_Weight]:
        """The weights of a group that have a gradient, and how to step each. Changes no value."""
        for parameter in group["params"]:
            self._lay_out_as(parameter)
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        self._init_group(group, *lists)  # type: ignore[no-untyped-call]
        weights, grads, means, squares, _, steps = lists
        found = []
        for tensors in zip(weights, grads, means, squares, steps, strict=True):
            is_decoder = id(tensors[0]) in self._decoders
            weight = held_here(tensors[0], whole_rows=is_decoder)
            grad, mean, square, step = map(held_here, tensors[1:])
            kernel = _kernel_for(group, weight, grad, mean, square) if weight.numel() else None
            found.append(_Weight(weight, grad, mean, square, step, is_decoder, kernel))
        return found

    def _lay_out_as(self, parameter: Tensor) -> None:
        """Give gradient and moments the weight's strides: torch's kernel walks memory in order,
        whatever the strides."""
        if parameter.grad is not None:
            parameter.grad = _with_strides_of(parameter, parameter.grad)
        state = self.state.get(parameter, {})
        for name in state.keys() & {"exp_avg", "exp_avg_sq"}:
            state[name] = _with_strides_of(parameter, state[name])

    def _check(self) -> None:
        parameters = {id(p) for group in self.param_groups for p in group["params"]}
        if not self.__dict__.get("_decoders", {None}) <= parameters:
            raise ConfigError(
                "this optimizer does not hold its SAE's parameters: it was copied, or they were "
                "replaced. Make SwitchSAEAdam(sae) after wrapping the SAE, and load_state_dict."
            )
        if any(group["amsgrad"] for group in self.param_groups):
            raise ConfigError(
                "SwitchSAEAdam has no amsgrad, as the loaded state: use torch's Adam."
            )

    def _clip(self, group: dict[str, Any]) -> Tensor | None:
        """The factor that clips a group's gradients, 0-d; None if they need no clipping."""
        if self.max_grad_norm is None:
            return None
        norm = _total_norm([p.grad for p in group["params"] if p.grad is not None])
        self.grad_norms.append(norm)
        scale = self.max_grad_norm / (norm + 1e-6)  # the formula of clip_grad_norm_
        if scale.device.type == "cpu" and scale >= 1:
            return None
        return scale.clamp(max=1.0)


class _Weight(NamedTuple):
    """The part of a weight that is this process's, and what belongs to it."""

    weight: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor
    is_decoder: bool
    kernel: Callable[..., None] | None
    """The backend's `adam_rows`."""


def _step_weight(group: dict[str, Any], scale: Tensor | None, of: _Weight) -> None:
    if not of.weight.numel():
        return
    tensors = of.weight, of.grad, of.mean, of.square
    if of.kernel is not None:
        of.kernel(
            *tensors,
            of.step,
            unit_rows=of.is_decoder,
            scale=1.0 if scale is None else scale,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
        )
        return
    # a state loaded from AdamW goes on as AdamW
    decoupled = group.get("decoupled_weight_decay", False)  # as in a state of AdamW
    adam = torch._fused_adamw_ if decoupled else torch._fused_adam_
    divisor = None if scale is None else scale.to(of.weight.device).reciprocal()
    for w, g, m, v in row_blocks(*tensors):
        # what points along a row of length 1 would only change its length
        if of.is_decoder:
            project_rows(g, w)
        adam(
            [w],
            [g],
            [m],
            [v],
            [],
            [of.step],
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            grad_scale=divisor,  # it divides by this, in `.grad` too
        )
        if of.is_decoder:
            normalize_rows(w)


def _kernel_for(group: dict[str, Any], *tensors: Tensor) -> Callable[..., None] | None:
    """The backend's `adam_rows`, if it has one for tensors laid out like these."""
    plain = all(t.is_contiguous() and t.dtype == tensors[0].dtype for t in tensors)
    if not plain or group["weight_decay"] or group["maximize"]:
        return None
    return getattr(ops.backend_for(tensors[0].device, tensors[0].dtype), "adam_rows", None)


def _total_norm(grads: list[Tensor]) -> Tensor:
    """As `get_total_norm`, 0-d; on a CPU by dot products, which take half the time."""
    plain = (g.device.type == "cpu" and g.dtype == torch.float32 for g in grads)
    if grads and all(plain) and not any(isinstance(grad, DTensor) for grad in grads):
        flat = [grad.reshape(-1) for grad in grads]
        return torch.stack([torch.dot(grad, grad) for grad in flat]).sum().sqrt()
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _with_strides_of(weight: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of a weight's shape with the weight's strides; copied if it has others."""
    both = weight.is_contiguous() and tensor.is_contiguous()  # strides of sizes 1 tell nothing
    if both or tensor.stride() == weight.stride():
        return tensor
    return torch.empty_like(weight, dtype=tensor.dtype).copy_(tensor)
