"""Learning-rate schedules."""

from collections.abc import Callable


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
