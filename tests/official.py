"""Our weights under the names of the papers' own code, to compare with its recordings and to read back as its files."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wsss import InputError
from wsss.methods.base import OfficialCheckpoint, WSSSModule
from wsss.methods.mctformer import OFFICIAL_MODULES
from wsss.methods.toco import OFFICIAL_HEAD, _official_name, _our_name
from wsss.methods.weclip import official_name
from wsss.networks.weights import read_state_dict


def toco_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> those of ToCo, whose strict loading also wants the ImageNet head: zeros."""
    official = {_official_name(name): tensor for name, tensor in state.items()}
    width = official["encoder.norm.bias"]
    head = {f"{OFFICIAL_HEAD}weight": width.new_zeros(1000, len(width)), f"{OFFICIAL_HEAD}bias": width.new_zeros(1000)}
    return official | head


def toco_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of ToCo -> ours; the unused ImageNet head is left out."""
    ours = {_our_name(name): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in ours.items() if not name.startswith(OFFICIAL_HEAD)}


def mctformer_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> those of MCTformer and WeakTr, whose strict loading also wants what they never use."""
    for theirs, ours in OFFICIAL_MODULES.items():
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    official = {name.removeprefix("encoder.").removeprefix("position."): tensor for name, tensor in state.items()}
    classes, width = official["cls_token"].shape[1:]
    like = official["cls_token"]
    unused = {"norm.weight": like.new_ones(width), "norm.bias": like.new_zeros(width)}
    if "pos_embed_cls" in official:
        unused["pos_embed"] = like.new_zeros(1, 197, width)
    if "head.weight" not in official:
        unused |= {"head.weight": like.new_zeros(classes, width), "head.bias": like.new_zeros(classes)}
    return official | unused


def read_official(method: type[WSSSModule], path: Any) -> OfficialCheckpoint:
    """A file of the papers' own code, read by its method."""
    state = {str(name): tensor for name, tensor in read_state_dict(str(path)).items()}
    official = method.read_official(state, str(path))
    if official is None:
        raise InputError(f"{path} is not of {method.__name__}")
    return official


def cosa_to_official(state: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a stream of CoSA -> those of its code, which has ToCo's but for the ImageNet head."""
    return {_official_name(name): tensor for name, tensor in state.items()}


def weclip_to_official(state: Mapping[str, Any]) -> dict[str, Any]:
    """Names of what WeCLIP learns -> those of its code, which also has the tower."""
    return {official_name(name): t for name, t in state.items() if name.startswith(("fusion.", "decoder."))}
