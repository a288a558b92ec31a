"""Parameter groups, learning-rate schedules, moving averages."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig


def warmup_poly(
    max_steps: int, warmup_steps: int = 1500, warmup_ratio: float = 1e-6, power: float = 0.9
) -> Callable[[int], float]:
    """Linear warm-up, then polynomial decay of the absolute step: the factor of the base rate at a step.

    At step t < warmup_steps the factor is 1 - (1 - t / warmup_steps) * (1 - warmup_ratio), afterwards
    (1 - t / max_steps) ** power, so the rate drops at the end of the warm-up (ToCo, AFA). From max_steps on it
    stays at its last value.
    """

    def factor(step: int) -> float:
        step = min(step, max_steps - 1)
        if step < warmup_steps:
            return 1 - (1 - step / warmup_steps) * (1 - warmup_ratio)
        return (1 - step / max_steps) ** power

    return factor


def warmup_cosine(
    epochs: int, lr: float, min_lr: float, warmup_lr: float, warmup_epochs: int
) -> Callable[[int], float]:
    """Learning rate by epoch as timm's scheduler gives it when it is stepped after each epoch (DeiT, MCTformer).

    Epoch e learns with the rate of max(e - 1, 0): linear from `warmup_lr` to `lr` for `warmup_epochs`, then
    `min_lr + (lr - min_lr) (1 + cos(pi t / epochs)) / 2`, in which the warm-up is not left out of t. `lr` itself is
    never reached.
    """

    def rate(epoch: int) -> float:
        t = min(max(epoch - 1, 0), epochs - 1)
        if t < warmup_epochs:
            return warmup_lr + t * (lr - warmup_lr) / warmup_epochs
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * t / epochs)) / 2

    return rate


def cosine(max_steps: int) -> Callable[[int], float]:
    """From 1 to 0 as half a cosine: the factor of the base rate at a step."""
    return lambda step: (1 + math.cos(math.pi * min(step / max_steps, 1.0))) / 2


def parameter_groups(
    network: nn.Module, lr: float, weight_decay: float, heads: Sequence[nn.Module] = ()
) -> list[dict[str, Any]]:
    """The four groups of PSA and its followers; parameters without gradient are in none, and a group may be empty.

    Weights learn with `lr`, biases twice as fast and without decay; those of `heads`, which start from random
    weights, ten times faster, i.e. 10 `lr` and 20 `lr`.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": factor * lr, "weight_decay": decay}
        for factor, decay in ((1, weight_decay), (2, 0.0), (10, weight_decay), (20, 0.0))
    ]
    fast = {parameter for head in heads for parameter in head.parameters()}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[2 * (parameter in fast) + (name.rpartition(".")[2] == "bias")]["params"].append(parameter)
    return groups


def adamw(parameters: Sequence[Any], **settings: Any) -> AdamW:
    """AdamW of parameters or groups of them, in one kernel where all are on a GPU."""
    groups = [entry["params"] if isinstance(entry, dict) else [entry] for entry in parameters]
    fused = all(parameter.is_cuda for group in groups for parameter in group)
    optimizer = AdamW(parameters, fused=fused or None, **settings)
    # gradients are unscaled before it, so that Lightning can clip them in half precision
    optimizer._step_supports_amp_scaling = False
    return optimizer


def stepwise(optimizer: Optimizer, factor: Callable[[int], float]) -> "OptimizerLRSchedulerConfig":
    """For Lightning: an optimizer whose base rates are multiplied by a function of the optimizer step."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def sgd_poly(
    network: nn.Module,
    heads: Sequence[nn.Module],
    max_steps: int,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    power: float,
) -> "OptimizerLRSchedulerConfig":
    """SGD on `parameter_groups` whose rates fall as (1 - step / max_steps) ** power (PSA and its followers)."""
    optimizer = SGD(parameter_groups(network, lr, weight_decay, heads), momentum=momentum)
    return stepwise(optimizer, warmup_poly(max_steps, warmup_steps=0, power=power))


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], momentum: float) -> None:
    """Exponential moving average in place: of `average` the share `momentum` stays."""
    torch._foreach_lerp_(list(average), list(current), 1 - momentum)
