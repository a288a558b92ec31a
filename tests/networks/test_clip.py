"""CLIP's tower from files of three naming schemes, embeddings from files and from a text tower, what is refused."""

import json
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import CLIP
from torch import Tensor

from wsss import InputError
from wsss.networks.clip import PROMPTS, TEMPLATE, CLIPTower, background_words, embed_text

BACKBONE = "vit_base_patch16_clip_quickgelu_224"
ARGUMENTS = CLIP["backbone_args"]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def tower() -> CLIPTower:
    return CLIPTower(BACKBONE, None, ARGUMENTS)


def openai_names(state: State) -> State:
    """Timm's names -> OpenAI's, written down independently of timm's own translation."""
    found = {
        "visual.class_embedding": state["cls_token"][0, 0],
        "visual.positional_embedding": state["pos_embed"][0],
        "visual.conv1.weight": state["patch_embed.proj.weight"],
        "visual.proj": state["head.weight"].mT.contiguous(),
        "token_embedding.weight": torch.ones(3, 3),  # of the text tower
    }
    pairs = {"norm_pre": "ln_pre", "norm": "ln_post"}
    for index in range(ARGUMENTS["depth"]):
        ours, theirs = f"blocks.{index}.", f"transformer.resblocks.{index}."
        parts = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj"}
        parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
        pairs |= {ours + a: theirs + b for a, b in parts.items()}
        for kind in ("weight", "bias"):
            found[f"visual.{theirs}attn.in_proj_{kind}"] = state[f"{ours}attn.qkv.{kind}"]
    return found | {f"visual.{b}.{kind}": state[f"{a}.{kind}"] for a, b in pairs.items() for kind in ("weight", "bias")}


def transformers_names(state: State) -> State:
    """Timm's names -> those of Hugging Face's CLIPModel."""
    start = "vision_model."
    found = {
        f"{start}embeddings.class_embedding": state["cls_token"][0, 0],
        f"{start}embeddings.position_embedding.weight": state["pos_embed"][0],
        f"{start}embeddings.position_ids": torch.arange(len(state["pos_embed"][0]))[None],
        f"{start}embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "visual_projection.weight": state["head.weight"],
        "text_model.final_layer_norm.weight": torch.ones(3),
        "logit_scale": torch.tensor(4.6),
    }
    pairs = {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
    for index in range(ARGUMENTS["depth"]):
        ours, theirs = f"blocks.{index}.", f"encoder.layers.{index}."
        parts = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
        parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        pairs |= {ours + a: theirs + b for a, b in parts.items()}
        for kind in ("weight", "bias"):
            for part, rows in zip("qkv", state[f"{ours}attn.qkv.{kind}"].chunk(3), strict=True):
                found[f"{start}{theirs}self_attn.{part}_proj.{kind}"] = rows.clone()
    return found | {f"{start}{b}.{kind}": state[f"{a}.{kind}"] for a, b in pairs.items() for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def state(tower: CLIPTower) -> State:
    torch.manual_seed(1)
    drawn = {name: torch.randn_like(tensor) * 0.1 for name, tensor in tower.network.state_dict().items()}
    return drawn | {"head.bias": torch.zeros_like(drawn["head.bias"])}


@pytest.mark.parametrize("named", [dict, openai_names, transformers_names], ids=["timm", "openai", "transformers"])
def test_files(state: State, tmp_path: Path, named: Any) -> None:
    path = tmp_path / "tower.safetensors"
    save_file(named(state), path)
    tower = CLIPTower(BACKBONE, str(path), ARGUMENTS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in tower.network.state_dict().items())
    assert str(path) in str(tower.loaded)
    assert (tower.embedding, tower.width, tower.patch, tower.depth) == (len(state["head.weight"]), 24, 8, 3)


def test_a_pass_is_that_of_timm(tower: CLIPTower) -> None:
    """At the size of the position table, which nothing resizes."""
    image = torch.randn(2, 3, 32, 32)
    seen = tower(image)
    expected = tower.network.forward_features(image)
    last = tower.last_block(seen.blocks[-1], tower.first_norm(seen.blocks[-1]))
    torch.testing.assert_close(tower.network.norm(last), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.attention.sum(-1), torch.ones(3, 2, 17))


def test_random_towers_are_the_same(tower: CLIPTower) -> None:
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    again = CLIPTower(BACKBONE, None, ARGUMENTS)
    assert torch.equal(again.key, tower.key)
    assert torch.equal(torch.rand(1), drawn)  # what others draw does not change
    assert not torch.equal(CLIPTower(BACKBONE, None, ARGUMENTS | {"depth": 2}).key, tower.key)


def test_files_that_are_refused(state: State, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ViT-B-16.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    without = {name: tensor for name, tensor in openai_names(state).items() if not name.endswith("ln_post.bias")}
    save_file(without, tmp_path / "part.safetensors")
    for name, said in {
        "ViT-B-16.pt": "TorchScript archive",
        "other.safetensors": "holds no image tower of CLIP",
        "part.safetensors": r"lacks norm\.bias",
        "missing.safetensors": "does not exist",
    }.items():
        with pytest.raises(InputError, match=said) as error:
            CLIPTower(BACKBONE, str(tmp_path / name), ARGUMENTS)
        assert "\n" not in str(error.value)
        assert name in str(error.value)


# --- text -------------------------------------------------------------------------------------------------------------


def text_file(path: Path, **changed: Any) -> str:
    rng = np.random.default_rng(0)
    arrays = {
        "classes": np.array(["dog", "cat", "cow"]),
        "embeddings": rng.standard_normal((3, 8)),
        "background": np.array(["sky", "grass"]),
        "background_embeddings": rng.standard_normal((2, 8)),
    }
    np.savez(path, **{name: array for name, array in (arrays | changed).items() if array is not None})
    return str(path)


def test_embeddings_of_a_file(tmp_path: Path) -> None:
    path = text_file(tmp_path / "text.npz")
    rows, behind, names = embed_text(path, ["cat", "dog"], None)
    file = np.load(path)
    expected = torch.from_numpy(file["embeddings"][[1, 0]]).float()
    torch.testing.assert_close(rows, expected / expected.norm(dim=1, keepdim=True))
    assert names == ["sky", "grass"]
    assert behind.shape == (2, 8)
    assert torch.equal(embed_text(path, ["cat"], ["grass"])[1], behind[1:])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"embeddings": None}, "lacks 'embeddings"),
        ({"embeddings": np.zeros((3, 8))}, "that are 0"),
        ({"embeddings": np.ones((2, 8))}, r"of shape \(2, 8\) for 3 classes"),
        ({"embeddings": np.full((3, 8), np.nan)}, "a row of finite numbers"),
        ({"embeddings": np.ones((3, 9))}, "all of one width"),
        ({"classes": np.array(["dog", "horse", "cow"])}, "has no embeddings of cat"),
        ({"classes": np.array([{}, 1, 2], object)}, "cannot be read"),
    ],
)
def test_bad_files_of_embeddings(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = text_file(tmp_path / "text.npz", **changed)
    with pytest.raises(InputError, match=said) as error:
        embed_text(path, ["dog", "cat"], None)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_of_embeddings(tmp_path: Path) -> None:
    (tmp_path / "junk.npz").write_bytes(b"junk")
    for name in ("junk.npz", "missing.npz"):
        with pytest.raises(InputError, match="cannot be read"):
            embed_text(str(tmp_path / name), ["dog"], None)


def test_a_text_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """What open_clip is asked, by a stand-in for it."""
    asked: list[Any] = []

    class Model(torch.nn.Module):
        def encode_text(self, tokens: list[str]) -> Tensor:
            asked.extend(tokens)
            return torch.tensor([[float(len(prompt)), 1.0] for prompt in tokens])

    def create_model(name: str, pretrained: str) -> Model:
        if name != "ViT-B-16-quickgelu":
            raise RuntimeError(f"Model config for {name} not found.\nmore")
        asked.append(pretrained)
        return Model()

    stand_in: Any = types.ModuleType("open_clip")
    stand_in.__spec__ = types.SimpleNamespace(name="open_clip")
    stand_in.create_model, stand_in.get_tokenizer = create_model, lambda name: lambda texts: texts
    monkeypatch.setitem(sys.modules, "open_clip", stand_in)
    rows, behind, names = embed_text("ViT-B-16-quickgelu/openai", ["bird", "zebra"], None)
    assert asked[:3] == ["openai", "a clean origami bird avian.", "a clean origami zebra."]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    assert len(behind) == len(names) == len(asked) - 3
    with pytest.raises(InputError, match="cannot be loaded by open_clip") as error:
        embed_text("nothing/openai", ["bird"], None)
    assert "\n" not in str(error.value)


def test_open_clip_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss.networks.clip.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "wsss\[clip\]"'):
        embed_text("ViT-B-16-quickgelu/openai", ["bird"], None)


@pytest.mark.parametrize("data", ["voc", "coco"])
def test_prompts_are_those_of_the_paper(pytestconfig: pytest.Config, data: str) -> None:
    from wsss.data.coco import COCO_CLASSES
    from wsss.data.voc import VOC_CLASSES

    recorded = Path(__file__).parent.parent / "golden/clip/prompts.json"
    prompts, classes = json.loads(recorded.read_text()), {"voc": VOC_CLASSES, "coco": COCO_CLASSES}[data]
    assert prompts["template"] == TEMPLATE
    assert [PROMPTS.get(name, name) for name in classes] == prompts[data]
    assert background_words(classes) == prompts[f"{data}_background"]
