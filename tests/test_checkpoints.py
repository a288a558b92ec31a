"""Checkpoints of the original ToCo code: what is read from them, and what is said about those that do not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from official import read_official, toco_from_official, toco_to_official
from torch import Tensor

from wsss import InputError
from wsss.methods.toco import ToCo

ARGUMENTS = {
    "num_classes": 3,
    "backbone_args": {
        "embed_dim": 12,
        "depth": 2,
        "patch_size": 8,
        "img_size": 24,
        "mlp_ratio": 2.0,
        "num_heads": None,
    },
    "decoder_channels": 5,
    "projector": {"hidden": 7, "bottleneck": 6, "out": 9},
}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def method() -> ToCo:
    return ToCo(backbone="vit_tiny_patch16_224", aux_layer=-1, **ARGUMENTS)  # type: ignore[arg-type]


@pytest.fixture
def official(method: ToCo) -> State:
    return {f"module.{name}": tensor for name, tensor in toco_to_official(method.state_dict()).items()}


def saved(state: object, folder: Path) -> str:
    path = folder / "model_iter_20000.pth"
    torch.save(state, path)
    return str(path)


def test_the_file_tells_the_method(method: ToCo, official: State, tmp_path: Path) -> None:
    _, state, values = read_official(ToCo, saved(official, tmp_path))
    assert values == ARGUMENTS
    assert state.keys() == method.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in method.state_dict().items())


def test_official_names(method: ToCo, official: State) -> None:
    names = {name.removeprefix("module.") for name in official}
    assert {"encoder.cls_token", "proj_head.last_layer.weight_g", "proj_head_t.last_layer.weight_v"} <= names
    assert official["module.encoder.head.weight"].shape == (1000, 12)
    assert toco_from_official(official).keys() == method.state_dict().keys()


def test_newer_weight_normalisation_half_precision_and_no_head(official: State, tmp_path: Path) -> None:
    new = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): tensor.half()
        for name, tensor in official.items()
        if "encoder.head." not in name
    }
    _, state, values = read_official(ToCo, saved(new, tmp_path))
    assert values == ARGUMENTS
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != f"module.{name}"}


def with_shape(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: state | {f"module.{name}": torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("classifier.weight"), r"lacks classifier\.weight \(1 in all\)"),
        (without("encoder.cls_token"), r"lacks encoder\.cls_token"),
        (without("proj_head_t.last_layer.weight_g"), r"lacks proj_head_t\.last_layer\.weight_g"),
        (with_shape("extra", 1), r"has unknown extra"),
        (with_shape("encoder.blocks.7.norm1.bias", 12), r"lacks encoder\.blocks\.2\..* has unknown encoder\.blocks\.7"),
        (with_shape("decoder.conv8.weight", 3, 5, 1, 1), r"unexpected shape in decoder\.conv8\.weight"),
        (with_shape("encoder.pos_embed", 1, 9, 12), r"positions that is no square in encoder\.pos_embed"),
        (with_shape("encoder.pos_embed", 1, 0, 12), r"unexpected shape in encoder\.pos_embed"),
        (with_shape("encoder.head.bias", 10), r"unexpected shape in encoder\.head\.bias"),
        (with_shape("classifier.weight", 3), r"unexpected shape in classifier\.weight"),
        (
            lambda state: state | {"module.encoder.cls_token": torch.ones(1, 1, 12).long()},
            r"no float weights .*cls_token",
        ),
        (lambda state: state | {"encoder.cls_token": torch.ones(1, 1, 12)}, r"some weights twice"),
        (lambda state: {"module.encoder.blocks.x": torch.ones(2)}, r"has unknown encoder\.blocks\.x"),
    ],
)
def test_what_does_not_fit_is_named(
    official: State, tmp_path: Path, change: Callable[[State], State], said: str
) -> None:
    path = saved(change(official), tmp_path)
    with pytest.raises(InputError, match=said) as raised:
        read_official(ToCo, path)
    assert str(raised.value).startswith(f"checkpoint {path} ")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_none_of_these(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_official(ToCo, tmp_path / "missing.pth")
    for content in ([1, 2], {"a": 1}, {}, {"model": Path("x")}):
        with pytest.raises(InputError, match=r"cannot be read|holds no state dict"):
            read_official(ToCo, saved(content, tmp_path))
