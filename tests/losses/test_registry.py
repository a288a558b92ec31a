"""The registry of losses, and losses outside of any method."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import wsss.losses
from wsss import InputError
from wsss.losses import LOSSES, build, register


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type[nn.Module]]]:
    """The registry, restored afterwards."""
    before = dict(LOSSES)
    yield LOSSES
    LOSSES.clear()
    LOSSES.update(before)


class Outside(nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x.mean()


def test_every_key_builds() -> None:
    assert {"cls", "aux_cls", "ptc", "ctc", "seg", "dense_energy"} <= LOSSES.keys()
    assert all(isinstance(build(key), loss) for key, loss in LOSSES.items())
    assert all(hasattr(wsss.losses, name) for name in wsss.losses.__all__)


def test_unknown_key_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"unknown loss 'ptx': known are .*ctc.*dense_energy.*ptc"):
        build("ptx")


def test_unknown_argument_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"loss 'ctc' has no argument temp: its arguments are temperature"):
        build("ctc", temp=1)
    with pytest.raises(InputError, match=r"loss 'cls' has no argument weight: its arguments are none"):
        build("cls", weight=1)


def test_a_taken_key_is_refused(registry: dict[str, type[nn.Module]]) -> None:
    with pytest.raises(ValueError, match="'ptc' is already taken by PatchTokenContrastLoss"):
        register("ptc")(Outside)
    assert registry["ptc"] is not Outside


def test_a_loss_from_outside(registry: dict[str, type[nn.Module]]) -> None:
    assert register("outside")(Outside) is Outside
    assert register("outside")(Outside) is Outside  # the same class once more is no conflict
    assert build("outside", factor=2.0)(torch.tensor([1.0, 3.0])) == 4


def test_plain_loop_trains() -> None:
    torch.manual_seed(0)
    tokens = nn.Parameter(torch.randn(2, 9, 8))
    label = torch.arange(9).remainder(3).expand(2, 9)
    loss, optimizer, values = build("ptc"), torch.optim.SGD([tokens], lr=5.0), []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(tokens, label)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.3 * values[0]
