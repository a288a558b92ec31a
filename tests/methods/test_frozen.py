"""Methods on a frozen network: features kept on disk, a classifier and a decoder of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kill import compare
from PIL import Image
from tiny import FROZEN_OVERRIDES, Ended
from torch import Tensor, nn

from wsss import InputError
from wsss.data.base import LabelledImages
from wsss.data.features import FINER, FeatureImages, FeatureStore, feature_names, fill
from wsss.data.pseudo import PseudoMasks
from wsss.methods.frozen_cam import FrozenCAM, propagate
from wsss.methods.frozen_segmentation import FrozenSegmentation
from wsss.networks.frozen import FrozenNetwork
from wsss.writing import write_mask

Command = Callable[..., Ended]
NETWORK: dict[str, Any] = {"backbone": "resnet10t", "weights": None, "size": 64}
SETTINGS = [override for override in FROZEN_OVERRIDES if not override.startswith("features.")]


@pytest.fixture(scope="module")
def frozen() -> FrozenNetwork:
    torch.manual_seed(0)
    return FrozenNetwork("resnet10t", None, None, 64)


@pytest.mark.parametrize(("power", "steps"), [(1.0, 1), (8.0, 3)])
def test_propagation(power: float, steps: int) -> None:
    rng = np.random.default_rng(0)
    cam, features = rng.random((2, 3, 4, 5)), rng.standard_normal((2, 7, 4, 5))
    features[0, :, 0, 0] = 0  # a position without features keeps nothing
    expected = np.zeros((2, 3, 20))
    for image in range(2):
        maps = cam[image].reshape(3, 20)
        for _ in range(steps):
            spread = np.zeros_like(maps)
            for i in range(20):
                a = features[image].reshape(7, 20)[:, i]
                weights = np.zeros(20)
                for j in range(20):
                    b = features[image].reshape(7, 20)[:, j]
                    lengths = max(np.linalg.norm(a), 1e-12) * max(np.linalg.norm(b), 1e-12)
                    weights[j] = max(a @ b / lengths, 0) ** power
                spread[:, i] = maps @ weights / (weights.sum() + 1e-6)
            maps = spread
        expected[image] = maps
    got = propagate(torch.from_numpy(cam), torch.from_numpy(features), power, steps)
    np.testing.assert_allclose(got.flatten(2).numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("backbone", "arguments", "cell"),
    [
        ("resnet10t", None, 16),
        ("resnet10t", {"output_stride": 16}, 16),
        ("tf_efficientnet_lite0", {"output_stride": 16}, 16),
        ("vit_tiny_patch16_224", {"depth": 3, "embed_dim": 24, "num_heads": 2}, 16),
        ("deit_tiny_distilled_patch16_224", {"depth": 3, "embed_dim": 24, "num_heads": 2}, 16),
    ],
)
def test_networks(backbone: str, arguments: dict[str, Any] | None, cell: int) -> None:
    """A middle stage and the last on one grid; the mean of `final` is what the network's own classifier sees."""
    network = FrozenNetwork(backbone, None, arguments, 96)
    assert network.cell == cell
    image = torch.randn(2, 3, 96, 64)
    maps = network(image)
    assert maps.stages.shape[-2:] == maps.final.shape[-2:] == (96 // cell, 64 // cell)
    assert (maps.stages.shape[1], maps.final.shape[1]) == network.widths
    torch.testing.assert_close(network.finish(maps.stages), maps.final)
    if "efficientnet" in backbone:
        torch.testing.assert_close(maps.final, network.body.forward_features(image))
    if backbone.startswith(("vit", "deit")):  # another scale of an image is no whole number of patches
        assert network(image[..., :41]).final.shape[-2:] == (6, 2)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.train().training


def test_working_size(frozen: FrozenNetwork) -> None:
    assert frozen.resize(torch.zeros(1, 3, 300, 200)).shape[-2:] == (64, 48)
    assert frozen.resize(torch.zeros(1, 3, 8, 400)).shape[-2:] == (16, 64)  # at least a cell
    network = FrozenNetwork("resnet10t", None, None, 360)
    longest = {max(network.resize(torch.zeros(1, 3, 8, side)).shape[-2:]) for side in range(330, 345)}
    assert longest == {round(360 / 16) * 16}
    same = torch.rand(1, 3, 64, 32)
    assert frozen.resize(same) is same


def test_key(frozen: FrozenNetwork) -> None:
    torch.manual_seed(0)
    again = FrozenNetwork("resnet10t", None, None, 64)
    assert again.key == frozen.key
    again.size = 96
    assert again.key != frozen.key
    torch.manual_seed(0)
    finer = FrozenNetwork("resnet10t", None, {"output_stride": 16}, 64)
    assert finer.cell == frozen.cell
    assert finer.key != frozen.key
    torch.manual_seed(1)
    assert FrozenNetwork("resnet10t", None, None, 64).key != frozen.key


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    rng, paths = np.random.default_rng(0), []
    for index, size in enumerate([(64, 48), (64, 48), (40, 64)]):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(paths[-1])
    return LabelledImages(["a", "b"], ["0", "1", "2"], paths, np.eye(2, dtype=np.float32)[[0, 1, 1]])


def as_is(items: Any, total: int) -> Any:
    return items


def test_store(images: LabelledImages, tmp_path: Path, frozen: FrozenNetwork) -> None:
    store = FeatureStore(tmp_path / "store", frozen.key, 1)
    names, asked = feature_names(images), []

    def compute(image: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(image)
        return frozen(frozen.resize(image))

    def normalise(image: np.ndarray) -> Tensor:
        return torch.from_numpy(image).permute(2, 0, 1).float() / 255

    how: Any = (normalise, compute, 0, as_is)
    assert fill(store, images, names, *how) == (3, [])
    assert fill(store, images, names, *how) == (0, [])
    assert len(asked) == 3
    item = FeatureImages(images, store, names, pooled=False, window=4)[2]
    expected = frozen(frozen.resize(normalise(item["image"])[None]))
    np.testing.assert_allclose(item["features"], expected.stages[0].numpy(), rtol=2e-3, atol=1e-4)
    mean = FeatureImages(images, store, names, pooled=True, window=4).training_item(2, np.random.default_rng(0))["mean"]
    np.testing.assert_allclose(mean, expected.final[0].mean(dim=(1, 2)).numpy(), rtol=2e-3, atol=1e-4)
    assert set(images[2]) == {"image", "label", "id"}
    # a damaged file is said, and made anew
    store.path(names[1]).write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"cannot be read any more: repeat the command"):
        store.read(names[1], "stages")
    assert fill(store, images, names, *how) == (1, [])
    # another image under the same path
    images.images[0].write_bytes(images.images[2].read_bytes())
    assert feature_names(images)[0] != names[0]


def test_limit(images: LabelledImages, tmp_path: Path) -> None:
    other, store = FeatureStore(tmp_path, "other", 1), FeatureStore(tmp_path, "key", 1e-5)  # 10 kB
    for index in range(4):
        other.write(str(index), np.zeros((4, 16, 16), np.float16), np.zeros(4, np.float16))  # 2.5 kB each
    store.make_room(["a"], 5000)
    assert len(list(tmp_path.glob("other/*.npz"))) < 3
    with pytest.raises(InputError, match=r"the features of 1 images take .* features.limit_gb=1e-05: set it higher"):
        store.make_room(["a"], 20_000)
    with pytest.raises(InputError, match=r"features.limit_gb is 0"):
        FeatureStore(tmp_path, "key", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"features.folder=.* cannot be made"):
        FeatureStore(tmp_path / "file", "key", 1)


def test_windows(images: LabelledImages, tmp_path: Path) -> None:
    """Features and masks are mirrored and moved together, 0 and 255 around them."""
    store, names = FeatureStore(tmp_path / "store", "key", 1), feature_names(images)
    for index, (name, (h, w)) in enumerate(zip(names, [(4, 3), (4, 3), (3, 4)], strict=True)):
        ids = np.arange(h * w).reshape(h, w) % 3
        store.write(name, ids[None].astype(np.float16) + 1, np.zeros(1, np.float16))
        size = images[index]["image"].shape[:2]
        fine = ids.repeat(32, axis=0).repeat(32, axis=1)
        rows, columns = (np.arange(n) * m // n for n, m in zip(size, fine.shape, strict=True))
        write_mask(tmp_path / "masks" / f"{index}.png", fine[rows][:, columns].astype(np.uint8))
    train = FeatureImages(PseudoMasks(images, str(tmp_path / "masks")), store, names, pooled=False, window=4)
    seen = set()
    for draw in range(20):
        for index in range(3):
            item = train.training_item(index, np.random.default_rng(draw))
            features, mask = item["features"][0], item["pseudo_mask"]
            assert features.shape == (4, 4)
            assert mask.shape == (4 * FINER, 4 * FINER)
            centre = mask[FINER // 2 :: FINER, FINER // 2 :: FINER]
            assert torch.equal(torch.where(features > 0, features.long() - 1, 255), centre)
            seen.add((index, tuple(features.flatten().tolist())))
    assert len(seen) == 3 * 4  # mirrored or not, at one place or the other


def test_unchanged_and_gated(frozen: FrozenNetwork) -> None:
    torch.manual_seed(0)
    method = FrozenSegmentation(2, **NETWORK, gate=0.4)
    nn.init.constant_(method.classifier.bias, -5.0)
    with torch.no_grad():
        method.classifier.weight.zero_()
        method.classifier.bias[1] = 5.0
    seg = method.eval()(torch.randn(1, 3, 64, 64))["seg"]
    assert (seg[:, 1] == -1e4).all()
    assert (seg[:, [0, 2]] > -1e3).all()
    nn.init.constant_(method.classifier.bias, -5.0)
    with torch.no_grad():
        method.classifier.bias[0] = -4.0  # finds nothing, and this rather than the other
    seg = method(torch.randn(1, 3, 64, 64))["seg"]
    assert (seg[:, 2] == -1e4).all()
    assert (seg[:, :2] > -1e3).all()
    with pytest.raises(InputError, match=r"gate is 0.4, which needs the classifier"):
        FrozenSegmentation(2, **NETWORK, gate=0.4, losses={"ce": {}})
    with pytest.raises(InputError, match="propagation is"):
        FrozenCAM(2, **NETWORK, propagation={"power": 8})
    with pytest.raises(InputError, match=r"method.size is 16: expected a whole number of at least 32"):
        FrozenCAM(2, backbone="resnet10t", weights=None, size=16)


def test_chain(command: Command, tmp_path: Path) -> None:
    """Trained, evaluated, labelled, decoded, predicted; from features and from images the figures are the same."""
    cache = f"features.folder={tmp_path / 'cache'}"
    cam = tmp_path / "cam"
    trained = command("train", "method=frozen_cam", *SETTINGS, cache, f"hydra.run.dir={cam}")
    assert trained.code == 0, trained.err
    assert "10 of them computed now" not in trained.out
    assert "features of 6 images, 6 of them computed now" in trained.out
    checkpoint = f"checkpoint={cam / 'checkpoints/last.ckpt'}"
    labelled = command("label", checkpoint, cache, f"out={tmp_path / 'labels'}", "refine=crf_quick", "num_workers=0")
    assert labelled.code == 0, labelled.err
    assert "features of 6 images, 0 of them computed now" in labelled.out
    masks = f"pseudo_masks={tmp_path / 'labels/masks'}"
    arguments = ["method=frozen_segmentation", *SETTINGS, cache, masks, "monitor=null", "method.channels=8"]
    seg = tmp_path / "seg"
    decoded = command("train", *arguments, f"hydra.run.dir={seg}")
    assert decoded.code == 0, decoded.err
    before, after = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (cam, seg))
    for name, tensor in before["state_dict"].items():
        if name.startswith("frozen."):
            assert torch.equal(after["state_dict"][name], tensor), name
    again = command(
        "train", *arguments, f"hydra.run.dir={tmp_path / 'again'}", "features.folder=" + str(tmp_path / "c2")
    )
    assert again.code == 0, again.err
    assert compare(seg, tmp_path / "again")[1] == []
    (tmp_path / "photographs").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)).save(
        tmp_path / "photographs/a.png"
    )
    for run in (cam, seg):
        predicted = command(
            "predict", f"checkpoint={run / 'checkpoints/last.ckpt'}", f"images={tmp_path / 'photographs'}",
            f"out={tmp_path / run.name / 'out'}",
        )  # fmt: skip
        assert predicted.code == 0, predicted.err
        assert (tmp_path / run.name / "out/masks/a.png").is_file()
