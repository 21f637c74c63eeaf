"""Adam for an SAE: clip, projection, Adam and unit decoder rows, in one pass over the weights.

At these sizes an optimizer step is limited by memory: every weight, gradient and moment is read
once and, but for the gradient, written once. Doing the four things one after another reads and
writes weights and gradients twice more; a backend's kernel (`adam_rows`) takes each row through all
four. Where there is none, a block of rows goes through them while it is in a CPU's cache; on other
devices a block is a whole weight. Of a weight that is sharded over processes (FSDP2) each process
steps the rows it holds; only the norm is of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adam import Adam

from hf_switch_sae import ops
from hf_switch_sae.errors import ConfigError
from hf_switch_sae.experts import normalize_rows, row_blocks
from hf_switch_sae.model import SwitchSAE


class SwitchSAEAdam(Adam):
    """`torch.optim.Adam(fused=True)` that also clips, and keeps the decoder's rows at length 1.

    One step does what these do, to rounding, in the same order:

        clip_grad_norm_(sae.parameters(), max_grad_norm)
        sae.project_decoder_grad()
        adam.step()
        sae.normalize_decoder()

    but for `.grad`, of which nothing is promised afterwards. State and `state_dict()` are those of
    `torch.optim.Adam`, so checkpoints, schedulers and accelerate take it as one.

    Args:
        sae: the SAE whose parameters are optimized; or several, each a parameter group of its own
            that is clipped by itself: the steps are those of one optimizer for each.
        lr, betas, eps: as of `torch.optim.Adam`; `lr` may be one for each SAE.
        max_grad_norm: gradients of a larger global norm are scaled down to it; None: never.

    Raises:
        ConfigError: experts are offloaded.

    Attributes:
        grad_norm: the last step's global norm before clipping, 0-d; None before the first step or
            without `max_grad_norm`. Of several SAEs the first's; `grad_norms` has one for each.
    """

    def __init__(
        self,
        sae: SwitchSAE | Sequence[SwitchSAE],
        lr: float | Tensor | Sequence[float] = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        saes = [sae] if isinstance(sae, SwitchSAE) else list(sae)
        rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(saes)
        if any(group.W_dec.device.type == "meta" for each in saes for group in each.experts):
            raise ConfigError("offloaded experts can't be trained: load the SAE without offload.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm={max_grad_norm} must be above 0, or None.")
        groups = [
            {"params": list(each.parameters()), "lr": rate}
            for each, rate in zip(saes, rates, strict=True)
        ]
        super().__init__(groups, lr=rates[0], betas=betas, eps=eps, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler is to unscale before the clipping
        self.max_grad_norm = max_grad_norm
        self.grad_norms: list[Tensor] = []
        self.hold(saes)

    def hold(self, saes: Sequence[SwitchSAE]) -> None:
        """Take these SAEs' decoders for the ones it holds, after its parameters were replaced."""
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
                was made, or a loaded state is of an Adam with `amsgrad`.
        """
        self._check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.grad_norms = []
        for group in self.param_groups:
            scale = self._clip(group)
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *lists)  # type: ignore[no-untyped-call]
            weights, grads, means, squares, _, steps = lists
            if not steps:
                continue
            torch._foreach_add_(steps, 1)
            for tensors in zip(weights, grads, means, squares, steps, strict=True):
                is_decoder = id(tensors[0]) in self._decoders
                self._step_weight(group, scale, is_decoder, *map(_held_here, tensors))
        return loss

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
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not parameter.grad.is_contiguous():
                    parameter.grad = parameter.grad.contiguous()

    def _clip(self, group: dict[str, Any]) -> Tensor | None:
        """What a group's gradients are to be multiplied by, 0-d; None if they stay as they are."""
        if self.max_grad_norm is None:
            return None
        norm = _total_norm([p.grad for p in group["params"] if p.grad is not None])
        self.grad_norms.append(norm)
        scale = self.max_grad_norm / (norm + 1e-6)  # as clip_grad_norm_ has it
        if scale.device.type == "cpu" and scale >= 1:
            return None
        return scale.clamp(max=1.0)

    def _step_weight(
        self,
        group: dict[str, Any],
        scale: Tensor | None,
        is_decoder: bool,
        weight: Tensor,
        grad: Tensor,
        mean: Tensor,
        square: Tensor,
        step: Tensor,
    ) -> None:
        if not weight.numel():
            return
        kernel = _kernel_for(group, weight, grad, mean, square)
        if kernel is not None:
            kernel(
                weight,
                grad,
                mean,
                square,
                step,
                unit_rows=is_decoder,
                scale=1.0 if scale is None else scale,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
            )
            return
        divisor = None if scale is None else scale.to(weight.device).reciprocal()
        for w, g, m, v in zip(*map(row_blocks, (weight, grad, mean, square)), strict=True):
            if is_decoder:
                g.addcmul_(w, (g * w).sum(-1, keepdim=True), value=-1)
            torch._fused_adam_(
                [w],
                [g],
                [m],
                [v],
                [],
                [step],
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                grad_scale=divisor,  # which it divides by, in `.grad` too
            )
            if is_decoder:
                normalize_rows(w)


def _kernel_for(group: dict[str, Any], *tensors: Tensor) -> Callable[..., None] | None:
    """The backend's `adam_rows`, if it has one for a weight, gradient and moments as they lie."""
    plain = all(t.is_contiguous() and t.dtype == tensors[0].dtype for t in tensors)
    if not plain or group["weight_decay"] or group["maximize"]:
        return None
    return getattr(ops.backend_for(tensors[0].device, tensors[0].dtype), "adam_rows", None)


def _total_norm(grads: list[Tensor]) -> Tensor:
    """As `get_total_norm`, 0-d; on a CPU by dot products, which read twice as fast."""
    plain = (g.device.type == "cpu" and g.dtype == torch.float32 for g in grads)
    if grads and all(plain) and not any(isinstance(grad, DTensor) for grad in grads):
        flat = [grad.view(-1) for grad in grads]
        return torch.stack([torch.dot(grad, grad) for grad in flat]).sum().sqrt()
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _held_here(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is this process's."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
