"""Checkpoints of the original ToCo, CoSA and WeCLIP code: what is read from them, and what is said of unfit ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from official import cosa_to_official, read_official, toco_from_official, toco_to_official, weclip_to_official
from tiny import CLIP, WECLIP
from torch import Tensor

import wsss
from wsss import InputError
from wsss.checkpoints import read_checkpoint
from wsss.methods.cosa import CoSA
from wsss.methods.toco import ToCo
from wsss.methods.weclip import WeCLIP

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
    _, state, values, _ = read_official(ToCo, saved(official, tmp_path))
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
    _, state, values, _ = read_official(ToCo, saved(new, tmp_path))
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
        (lambda state: {"module.proj_head.x": torch.ones(2)}, r"has unknown proj_head\.x"),
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


# --- CoSA, which has ToCo's names -------------------------------------------------------------------------------------


@pytest.fixture
def stream(method: ToCo) -> State:
    """What CoSA's code saves of its student or its teacher."""
    return {name: tensor for name, tensor in toco_to_official(method.state_dict()).items() if "proj_head" not in name}


def test_a_network_of_cosa_becomes_both(stream: State, tmp_path: Path) -> None:
    name, state, values, asks = read_official(CoSA, saved({f"module.{key}": t for key, t in stream.items()}, tmp_path))
    assert (name, asks) == ("cosa", ())
    assert values == {key: value for key, value in ARGUMENTS.items() if key != "projector"}
    cosa = CoSA(backbone="vit_tiny_patch16_224", aux_layer=-1, **values)
    assert state.keys() == cosa.state_dict().keys()
    cosa.load_state_dict(state)
    for network in (cosa.student, cosa.teacher):
        assert all(torch.equal(stream[name], t) for name, t in cosa_to_official(network.state_dict()).items())


def test_either_file_is_known_by_its_names(method: ToCo, official: State, stream: State, tmp_path: Path) -> None:
    for state, kind in ((official, ToCo), (stream, CoSA)):
        path = saved({"model": state}, tmp_path)
        assert type(wsss.load(path, aux_layer=-1, backbone_args={"num_heads": 2}).method) is kind


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: {k: t for k, t in state.items() if k != "decoder.conv7.weight"},
            r"lacks decoder\.conv7\.weight",
        ),
        (lambda state: state | {"extra": torch.ones(1)}, r"has unknown extra"),
        (lambda state: state | {"classifier.weight": torch.ones(4, 12, 1, 1)}, r"unexpected shape in .*classifier"),
    ],
)
def test_what_does_not_fit_cosa_is_named(
    stream: State, tmp_path: Path, change: Callable[[State], State], said: str
) -> None:
    path = saved(change(stream), tmp_path)
    with pytest.raises(InputError, match=rf"no network of the original CoSA code: it .*{said}") as raised:
        wsss.load(path)
    assert "\n" not in str(raised.value)


# --- WeCLIP, whose tower is given by the command ----------------------------------------------------------------------


@pytest.fixture
def weclip() -> WeCLIP:
    torch.manual_seed(0)
    return WeCLIP(3, **WECLIP)


def test_what_weclip_has_learnt_is_read(weclip: WeCLIP, tmp_path: Path) -> None:
    """Without the tower in the file; the names are not known, and their embeddings random."""
    path = saved(weclip_to_official(weclip.state_dict()), tmp_path)
    _, _, values, asks = read_official(WeCLIP, path)
    assert values == {"num_classes": 3, "channels": 16, "decoder_depth": 1}
    assert asks == ("text",)
    told = {key: value for key, value in WECLIP.items() if key not in values}
    loaded = wsss.load(path, **told).method
    assert all(torch.equal(t, weclip.state_dict()[name]) for name, t in loaded.state_dict().items())
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(image)["seg"], weclip.eval()(image)["seg"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {k: t for k, t in s.items() if "linear_pred.bias" not in k}, r"lacks decoder\.linear_pred\.bias"),
        (lambda s: s | {"dino_fts_fuse.x": torch.ones(1)}, r"has unknown dino_fts_fuse\.x .*of WeCLIP\+"),
        (
            lambda s: {k: t for k, t in s.items() if "modulelist.1." not in k},
            r"has 1 layers of 16 channels, but fuses 32",
        ),
        (lambda s: s | {"encoder.visual.proj": torch.ones(4, 4)}, r"trained on another image tower of CLIP"),
    ],
)
def test_what_does_not_fit_weclip_is_named(
    weclip: WeCLIP, tmp_path: Path, change: Callable[[State], State], said: str
) -> None:
    path = saved(change(weclip_to_official(weclip.state_dict())), tmp_path)
    told = {key: value for key, value in (WECLIP | CLIP).items() if key not in ("channels", "decoder_depth")}
    with pytest.raises(InputError, match=said) as raised:
        wsss.load(path, **told)
    assert "\n" not in str(raised.value)


def test_no_file_of_ours_asks(tmp_path: Path, weclip: WeCLIP) -> None:
    """A file cannot bring the command's own start values back into use."""
    weclip.hparams.classes = ["a", "b", "c"]
    content = {"state_dict": weclip.state_dict(), "hyper_parameters": dict(weclip.hparams), "asks": ("text",)}
    content["wsss"] = {"method": "weclip", "classes": ["a", "b", "c"]}
    path = saved(content, tmp_path)
    assert "asks" not in read_checkpoint(path)
