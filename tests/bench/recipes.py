"""One training run from a cache of activations: settings -> figures. What is not set is the recipe.

A plain loop over what the package offers: `SwitchSAE.forward`, `backward`, `SwitchSAEAdam` and a
schedule. Variants that the package does not have are written here.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from hf_switch_sae import SwitchSAE, SwitchSAEAdam, SwitchSAEConfig
from hf_switch_sae.sae import encoding
from hf_switch_sae.sae.output import SwitchSAEOutput
from hf_switch_sae.training.initialization import directions_of, start_features_at

from .minilm import DEVICE, WIDTH, batches, rows_of

SAMPLE = 16_384  # rows that the start and the threshold are measured on


_OF_A_ROUTER = {"experts_per_token", "balance", "z", "router_init", "router_gain", "router_lr"}
_OF_A_ROUTER |= {
    "gate",
    "gate_start",
    "gate_end",
    "temperature",
    "freeze",
    "distill",
    "distill_tau",
    "balance_by",
    "second",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings of one run, each `name=value` on the command line."""

    seed: int = 0
    tokens: int = 400_000
    passes: int = 1
    experts: int = 8
    features: int = 6144
    k: int = 32
    experts_per_token: int = 1
    activation: str = "batch_topk"
    bias: bool = False
    batch: int = 512
    lr: float = 3e-3
    warmup: float = 0.05
    """Share of the steps."""
    decay: float = 0.3
    """Share of the steps, the last, in which the rate falls to 0."""
    shape: str = "linear"
    """Of the decay: linear, cosine or sqrt."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    """Largest gradient norm; 0: none."""
    ema: float = 0.0
    """Decay per step of an average of the weights that is used at the end; 0: the last weights."""
    rms: float = 1.0
    """Root mean square of the scaled inputs."""
    balance: float = 0.16
    balance_by: str = "tokens"
    """What is spread evenly over the experts: tokens, or their active features."""
    z: float = 0.0
    auxk: float = 0.0
    k_aux: int = 64
    dead_after: int = 5000
    router_init: str = "kmeans"
    """uniform, or kmeans: spherical k-means of a sample."""
    router_gain: float = 1.0
    """Factor on the router's start."""
    router_lr: float = 1.0
    """Factor on the router's learning rate."""
    encoder_gain: float = 0.0
    """The encoder starts as so many times the decoder; 0: as the package has it."""
    feature_init: str = "random"
    """random, or data: features begin at rows, as in the recipe (earlier runs: random)."""
    resample: int = 0
    """So many times in the first half, features that were not active since are started anew."""
    k_start: int = 0
    """Active features a token at first, falling to k within the first half; 0: k from the start."""
    gate: str = "one"
    """What multiplies activations: the probability p, its root, 1 (one), p of logits whose factor
    rises to `temperature` (heat), p / mean p that turns into 1 (fade); the last two between
    `gate_start` and `gate_end`, shares of the run."""
    gate_start: float = 0.3
    gate_end: float = 0.7
    temperature: float = 4.0
    freeze: bool = False
    """Whether the router is frozen, and its balance left alone, from gate_start on."""
    distill: float = 0.1
    """Weight of the router's cross entropy to the experts that would reconstruct best."""
    distill_tau: float = 0.05
    """Temperature of that target, relative to the error."""
    second: float = 0.0
    """Weight of the error that each token's second choice of expert makes alone; with it the router
    is also taught, on every token, which of its first two choices was better."""

    def __post_init__(self) -> None:
        if self.experts == 1:  # there is no router: what is said of it means nothing
            for field in dataclasses.fields(self):
                if field.name in _OF_A_ROUTER:
                    object.__setattr__(self, field.name, field.default)

    @classmethod
    def parse(cls, words: list[str]) -> Run:
        """From `name=value`."""
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        found = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in kinds:
                raise SystemExit(f"a run has no setting {name!r}; there are {', '.join(kinds)}.")
            found[name] = value in ("1", "True") if kinds[name] is bool else kinds[name](value)
        return cls(**found)

    def words(self) -> list[str]:
        """As on the command line: what is not the default."""
        own = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        return [f"{f.name}={value}" for f, value in own if value != f.default]

    def rate(self, at: float) -> float:
        """Learning rate at a share of the run."""
        up = min(1.0, at / self.warmup) if self.warmup else 1.0
        down = min(1.0, (1 - at) / self.decay) if self.decay else 1.0
        if self.shape == "cosine":
            down = 0.5 - 0.5 * math.cos(math.pi * down)
        elif self.shape == "sqrt":
            down = 1 - math.sqrt(1 - down)
        return self.lr * up * down


class Variant(SwitchSAE):
    """An SAE whose router weighs activations as `Run.gate` says."""

    rule, mixed, temperature, mean = "p", 0.0, 1.0, 0.4

    def gates(self, probs: Tensor, expert_ids: Tensor) -> Tensor | None:
        gates = _the_packages_own_gates(self, probs, expert_ids)
        if gates is None or self.rule == "p":
            return gates
        if self.rule == "root":
            return gates.sqrt()
        if self.rule == "heat":
            sharper = (probs.clamp_min(1e-30).log() * self.temperature).softmax(-1)
            return sharper.gather(1, expert_ids)
        if self.training:
            self.mean += 0.02 * (float(gates.detach().mean()) - self.mean)
        return gates / self.mean * (1 - self.mixed) + self.mixed


_the_packages_own_gates = encoding.gates_of
encoding.gates_of = Variant.gates  # every SAE of this script is a Variant


def start(run: Run, cache: Path) -> Variant:
    """A fresh SAE, scaled and centered on the data."""
    torch.manual_seed(run.seed)
    config = SwitchSAEConfig(
        hidden_size=WIDTH,
        num_features=run.features,
        num_experts=run.experts,
        num_experts_per_token=run.experts_per_token,
        k=run.k,
        activation=run.activation,
        encoder_bias=run.bias,
        apply_router_probs=run.gate != "one",
        router_aux_loss_coef=run.balance if run.balance_by == "tokens" else 0.0,
        router_z_loss_coef=run.z,
        router_best_expert_loss_coef=run.distill,
        router_best_expert_temperature=run.distill_tau,
        second_expert_loss_coef=run.second,
        auxk_loss_coef=run.auxk,
        k_aux=run.k_aux,
        dead_after_tokens=run.dead_after,
    )
    sae = Variant(config).train().to(DEVICE)
    sae.rule = run.gate
    sample = rows_of(cache, "train", 0)[:SAMPLE].float().to(DEVICE)
    with torch.no_grad():
        power = float(sample.square().sum(-1).mean())
        sae.input_scale.fill_(run.rms * math.sqrt(WIDTH / power))
        center = sample.mean(0) * sae.input_scale
        sae.b_dec.copy_(center)
        if run.encoder_gain:
            sae.W_enc.copy_(sae.W_dec * run.encoder_gain)
        if run.experts > 1:
            sae.b_router.copy_(center)
            if run.router_init == "kmeans":
                centered = sample * sae.input_scale - center
                directions = directions_of(centered, run.experts, run.seed)
                sae.router.weight.copy_(directions * 4 / math.sqrt(WIDTH))
            sae.router.weight.mul_(run.router_gain)
        if run.feature_init == "data":
            start_features_at(sample * sae.input_scale - center, sae, run.seed)
    return sae


def train(run: Run, cache: Path) -> dict[str, float]:
    """Train, and measure on the validation rows."""
    began, cpu = time.time(), time.process_time()
    sae = start(run, cache)
    optimizer = SwitchSAEAdam(sae, run.lr, (run.beta1, run.beta2), run.eps, run.clip or None)
    if run.router_lr != 1:
        own = [sae.router.weight, sae.b_router]
        rest = optimizer.param_groups[0]
        rest["params"] = [p for p in rest["params"] if all(p is not o for o in own)]
        optimizer.add_param_group({"params": own})
    parameters = list(sae.parameters())
    average = [p.detach().clone() for p in parameters] if run.ema else []
    steps = run.tokens // run.batch
    every = steps // (2 * run.resample) if run.resample else 0
    fired = torch.zeros(run.features, dtype=torch.bool, device=DEVICE)
    for step, x in enumerate(batches(cache, run.tokens, run.batch, run.seed, run.passes)):
        for group, factor in zip(optimizer.param_groups, (1.0, run.router_lr), strict=False):
            group["lr"] = factor * run.rate((step + 0.5) / steps)
        passed = (step / steps - run.gate_start) / (run.gate_end - run.gate_start)
        sae.mixed = min(1.0, max(0.0, passed))
        sae.temperature = run.temperature**sae.mixed
        if run.k_start:
            sae.config.k = round(run.k + (run.k_start - run.k) * max(0.0, 1 - 2 * step / steps))
        output = sae(x)
        loss = output.loss
        if run.balance_by == "active" and run.experts > 1:
            loss = loss + run.balance * balance_of_active(output)
        if run.freeze and sae.mixed:
            loss = loss - run.balance * output.router_aux_loss
        loss.backward()
        if run.freeze and sae.mixed:
            sae.router.weight.grad = sae.b_router.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if every and step < steps / 2:
            fired[output.features.ids[output.features.acts > 0]] = True
            if (step + 1) % every == 0:
                more = rows_of(cache, "train", 0)[:8192].float().to(DEVICE)
                restart(sae, optimizer, fired, more, run.seed + step)
                fired.zero_()
        if average:
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, max(1 - run.ema, 1 / (step + 1)))
    if average:
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
        sae.normalize_decoder()
    spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.time() - began}
    return measure(sae, cache) | {"steps": steps} | {k: round(v, 1) for k, v in spent.items()}


@torch.no_grad()
def restart(sae: Variant, optimizer: SwitchSAEAdam, fired: Tensor, x: Tensor, seed: int) -> None:
    """Features that have not fired begin again at errors of tokens of their expert."""
    output = sae(x)
    error = (x - output.reconstruction) * sae.input_scale
    size, experts = sae.config.num_features // sae.config.num_experts, sae.config.num_experts
    chosen = torch.zeros(len(x), dtype=torch.long, device=x.device)
    if experts > 1:
        chosen = output.router_logits.argmax(1)
    pick = torch.Generator().manual_seed(seed)
    w_dec, w_enc = sae.W_dec.flatten(0, 1), sae.W_enc.flatten(0, 1)
    length = w_enc[fired].norm(dim=-1).mean()
    for expert in range(experts):
        dead = (~fired[expert * size : (expert + 1) * size]).nonzero()[:, 0] + expert * size
        own = error[chosen == expert]
        if not len(own) or not len(dead):
            continue
        odds = own.square().sum(-1).square().cpu()
        taken = torch.multinomial(odds, len(dead), len(dead) > len(own), generator=pick)
        rows = torch.nn.functional.normalize(own[taken.to(own.device)], dim=-1)
        w_dec[dead], w_enc[dead] = rows, rows * length / 2
        for weight, state in optimizer.state.items():
            if weight.shape == sae.W_dec.shape:
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name].flatten(0, 1)[dead] = 0


def balance_of_active(output: SwitchSAEOutput) -> Tensor:
    """The balance loss, of active features instead of tokens."""
    probs = output.router_logits.softmax(-1)
    active = (output.features.acts > 0).sum(1).to(probs.dtype)
    chosen = torch.zeros_like(probs[0]).index_add_(0, probs.argmax(-1), active)
    total = (probs * active[:, None]).sum(0)
    return probs.shape[1] * (chosen * total).sum() / active.sum().square()


@torch.no_grad()
def measure(sae: Variant, cache: Path) -> dict[str, float]:
    """Held-out FVU and L0, features that never fire there, gates and loads."""
    sae.eval()
    if sae.config.activation == "batch_topk":
        sae.calibrate(rows_of(cache, "train", 0)[:SAMPLE].float().to(DEVICE).split(2048))
    rows, config = rows_of(cache, "validation", 0).to(DEVICE), sae.config
    error = active = gate = 0.0
    fired = torch.zeros(config.num_features, device=DEVICE)
    loads = torch.zeros(config.num_experts, device=DEVICE)
    for part in rows.split(4096):
        x = part.float()
        output = sae(x)
        acts, ids = output.features.acts, output.features.ids
        error += float((x - output.reconstruction).double().square().sum())
        active += float((acts > 0).sum())
        fired[ids[acts > 0]] = 1
        if output.router_logits is not None:
            probs = output.router_logits.softmax(-1)
            gate += float(probs.amax(-1).sum())
            loads += torch.bincount(probs.argmax(-1), minlength=len(loads))
    total = float((rows.double() - rows.double().mean(0)).square().sum())
    found = {"fvu": round(error / total, 5), "l0": round(active / len(rows), 2)}
    found |= {"unused": round(1 - float(fired.mean()), 4)}
    if config.num_experts > 1:
        share = loads / loads.mean()
        found |= {"p": round(gate / len(rows), 3), "load_min": round(float(share.min()), 3)}
        found |= {"load_max": round(float(share.max()), 3)}
    return found
