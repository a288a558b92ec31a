"""The one registry of losses: a short name from the papers to a module."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from wsss import InputError

LOSSES: dict[str, type[nn.Module]] = {}
"""Every registered loss by key."""

_Loss = TypeVar("_Loss", bound=type[nn.Module])


def register(*keys: str) -> Callable[[_Loss], _Loss]:
    """Class decorator that makes a loss available as `build(key)` under each of `keys`.

    A loss that is no mean over images says in `over_batch` how many of its first arguments hold one row for each image:
    those that `gather_losses=true` brings together from all devices.

    Raises:
        ValueError: a key is taken by another class.
    """

    def add(loss: _Loss) -> _Loss:
        for key in keys:
            if LOSSES.get(key, loss) is not loss:
                raise ValueError(f"loss key {key!r} is already taken by {LOSSES[key].__name__}")
            LOSSES[key] = loss
        return loss

    return add


def build(key: str, **arguments: Any) -> nn.Module:
    """Build the loss registered as `key` with its constructor's `arguments`.

    Raises:
        InputError: the key or an argument is unknown; the message lists the known ones.
    """
    if key not in LOSSES:
        raise InputError(f"unknown loss {key!r}: known are {', '.join(sorted(LOSSES))}")
    signature = inspect.signature(LOSSES[key])  # nn.Module's own is (*args, **kwargs)
    known = [n for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [name for name in arguments if name not in known]
    if unknown:
        listed = ", ".join(known) or "none"
        raise InputError(f"loss {key!r} has no argument {', '.join(unknown)}: its arguments are {listed}")
    return LOSSES[key](**arguments)
