"""Files of weights given to the commands: every tensor is accounted for, or the file is refused in one sentence."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from official import mctformer_to_official, toco_to_official
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny import MCTFORMER_OVERRIDES, METHOD, OVERRIDES, RESNET38_OVERRIDES, Ended
from torch import Tensor

import wsss
from wsss import InputError
from wsss.config import build, config_dir
from wsss.methods.toco import ToCo
from wsss.networks.cnn import CNN
from wsss.networks.mct import MCTEncoder
from wsss.networks.vit import ViTEncoder, create_timm

State = dict[str, Tensor]
Command = Callable[..., Ended]
VIT: dict[str, Any] = METHOD["backbone_args"]
CNN_OVERRIDES = [
    "method=cam",
    "method.backbone=test_resnet",
    "method.backbone_args={width: null, dropout: null, frozen_stages: null, batch_norm_momentum: null}",
    "transform.long_side=[32, 40]",
    *(o for o in RESNET38_OVERRIDES if not o.startswith("method.backbone_args")),
]
NETWORKS = {"vit": OVERRIDES, "mct": ["method=mctformer", *MCTFORMER_OVERRIDES], "cnn": CNN_OVERRIDES}
pytestmark = pytest.mark.filterwarnings("ignore:.*starts from random weights")


def classifier(kind: str) -> State:
    """A classifier of 1,000 classes whose body is that of the tests' network."""
    torch.manual_seed(0)
    if kind == "cnn":
        return dict(timm.create_model("test_resnet").state_dict())
    return dict(timm.create_model(METHOD["backbone"], **VIT).state_dict())


def saved(content: object, folder: Path, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def without(*parts: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if not any(part in name for part in parts)}


def filled(part: str, value: float) -> Callable[[State], State]:
    return lambda state: {n: torch.full_like(t, value) if part in n else t for n, t in state.items()}


def dinov2(state: State) -> State:
    gammas = {f"blocks.{block}.ls{layer}.gamma": torch.ones(32) for block in (0, 1) for layer in (1, 2)}
    return {"register_tokens": torch.zeros(1, 4, 32), "mask_token": torch.zeros(1, 32)} | state | gammas


WRONG: list[tuple[str, Callable[[State], State], str]] = [
    ("vit", lambda s: {f"x{i}": t for i, t in enumerate(s.values())}, "it lacks cls_token, pos_embed, patch_embed.pro"),
    ("vit", lambda s: {f"net.{n}": t for n, t in s.items()}, "and has unknown net.cls_token, net.pos_embed, net.patch"),
    ("vit", lambda s: {f"module.net.{n}": t for n, t in s.items()}, "and has unknown module.net.cls_token"),
    ("vit", lambda _: classifier("cnn"), "lacks cls_token, pos_embed, patch_embed.proj.weight (30 in all) and has unk"),
    ("vit", without("blocks.1."), "lacks blocks.1.norm1.weight, blocks.1.norm1.bias, blocks.1.attn.qkv.weight (12 in"),
    ("vit", dinov2, "has unknown register_tokens, mask_token, blocks.0.ls1.gamma (6 in all)"),
    ("vit", lambda s: without("register")(dinov2(s)), "has unknown blocks.0.ls1.gamma, blocks.0.ls2.gamma, blocks.1.l"),
    ("vit", lambda s: s | {"blocks.2.norm1.bias": torch.ones(32)}, "has unknown blocks.2.norm1.bias (1 in all)"),
    ("vit", lambda s: s | {"norm.bias": torch.ones(16)}, "has no float weights or another shape for norm.bias (1 in a"),
    ("vit", lambda s: s | {"norm.bias": torch.ones(32).long()}, "has no float weights or another shape for norm.bias"),
    ("vit", lambda s: s | {"pos_embed": torch.ones(17, 32)}, "another shape for pos_embed (1 in all)"),
    ("vit", filled("norm.weight", torch.nan), "has NaN or infinite values in norm.weight (1 in all)"),
    ("mct", without("blocks.1."), "lacks blocks.1.norm1.weight"),
    ("mct", dinov2, "has unknown register_tokens"),
    ("mct", lambda _: classifier("cnn"), "is no vision transformer"),
    ("cnn", lambda s: {f"x{i}": t for i, t in enumerate(s.values())}, "lacks conv1.0.weight"),
    ("cnn", lambda s: {f"net.{n}": t for n, t in s.items()}, "has unknown net.conv1.0.weight"),
    ("cnn", lambda _: classifier("vit"), "lacks conv1.0.weight, "),
    ("cnn", without("layer4."), "lacks layer4.0."),
    ("cnn", lambda s: s | {"layer5.0.conv1.weight": torch.ones(1)}, "has unknown layer5.0.conv1.weight (1 in all)"),
    ("cnn", filled("layer4.0.conv1.weight", torch.inf), "NaN or infinite values in layer4.0.conv1.weight (1 in all)"),
]


@pytest.mark.parametrize(("kind", "change", "said"), WRONG, ids=[f"{kind}-{said[:30]}" for kind, _, said in WRONG])
def test_files_that_do_not_fit_are_refused(
    command: Command, tmp_path: Path, kind: str, change: Callable[[State], State], said: str
) -> None:
    path = saved(change(classifier(kind)), tmp_path)
    ended = command("train", *NETWORKS[kind], f"method.weights={path}", f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 2
    assert said in ended.err
    assert f"weights file {path} " in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_was_loaded_is_told_and_stored(command: Command, tmp_path: Path, kind: str) -> None:
    state = classifier(kind)
    path, run = saved({"model": state}, tmp_path), tmp_path / "run"
    ended = command("train", *NETWORKS[kind], f"method.weights={path}", f"hydra.run.dir={run}")
    assert ended.code == 0, ended.err
    body = [n for n in state if not n.startswith(("head.", "fc.")) and not n.endswith("num_batches_tracked")]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    told = f"{len(body)} of {len(body)} tensors of {path} (sha256 {digest})"
    assert ended.out.count(f"loaded {told}") == 1
    mean = (0.5, 0.5, 0.5) if kind == "cnn" else (0.485, 0.456, 0.406)
    assert ended.out.count(f"images are normalised with mean {mean} and standard deviation") == 1
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["wsss"]["loaded"] == [told]


def test_a_training_script_s_settings_are_named(command: Command, tmp_path: Path) -> None:
    path = saved({"model": classifier("vit"), "args": argparse.Namespace(lr=1)}, tmp_path)
    ended = command("train", *OVERRIDES, f"method.weights={path}", f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 2
    assert "a Python object, argparse.Namespace" in ended.err
    line = ended.err.partition("is their key: ")[2]
    exec(line)  # in the working directory of this test
    assert torch.load("stripped.pth", weights_only=True)["model"].keys() == classifier("vit").keys()
    path = saved({"model": {}, "args": argparse.Namespace()}, tmp_path, "checkpoint.pth")
    ended = command("eval", f"checkpoint={path}", "dataset=shapes")
    assert ended.code == 2
    assert f"checkpoint {path} cannot be read" in ended.err
    assert "argparse.Namespace" in ended.err
    assert ended.err.count("\n") == 1


def test_a_recipe_s_tag_that_the_backbone_lacks(command: Command, voc_root: Path) -> None:
    ended = command("train", "dataset=voc", f"dataset.root={voc_root}", "method.backbone=deit_tiny_patch16_224")
    assert ended.code == 2
    assert "a timm tag of deit_tiny_patch16_224, which has fb_in1k: give one of these" in ended.err
    assert "start without by method.weights=null" in ended.err


# --- the network's output is that of timm's own loading ---------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: {f"module.{n}": t for n, t in s.items()},
        lambda s: {f"module.backbone.{n}": t for n, t in s.items()},
        lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}},
        lambda s: {
            "student": {},
            "teacher": {f"backbone.{n}": t for n, t in s.items()} | {"head.mlp.0.bias": s["norm.bias"]},
        },
        without("head."),
    ],
    ids=["module", "module.backbone", "state_dict model", "DINO", "no head"],
)
def test_names_that_all_fit_without_a_prefix(tmp_path: Path, wrapped: Callable[[State], Any]) -> None:
    state = classifier("vit")
    path = str(saved(wrapped(state), tmp_path))
    for network in (ViTEncoder(METHOD["backbone"], path, VIT, -2).vit, MCTEncoder(2, METHOD["backbone"], path, VIT)):
        assert torch.equal(network.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("backbone", "trained", "wanted"),
    [
        ("vit_tiny_patch16_224", VIT, VIT),
        ("vit_tiny_patch16_224", VIT, VIT | {"img_size": 48}),
        ("vit_tiny_patch16_224", VIT, VIT | {"patch_size": 4}),
        ("deit_tiny_patch16_224", VIT, VIT | {"img_size": 64, "patch_size": 16}),
        ("test_resnet", {}, {"global_pool": "", "output_stride": 16}),
        ("test_convnext", {}, {"global_pool": ""}),
        ("tf_efficientnet_lite0", {}, {"global_pool": ""}),
    ],
)
def test_the_output_is_that_of_timms_own_loading(
    tmp_path: Path, backbone: str, trained: dict[str, Any], wanted: dict[str, Any], suffix: str
) -> None:
    torch.manual_seed(0)
    state = dict(timm.create_model(backbone, **trained).state_dict())
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    overlay = {"state_dict": dict(state)}
    theirs = timm.create_model(backbone, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **wanted)
    ours, told = create_timm(backbone, str(path), wanted)
    assert told is not None
    image = torch.randn(2, 3, wanted.get("img_size", 64), wanted.get("img_size", 64))
    assert torch.equal(ours.eval()(image), theirs.eval()(image))


def test_weights_of_a_tag_come_with_their_head_and_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is strict where the head is the weights' own: what the hub lacks is not left random."""
    hub = dict(timm.create_model("test_resnet").state_dict())
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(hub))
    network = CNN("test_resnet", "r160_in1k")
    assert network.loaded == "all tensors of timm weights test_resnet.r160_in1k"
    assert "fc.weight" not in network.body.state_dict()
    assert torch.equal(network.body.state_dict()["conv1.0.weight"], hub["conv1.0.weight"])
    assert network(torch.randn(1, 3, 64, 64)).shape[2:] == (2, 2)
    hub.pop("conv1.0.weight")
    with pytest.raises(InputError, match=r"test_resnet.r160_in1k does not fit test_resnet: .*conv1\.0\.weight"):
        CNN("test_resnet", "r160_in1k")


# --- mean and standard deviation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cam", "rcm_mam"])
def test_images_are_normalised_as_the_weights_of_timm_expect(tmp_path: Path, name: str) -> None:
    node: Any = OmegaConf.load(config_dir() / "method" / f"{name}.yaml")
    node.backbone, node.backbone_args = "tf_efficientnet_lite0", None
    half, imagenet = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
    method = build(node, "method", num_classes=2, classes=None)
    assert (method.mean, method.loaded) == (imagenet, [])
    node.weights = str(saved(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path))
    method = build(node, "method", num_classes=2, classes=None)
    assert (method.mean, method.std, len(method.loaded)) == (half, half, 1)
    checkpoint: dict[str, Any] = {}
    method.on_save_checkpoint(checkpoint)
    assert checkpoint["wsss"]["mean"] == list(half)
    if name == "rcm_mam":
        node.weights = None
        node.init_checkpoint = str(saved(checkpoint | {"state_dict": method.state_dict()}, tmp_path, "first.ckpt"))
        assert build(node, "method", num_classes=2, classes=None).mean == half


def test_the_papers_transformers_keep_imagenets_mean(tmp_path: Path) -> None:
    """That of augreg's weights is 0.5."""
    path = str(saved(classifier("vit"), tmp_path))
    assert timm.create_model(METHOD["backbone"], **VIT).pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert ToCo(2, **METHOD | {"weights": path}).mean == (0.485, 0.456, 0.406)


# --- attention heads of the papers' own checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12)])
def test_heads_follow_from_the_width(tmp_path: Path, width: int, heads: int) -> None:
    sizes = {"embed_dim": width, "depth": 1, "patch_size": 16, "img_size": 32, "num_heads": heads}
    torch.manual_seed(0)
    toco = ToCo(2, **METHOD | {"backbone_args": sizes, "aux_layer": -1})
    path = saved(toco_to_official(toco.state_dict()), tmp_path)
    told = {"aux_layer": -1, "decoder_dilation": 1}
    loaded = wsss.load(path, **told).method
    assert loaded.encoder.vit.blocks[0].attn.num_heads == heads
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded.eval()(image)["cam"], toco.eval()(image)["cam"])


def test_heads_that_nothing_tells_are_asked_for(command: Command, tmp_path: Path) -> None:
    toco = ToCo(2, **METHOD)
    node: Any = OmegaConf.load(config_dir() / "method/mctformer.yaml")
    node.backbone, node.backbone_args, node.attention_layers = METHOD["backbone"], VIT, 2
    mctformer = build(node, "method", num_classes=2, classes=None)
    for name, official in (
        ("toco", toco_to_official(toco.state_dict())),
        ("mctformer", {"model": mctformer_to_official(mctformer.state_dict())}),
    ):
        path = saved(official, tmp_path, f"{name}.pth")
        (tmp_path / "images").mkdir(exist_ok=True)
        ended = command("eval", f"checkpoint={path}", "dataset=shapes", "dataset.num_classes=2")
        assert ended.code == 2
        assert "transformer of width 32" in ended.err
        assert "give method.backbone_args.num_heads=N" in ended.err
        assert ended.err.count("\n") == 1


def test_tocos_own_vit_small_is_refused_by_its_shapes(command: Command, tmp_path: Path) -> None:
    """Eight blocks, ratio 3, queries without a bias."""
    toco = ToCo(2, **METHOD | {"backbone_args": VIT | {"mlp_ratio": 3.0, "qkv_bias": False}})
    path = saved(toco_to_official(toco.state_dict()), tmp_path)
    ended = command("eval", f"checkpoint={path}", "dataset=shapes", "dataset.num_classes=2")
    assert ended.code == 2
    assert "lacks encoder.blocks.0.attn.qkv.bias" in ended.err


# --- released checkpoints of ResNet38 ---------------------------------------------------------------------------------

SLIM = {"width": 4}
RELEASED = {"cam": "backbone.body.", "seam": "backbone.", "ppc": "backbone."}


def resnet38(name: str) -> tuple[Any, State]:
    """A slim method, and its weights under the released names."""
    torch.manual_seed(0)
    node: Any = OmegaConf.load(config_dir() / "method" / f"{name}.yaml")
    node.backbone_args = SLIM
    method = build(node, "method", num_classes=4, classes=None)
    state = method.state_dict()
    for key, tensor in state.items():
        if "bn" in key and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return method.eval(), {key.removeprefix(RELEASED[name]).removeprefix("head."): t for key, t in state.items()}


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("old", [True, False])
def test_released_resnet38_checkpoints(command: Command, tmp_path: Path, name: str, old: bool) -> None:
    method, state = resnet38(name)
    if old:
        state = {f"module.{key}": t.half() for key, t in state.items() if not key.endswith("num_batches_tracked")}
    path = saved(state, tmp_path, "released.pth")
    predictor = wsss.load(path)
    assert type(predictor.method) is type(method)
    assert predictor.classes == ("0", "1", "2", "3")
    image = torch.randn(1, 3, 40, 48)
    if not old:
        assert torch.equal(predictor.method(image)["cam"], method(image)["cam"])
    if old:
        sizes = ["dataset.size=32", "dataset.val_size=2", "dataset.num_classes=4", "method.cam_scales=[1.0]"]
        ended = command("eval", f"checkpoint={path}", "dataset=shapes", *sizes, "data.num_workers=0")
        assert ended.code == 0, ended.err
        assert "cam_miou" in ended.out


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("cam", without("fc8"), "weights of a ResNet38 without a classifier"),
        ("cam", without("b5.conv_branch1"), "lacks b5.conv_branch1.weight (1 in all)"),
        ("cam", lambda s: s | {"fc9.weight": torch.ones(1)}, "has unknown fc9.weight (1 in all)"),
        ("cam", lambda s: s | {"conv1a.weight": torch.ones(())}, "unexpected shape in conv1a.weight"),
        ("cam", lambda s: s | {"conv1a.weight": torch.ones(5000, 3, 3, 3)}, "unexpected shape in conv1a.weight, "),
        ("cam", lambda s: s | {"fc8.weight": torch.ones(4, 7, 1, 1)}, "unexpected shape in fc8.weight"),
        ("seam", without("fc8"), "lacks fc8.weight (1 in all)"),
        ("seam", lambda s: s | {"f8_5.weight": torch.ones(1)}, "has unknown f8_5.weight (1 in all)"),
        ("seam", lambda s: s | {"fc8.weight": torch.ones(1, 256, 1, 1)}, "has no class beside the background"),
        ("ppc", lambda s: s | {"fc_proj.weight": torch.ones(128, 3, 1, 1)}, "unexpected shape in fc_proj.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_released_resnet38_checkpoints_that_do_not_fit(
    command: Command, tmp_path: Path, name: str, change: Callable[[State], State], said: str
) -> None:
    path = saved(change(resnet38(name)[1]), tmp_path, "released.pth")
    ended = command("eval", f"checkpoint={path}", "dataset=shapes")
    assert ended.code == 2
    assert ended.err.startswith(f"wsss-eval: checkpoint {path} ")
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_imagenet_weights_of_mxnet_are_no_checkpoint(command: Command, tmp_path: Path) -> None:
    path = saved({}, tmp_path, "a1.params")
    ended = command("eval", f"checkpoint={path}", "dataset=shapes")
    assert ended.code == 2
    assert f"train from it with method.weights={path}" in ended.err
