"""Weights of the vision transformers: timm tags of the papers, local files, the table of positions."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from wsss import InputError
from wsss.networks.vit import ViTEncoder

SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
BACKBONE = "vit_tiny_patch16_224"


@pytest.fixture
def trained() -> dict[str, torch.Tensor]:
    """A classifier for 32 x 32 pixels, as a file of ImageNet weights holds it."""
    torch.manual_seed(0)
    return timm.create_model(BACKBONE, img_size=32, num_classes=7, **SMALL).state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("side", [32, 48])
def test_local_weights(trained: dict[str, torch.Tensor], tmp_path: Path, suffix: str, side: int) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(trained, path) if suffix == ".safetensors" else torch.save({"model": trained}, path)
    encoder = ViTEncoder(BACKBONE, str(path), SMALL | {"img_size": side}, aux_layer=-2)
    state = encoder.vit.state_dict()
    assert not any(name.startswith("head.") for name in state)
    for name, tensor in state.items():
        if name != "pos_embed":
            assert torch.equal(tensor, trained[name]), name
    first, grid = trained["pos_embed"][:, :1], trained["pos_embed"][:, 1:].mT.unflatten(2, (4, 4))
    grid = F.interpolate(grid, size=(side // 8, side // 8), mode="bicubic", antialias=True)
    expected = torch.cat([first, grid.flatten(2).mT], dim=1)
    torch.testing.assert_close(state["pos_embed"], expected)
    assert not encoder.vit.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("backbone", "tag"), [("vit_base_patch16_224", "orig_in21k_ft_in1k"), ("deit_base_patch16_224", "fb_in1k")]
)
def test_tags_of_the_papers(backbone: str, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def offline(name: str, **settings: Any) -> None:
        asked.append((name, settings["pretrained"]))
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"could not be downloaded .* pass method.weights=FILE"):
        ViTEncoder(backbone, tag)
    assert asked == [(f"{backbone}.{tag}", True)]
    with pytest.raises(InputError, match=rf"'nothing' is neither .*{tag}"):
        ViTEncoder(backbone, "nothing")


def test_files_that_do_not_fit(trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(trained, path)
    with pytest.raises(InputError, match=f"weights file {path} does not fit"):
        ViTEncoder(BACKBONE, str(path), SMALL | {"embed_dim": 32})
    torch.save(print, path)
    with pytest.raises(InputError, match=f"weights file {path} cannot be read"):
        ViTEncoder(BACKBONE, str(path), SMALL)
    with pytest.raises(InputError, match="does not exist"):
        ViTEncoder(BACKBONE, str(tmp_path / "missing.safetensors"), SMALL)
