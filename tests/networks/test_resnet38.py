"""ResNet38: what learns, what stays, sizes; its weights from files of MXNet and PyTorch; the head of SEAM and PPC."""

import hashlib
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsss import InputError
from wsss.networks.mxnet import read_params
from wsss.networks.resnet38 import (
    IMAGENET_MD5,
    ResNet38,
    SEAMHead,
    mxnet_name,
    propagate,
    strongest_class,
)
from wsss.optim import parameter_groups

WIDTH = 4
LEGACY, V1, V2 = 0, 0xF993FAC8, 0xF993FAC9
FLAGS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.uint8: 3, torch.int32: 4, torch.int8: 5}
pytestmark = pytest.mark.filterwarnings("ignore:ResNet38 starts from random weights")


def slim(**arguments: Any) -> ResNet38:
    """A small network whose batch norms do something."""
    network = ResNet38(width=WIDTH, **arguments)
    for name, tensor in network.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return network


def image(height: int = 24, width: int = 24) -> Tensor:
    return torch.randn(2, 3, height, width)


# --- the body ---------------------------------------------------------------------------------------------------------


def test_the_papers_network_has_as_many_weights_as_the_papers() -> None:
    with torch.device("meta"):
        network = ResNet38()
    assert sum(p.numel() for p in network.parameters()) == 105_070_912
    assert len(tensors(network)) == 191
    assert network.channels == (512, 1024, 4096)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 53), (8, 9), (1, 1)])
def test_any_size_at_stride_8(height: int, width: int) -> None:
    network = slim().eval()
    for tap, channels in zip(network(image(height, width)), network.channels, strict=True):
        assert tap.shape == (2, channels, -(-height // 8), -(-width // 8))
        assert tap.min() >= 0


@pytest.mark.parametrize("frozen_stages", range(8))
def test_leading_stages_and_batch_norms_do_not_learn(frozen_stages: int) -> None:
    network = slim(frozen_stages=frozen_stages)
    if frozen_stages < 7:
        network(image()).conv6.sum().backward()
    blocks = {"conv1a": 1, "b2": 2, "b2_2": 2, "b3": 3, "b3_1": 3, "b4": 4, "b4_5": 4, "b5": 5, "b5_2": 5}
    for block, stage in (blocks | {"b6": 6, "b7": 7}).items():
        for name, parameter in network.get_submodule(block).named_parameters():
            learns = stage > frozen_stages and "bn" not in name
            assert parameter.requires_grad == learns, (block, name)
            assert (parameter.grad is not None) == learns, (block, name)
    assert not any(p.requires_grad for p in network.bn7.parameters())


def test_frozen_statistics_stay_in_training() -> None:
    network = slim(dropout=(0.0, 0.0))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = image()
    trained, evaluated = network.train()(images), network.eval()(images)
    assert network.train().training
    assert network.b7.training
    assert not any(module.training for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    assert torch.equal(trained.conv6, evaluated.conv6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_trained_batch_norms_and_those_of_frozen_stages() -> None:
    network = slim(batch_norm_momentum=0.25, frozen_stages=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = image()
    assert not torch.equal(network(images).conv6, network.eval()(images).conv6)
    network.train()(images).conv6.sum().backward()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            learns = not name.startswith("b2")
            assert module.momentum == 0.25
            assert module.training == learns, name
            assert (module.weight.grad is not None) == (module.bias.grad is not None) == learns, name
            changed = not torch.equal(network.state_dict()[f"{name}.running_mean"], before[f"{name}.running_mean"])
            assert changed == learns, name


def test_momentum_is_the_share_of_the_new_statistics() -> None:
    network = slim(batch_norm_momentum=0.25, frozen_stages=0)
    norm, images = network.b2.bn_branch2a, image()
    before = norm.running_mean.clone()
    network(images)
    torch.testing.assert_close(norm.running_mean, 0.75 * before + 0.25 * network.conv1a(images).mean(dim=(0, 2, 3)))


@pytest.mark.parametrize(("rates", "block"), [((0.9, 0.0), "b6"), ((0.0, 0.9), "b7")])
def test_dropout_is_that_of_its_block_and_in_training_only(rates: tuple[float, float], block: str) -> None:
    network, images = slim(dropout=rates), image()
    empty: dict[str, float] = {}
    for name, layer in network.named_modules():
        if name.startswith(("b6.bn", "b7.bn")):
            layer.weight.data.zero_()
            layer.bias.data.fill_(1)  # no ReLU empties a channel
        if name.startswith(("b6.conv_branch2", "b7.conv_branch2")):
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: empty.update({name: (inputs[0] == 0).all(dim=(2, 3)).float().mean()})
            )
    network(images)
    dropped = {name for name, share in empty.items() if share > 0.5}
    assert dropped == {f"{block}.conv_branch2b1", f"{block}.conv_branch2b2"}
    assert all(share == 0 for name, share in empty.items() if name not in dropped)
    network.eval()(images)
    assert not any(empty.values())


def test_frozen_last_blocks_drop_nothing() -> None:
    network, images = slim(dropout=(0.9, 0.9), frozen_stages=7), image()
    assert torch.equal(network(images).conv6, network.eval()(images).conv6)
    assert not network(images).conv6.requires_grad


@pytest.mark.parametrize(
    "arguments",
    [
        {"width": 0},
        {"frozen_stages": 8},
        {"frozen_stages": -1},
        {"dropout": (0.3, 1.5)},
        {"dropout": (-0.1, 0.5)},
        {"dropout": (0.3,)},
        {"batch_norm_momentum": 2.0},
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(arguments))} of ResNet38 is .*: expected"):
        ResNet38(**{"width": WIDTH} | arguments)


def test_random_weights_are_announced_where_they_cannot_learn(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="starts from random weights, and 2 frozen stages"):
        ResNet38(width=WIDTH, frozen_stages=2)
    with pytest.warns(UserWarning, match="starts from random weights"), torch.device("meta"):
        ResNet38(frozen_stages=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = ResNet38(width=WIDTH, frozen_stages=0)
        torch.save(network.state_dict(), tmp_path / "body.pth")
        ResNet38(str(tmp_path / "body.pth"), width=WIDTH, frozen_stages=2)


# --- parameter groups -------------------------------------------------------------------------------------------------


def test_groups() -> None:
    network = nn.ModuleDict({"body": slim(), "old": nn.Conv2d(1, 2, 1), "new": nn.Conv2d(1, 2, 1)})
    groups = parameter_groups(network, 0.1, 5e-4, [network["new"]])
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.2, 1.0, 2.0])
    assert [group["weight_decay"] for group in groups] == [5e-4, 0, 5e-4, 0]
    weights, *others = [set(group["params"]) for group in groups]
    old, new = network["old"], network["new"]
    assert others == [{old.bias}, {new.weight}, {new.bias}]
    assert weights == {p for p in network["body"].parameters() if p.requires_grad} | {old.weight}


def test_groups_of_a_trained_batch_norm() -> None:
    network = slim(batch_norm_momentum=3e-4, frozen_stages=0)
    weights, biases, *none = [group["params"] for group in parameter_groups(network, 0.1, 5e-4)]
    assert none == [[], []]
    assert {id(p) for p in biases} == {id(p) for name, p in network.named_parameters() if name.endswith("bias")}
    assert len(weights) + len(biases) == len(list(network.parameters()))


# --- weights of MXNet -------------------------------------------------------------------------------------------------


def written(arrays: Mapping[str, Tensor], magic: int = V2) -> bytes:
    """A `.params` file of one of the three layouts."""
    parts = [struct.pack("<3Q", 0x112, 0, len(arrays))]
    for tensor in arrays.values():
        head = {LEGACY: b"", V1: struct.pack("<I", V1), V2: struct.pack("<Ii", V2, 0)}[magic]
        shape = struct.pack(f"<I{tensor.ndim}{'I' if magic == LEGACY else 'q'}", tensor.ndim, *tensor.shape)
        parts += [head, shape, struct.pack("<3i", 1, 0, FLAGS[tensor.dtype]), tensor.numpy().tobytes()]
    parts.append(struct.pack("<Q", len(arrays)))
    for name in arrays:
        parts.append(struct.pack("<Q", len(name)) + name.encode())
    return b"".join(parts)


def saved(content: bytes, folder: Path) -> str:
    path = folder / "rna-a1.params"
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def mxnet_arrays() -> dict[str, Tensor]:
    """Random weights of a slim network under MXNet's names, with its ImageNet classifier."""
    arrays = {mxnet_name(name): torch.randn_like(t) for name, t in tensors(ResNet38(width=WIDTH)).items()}
    return arrays | {"arg:linear1000_weight": torch.randn(1000, 64 * WIDTH), "arg:linear1000_bias": torch.randn(1000)}


@pytest.mark.parametrize("magic", [LEGACY, V1, V2])
def test_params_import_exactly(mxnet_arrays: dict[str, Tensor], tmp_path: Path, magic: int) -> None:
    content = written(mxnet_arrays, magic)
    network, path = ResNet38(width=WIDTH), saved(content, tmp_path)
    digest = hashlib.sha256(content).hexdigest()
    assert network.load(path) == f"191 of 191 tensors of {path} (sha256 {digest})"
    for name, tensor in tensors(network).items():
        assert torch.equal(tensor, mxnet_arrays[mxnet_name(name)]), name
    assert torch.equal(ResNet38(path, width=WIDTH).bn7.running_var, network.bn7.running_var)


@pytest.mark.parametrize("magic", [LEGACY, V1, V2])
def test_params_of_any_type_at_any_byte(tmp_path: Path, magic: int) -> None:
    """The arrays of 8 bits shift the following ones to odd places."""
    arrays = {f"arg:{dtype}": torch.arange(21).reshape(3, 7).to(dtype) for dtype in FLAGS}
    arrays |= {"aux:after": torch.randn(1, 2, 3, 4, 5), "": torch.randn(1)}
    found = read_params(saved(written(arrays, magic), tmp_path))
    assert list(found) == list(arrays)
    for name, tensor in found.items():
        assert tensor.dtype == arrays[name].dtype
        assert torch.equal(tensor, arrays[name])


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("conv1a.weight", "arg:conv1a_weight"),
        ("b4.conv_branch1.weight", "arg:res4a_branch1_weight"),
        ("b4_3.conv_branch2b1.weight", "arg:res4b3_branch2b1_weight"),
        ("b4_3.bn_branch2a.weight", "arg:bn4b3_branch2a_gamma"),
        ("b6.bn_branch2b2.bias", "arg:bn6a_branch2b2_beta"),
        ("b2_1.bn_branch2b1.running_mean", "aux:bn2b1_branch2b1_moving_mean"),
        ("bn7.running_var", "aux:bn7_moving_var"),
    ],
)
def test_names_in_mxnet(name: str, theirs: str) -> None:
    assert mxnet_name(name) == theirs


@pytest.mark.parametrize("magic", [LEGACY, V1, V2])
def test_a_params_file_cut_anywhere_is_refused(tmp_path: Path, magic: int) -> None:
    content = written({"arg:a": torch.randn(2, 3), "aux:b": torch.randn(5)}, magic)
    for size in range(len(content)):
        with pytest.raises(InputError, match=r"rna-a1\.params cannot be read .*: expected .*, but the file has \d+; "):
            read_params(saved(content[:size], tmp_path))


def header(count: int = 1, magic: int = 0x112) -> bytes:
    return struct.pack("<3Q", magic, 0, count)


def array(shape: tuple[int, ...], flag: int = 0, storage: int = 0, magic: int = V2) -> bytes:
    return struct.pack(f"<IiI{len(shape)}q3i", magic, storage, len(shape), *shape, 1, 0, flag) + bytes(64)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(magic=0x4034B50), "expected it to start with 0x112, found 0x4034b50"),
        (header(2**63), "expected an array of 4 bytes at byte 24, but the file has 24"),
        (header(2**63) + bytes(2000), "1 to 32 axes at byte 24, found 0"),
        (header() + struct.pack("<I", 0xF993FACA) + bytes(99), "1 to 32 axes at byte 24, found 4187"),
        (header() + struct.pack("<IiI", V2, 0, 2**31) + bytes(99), "1 to 32 axes at byte 24, found 2147483648"),
        (header() + array((2**40, 2**40)), r"an array of shape \(1099511627776, 1099511627776\) of \d+ bytes"),
        (header() + array((-1, -4)), r"found shape \(-1, -4\)"),
        (header() + array((0, 4)), r"found shape \(0, 4\)"),
        (header() + array((2, 2), flag=7), "of type 7"),
        (header() + array((2, 2), flag=-1), "of type -1"),
        (header() + array((2, 2), storage=1), "dense arrays, found one of storage type 1"),
        (header() + array((4, 4)) + struct.pack("<Q", 2), "a name for each of 1 arrays, found 2"),
        (header() + array((4, 4)) + struct.pack("<QQ", 1, 2**63), "expected a name of 9223372036854775808 bytes"),
        (header() + array((4, 4)) + struct.pack("<QQ", 1, 1) + b"\xff", "ascii"),
        (header(2) + 2 * array((4, 4)) + struct.pack("<QQcQc", 2, 1, b"a", 1, b"a"), "2 different names, found 1"),
    ],
)
def test_hostile_params_are_refused_without_a_large_allocation(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_params(saved(content, tmp_path))


def test_params_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.params does not exist"):
        ResNet38(str(tmp_path / "none.params"), width=WIDTH)


def test_the_wrong_model_is_refused_by_name(mxnet_arrays: dict[str, Tensor], tmp_path: Path) -> None:
    """Model A has other blocks; the network is left as it was."""
    arrays = {name: tensor for name, tensor in mxnet_arrays.items() if not name.startswith("arg:res7a")}
    path, network = saved(written(arrays), tmp_path), ResNet38(width=WIDTH)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InputError, match=r"lacks arg:res7a_branch2a_weight, .*\(4 in all\); .*" + IMAGENET_MD5):
        network.load(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# --- weights of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("old", [False, True])
def test_released_files_with_heads(tmp_path: Path, prefix: str, old: bool) -> None:
    theirs = slim()
    state = tensors(theirs) if old else theirs.state_dict()  # before PyTorch 0.4.1 there was no num_batches_tracked
    head = {"fc8.weight": torch.zeros(20, 64 * WIDTH, 1, 1), "bn8.running_mean": torch.zeros(3)}
    path = tmp_path / "res38_cls.pth"
    torch.save({f"{prefix}{name}": tensor for name, tensor in (state | head).items()}, path)
    network = ResNet38(str(path), width=WIDTH)
    assert all(torch.equal(tensor, tensors(theirs)[name]) for name, tensor in tensors(network).items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b5.conv_branch1.weight": None}, r"it lacks b5\.conv_branch1\.weight \(1 in all\); "),
        ({"bn7.bias": torch.zeros(3)}, r"another shape for bn7\.bias \(1 in all\); "),
        ({"bn7.bias": torch.zeros(64 * WIDTH, dtype=torch.long)}, r"no float weights .* bn7\.bias \(1 in all\); "),
        ({"bn7.bias": torch.full((64 * WIDTH,), torch.nan)}, r"has NaN or infinite values in bn7\.bias \(1 in all\); "),
        ({"b8.conv_branch1.weight": torch.zeros(1)}, r"has unknown b8\.conv_branch1\.weight \(1 in all\); "),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], said: str) -> None:
    state = {name: tensor for name, tensor in (slim().state_dict() | change).items() if tensor is not None}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match=said):
        ResNet38(str(tmp_path / "x.pth"), width=WIDTH)


def test_a_file_of_another_width(tmp_path: Path) -> None:
    torch.save(ResNet38(width=2 * WIDTH).state_dict(), tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"this ResNet38 of width 4: .* another shape for conv1a\.weight"):
        ResNet38(str(tmp_path / "x.pth"), width=WIDTH)


# --- SEAM and PPC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [None, 5])
def test_gradients_of_the_seam_head(projection: int | None) -> None:
    network, images = slim(), image()
    head = SEAMHead(network.channels, 3, projection)
    output = head(images, network(images))
    assert output.cam.shape == output.revised_cam.shape == (2, 4, 3, 3)
    assert head.fc_proj is None if projection is None else output.projection.shape == (2, 5, 3, 3)
    parameters = {**dict(network.named_parameters()), **dict(head.named_parameters())}
    learnt = {name: p for name, p in parameters.items() if p.requires_grad}

    def reached(value: Tensor) -> set[str]:
        gradients = torch.autograd.grad(value.sum(), list(learnt.values()), retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(learnt, gradients, strict=True) if gradient is not None}

    convolutions = {name for name, p in network.named_parameters() if p.requires_grad}
    assert reached(output.revised_cam) == {"f8_3.weight", "f8_4.weight", "f9.weight"}
    assert reached(output.cam) == convolutions | {"fc8.weight"}
    if output.projection is not None:
        assert output.projection.min() >= 0
        assert reached(output.projection) == convolutions | {"fc_proj.weight"}


def test_dropout_of_the_seam_head() -> None:
    """CAM and projection see the same dropped channels; in evaluation nothing is dropped."""
    network, images = slim().eval(), image()
    head, taps = SEAMHead(network.channels, 3, 3 + 1), network(images)
    head.fc_proj.load_state_dict(head.fc8.state_dict())  # type: ignore[union-attr]
    output = head(images, taps)
    assert torch.equal(output.cam.relu(), output.projection)
    assert not torch.equal(output.cam, head(images, taps).cam)
    assert torch.equal(head.eval()(images, taps).cam, head(images, taps).cam)


def test_strongest_class() -> None:
    cam = torch.tensor([[9.0, 9.0, 9.0], [4.0, 2.0, -1.0], [1.0, 10.0, 0.0]]).view(1, 3, 1, 3)
    expected = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).view(1, 3, 1, 3)
    torch.testing.assert_close(strongest_class(cam), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(strongest_class(-cam.abs())[0, :, 0].T, torch.tensor([[1.0, 0.0, 0.0]] * 3))


def test_propagation_stays_among_similar_pixels() -> None:
    cam = torch.tensor([1.0, 0.0, 0.5, 0.3]).view(1, 1, 2, 2)
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).T.reshape(1, 2, 2, 2)
    expected = torch.tensor([0.5, 0.5, 0.5, 0.3]).view(1, 1, 2, 2)
    torch.testing.assert_close(propagate(cam, features), expected, rtol=1e-4, atol=0)
