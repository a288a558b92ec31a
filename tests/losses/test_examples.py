"""The examples in the losses' docstrings give what they say."""

import doctest
import inspect

import pytest
import torch

from wsss.losses import LOSSES, build


@pytest.mark.parametrize("loss", sorted(set(LOSSES.values()), key=lambda loss: loss.__name__))
def test_examples(loss: type) -> None:
    known = {"torch": torch, "build": build}
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(loss, loss.__name__, inspect.getmodule(loss), globs=known)
    assert len(example.examples) >= 2
    torch.manual_seed(0)
    assert doctest.DocTestRunner().run(example).failed == 0
