"""CLIP's image tower, frozen, with its attention and a last block that gradients pass; embeddings of class names."""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import resize
from wsss.networks.vit import create_timm
from wsss.networks.weights import is_file, read_state_dict


class Seen(NamedTuple):
    """What a tower of L blocks sees in a batch of images, N = h * w patches each."""

    blocks: Tensor  # (L - 1, B, 1 + N, D), output of every block but the last
    attention: Tensor  # (L, B, 1 + N, 1 + N), mean over the heads
    size: tuple[int, int]  # (h, w)


class Frozen(nn.Module):
    """A network that never learns: no gradients, no graph, and in a checkpoint its sha256 alone.

    A checkpoint is refused where the network is another than the one that it was trained with.

    Args:
        network: the network.
        name: of the method's argument that names its weights.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network: Any = network.requires_grad_(False)
        self.name = name
        told = hashlib.sha256()
        for key, tensor in sorted(network.state_dict().items()):
            told.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        self.key: Tensor
        self.register_buffer("key", torch.frombuffer(bytearray(told.digest()), dtype=torch.uint8))
        self.eval()

    @property
    def digest(self) -> str:
        """`key` in hexadecimal digits."""
        return bytes(self.key.tolist()).hex()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = {} if destination is None else destination
        destination[f"{prefix}key"] = self.key.clone()
        return destination

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: Any, *more: Any
    ) -> None:
        theirs = state_dict.get(f"{prefix}key")
        if theirs is None:
            missing.append(f"{prefix}key")
        elif theirs.shape != self.key.shape or not torch.equal(theirs.to(self.key), self.key):
            shown = [bytes(key.flatten().tolist()).hex()[:12] for key in (theirs.byte(), self.key)]
            raise InputError(
                f"the checkpoint belongs to a frozen network with the sha256 {shown[0]}..., but {self.name} gives one "
                f"with {shown[1]}...: add {self.name}=FILE, or the tag of timm, that it was trained with"
            )
        for key, tensor in self.network.state_dict().items():  # so that the modules inside find what they have
            state_dict[f"{prefix}network.{key}"] = tensor


class CLIPTower(Frozen):
    """CLIP's vision transformer (Radford et al., ICML 2021, arXiv 2103.00020) on timm; weights and sums are float32.

    The position table is resized (bilinear) to the grid of an image; a remainder of less than a patch is dropped.
    The released code of CLIP-ES and WeCLIP keeps the weights in half precision on a GPU, and WeCLIP's also casts the
    output projection of every attention to it: neither is reproduced, results of half precision are not the same on
    two machines.

    Args:
        backbone: timm name, `vit_base_patch16_clip_quickgelu_224` for OpenAI's ViT-B/16.
        weights: a timm tag (`openai`); a `.safetensors` or `.pth` file with OpenAI's names (`visual.*`), timm's, or
            those of Hugging Face's transformers (`vision_model.*`); None freezes random ones of a fixed seed, which is
            for tests.
        arguments: of timm's constructor.
        half_positions: round the resized positions to half precision, as the released code does.

    Raises:
        InputError: see `create_timm`; no CLIP tower; OpenAI's own archive.
    """

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(
        self,
        backbone: str,
        weights: str | None = "openai",
        arguments: Mapping[str, Any] | None = None,
        half_positions: bool = False,
    ) -> None:
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        network, loaded = _create_tower(backbone, weights, given)
        super().__init__(network, "method.weights")
        self.loaded = f"{loaded}, CLIP" if loaded else None  # which is more than image labels
        self.half_positions = half_positions
        self.patch: int = network.patch_embed.patch_size[0]
        self.width: int = network.embed_dim
        self.embedding: int = network.num_classes
        self.depth = len(network.blocks)

    def is_that_of(self, state: Mapping[str, Tensor]) -> bool:
        """Whether it has the weights of a file with OpenAI's names (`visual.*`), which may be in half precision."""
        own = self.network.state_dict()
        try:
            theirs = checkpoint_filter_fn(dict(state), self.network)
            close = [torch.allclose(theirs[name].to(own[name]), t, rtol=1e-3, atol=1e-6) for name, t in own.items()]
        except Exception:  # whatever a foreign tower provokes in timm's filter
            return False
        return all(close)

    def positions(self, size: tuple[int, int]) -> Tensor:
        """(1 + h*w, D): the table for a grid of `size`."""
        table = self.network.pos_embed[0]
        side = int((len(table) - 1) ** 0.5)
        grid = resize(table[1:].mT.unflatten(1, (side, side))[None], size)
        table = torch.cat([table[:1], grid[0].flatten(1).mT])
        return table.half().float() if self.half_positions else table

    @torch.no_grad()
    def forward(self, image: Tensor) -> Seen:
        """image: (B, 3, H, W) normalised, no side below a patch."""
        if min(image.shape[-2:]) < self.patch:
            height, width = image.shape[-2:]
            raise InputError(f"an image of {width}x{height} pixels is smaller than one patch of {self.patch}")
        patches = self.network.patch_embed.proj(image)
        h, w = patches.shape[-2:]
        first = self.network.cls_token.expand(image.shape[0], -1, -1)
        tokens = torch.cat([first, patches.flatten(2).mT], dim=1) + self.positions((h, w))
        tokens = self.network.norm_pre(tokens)
        outputs, maps = [], []
        for block in self.network.blocks[:-1]:
            update, attention = attend(block.attn, block.norm1(tokens))
            tokens = finish(block, tokens, update)
            outputs.append(tokens)
            maps.append(attention)
        return Seen(torch.stack(outputs), torch.stack([*maps, self.last_attention(tokens)]), (h, w))

    def first_norm(self, tokens: Tensor) -> Tensor:
        """What the attention of the last block takes of its input (B, 1 + N, D)."""
        normed: Tensor = self.network.blocks[-1].norm1(tokens)
        return normed

    def last_attention(self, tokens: Tensor) -> Tensor:
        """(B, 1 + N, 1 + N) of the last block, from its input."""
        return attend(self.network.blocks[-1].attn, self.first_norm(tokens))[1]

    def last_block(self, tokens: Tensor, normed: Tensor) -> Tensor:
        """Output (B, 1 + N, D) of the last block, from its input and its `first_norm`, which gradients may reach."""
        block = self.network.blocks[-1]
        return finish(block, tokens, attend(block.attn, normed)[0])

    def embed(self, tokens: Tensor) -> Tensor:
        """Image embeddings (B, E) of length 1 from the mean of the patches of the last block's output."""
        return F.normalize(self.network.head(self.network.norm(tokens[:, 1:]).mean(1)), dim=-1)


def attend(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Self-attention of timm: its output (B, N, D), and the attention (B, N, N), mean over the heads."""
    q, k, v = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q * attention.scale @ k.mT).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2)), weights.mean(1)


def finish(block: Any, tokens: Tensor, update: Tensor) -> Tensor:
    """The rest of a pre-norm block of timm behind its attention."""
    tokens = tokens + block.ls1(update)
    result: Tensor = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return result


def _create_tower(backbone: str, weights: str | None, given: dict[str, Any]) -> tuple[Any, str | None]:
    if not timm.is_model(backbone) or "_clip_" not in backbone:
        known = ", ".join(timm.list_models("vit_*_clip_quickgelu_*")[:4])
        raise InputError(f"backbone {backbone!r} is no image tower of CLIP in timm: give one of {known}, ...")
    tag = weights if weights is not None and not is_file(weights) else None
    published = f"{backbone}.{tag}" in timm.list_models(f"{backbone}.*", pretrained=True)  # else it is refused below
    settings: Any = timm.get_pretrained_cfg(f"{backbone}.{tag}" if published else backbone)
    classes = settings.num_classes  # of the embedding
    if weights is not None and tag is None:
        if Path(weights).is_file() and _is_archive(weights):
            raise InputError(
                f"weights file {weights} is a TorchScript archive, which is code: OpenAI's weights are read from a "
                ".safetensors file alone, e.g. model.safetensors of openai/clip-vit-base-patch16 on the hub"
            )
        state = read_state_dict(weights)
        shapes = [state[n].shape[a] for n, a in PROJECTIONS.items() if n in state and state[n].ndim == 2]
        if not shapes:
            raise InputError(
                f"weights file {weights} holds no image tower of CLIP: expected one of {', '.join(PROJECTIONS)}"
            )
        classes = shapes[0]
    with torch.random.fork_rng(devices=[]):  # random weights are the same whenever they are drawn
        torch.manual_seed(0)
        network, loaded = create_timm(backbone, weights, {**given, "num_classes": classes}, _from_transformers)
    if not isinstance(network, VisionTransformer) or network.cls_token is None or network.num_prefix_tokens != 1:
        raise InputError(f"backbone {backbone!r} with these backbone_args is no vision transformer with a class token")
    return network, loaded


PROJECTIONS = {"visual.proj": 1, "head.weight": 0, "visual_projection.weight": 0}
"""Names of the projection in OpenAI's, timm's and transformers' files, and its axis of the embedding."""


def _is_archive(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower under OpenAI's names, of a file with those of Hugging Face's transformers; others stay."""
    if "vision_model.embeddings.class_embedding" not in state:
        return dict(state)
    found = {"visual.proj": state["visual_projection.weight"].mT}
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",  # their spelling
        "post_layernorm": "ln_post",
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm": "ln_",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for key, tensor in state.items():
        if not key.startswith("vision_model.") or key.endswith("position_ids"):
            continue
        name = key.removeprefix("vision_model.")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if ".self_attn.q_proj." in name:
            parts = [state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            name, tensor = name.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat(parts)
        if ".self_attn." not in name:
            found[f"visual.{name}"] = tensor
    return found


TEMPLATE = "a clean origami {}."
"""The one prompt of CLIP-ES."""

PROMPTS = {
    "airplane": "aeroplane",
    "backpack": "backpack,bag",
    "baseball glove": "glove",
    "bird": "bird avian",
    "chair": "chair seat",
    "couch": "sofa",
    "dining table": "diningtable",
    "hair drier": "hairdrier,blowdrier",
    "handbag": "handbag,purse",
    "motorcycle": "motorbike",
    "person": "person with clothes,people,human",
    "potted plant": "pottedplant",
    "remote": "remote control",
    "snowboard": "sknowboard",  # as released
    "spoon": "dessertspoon",
    "tie": "necktie",
    "tv": "tvmonitor screen",
    "tvmonitor": "tvmonitor screen",
    "umbrella": "umbrella,parasol",
}
"""Names of VOC's and COCO's classes that CLIP-ES (MIT) calls otherwise."""

BACKGROUND = """
    ground land grass tree building wall sky lake water river sea railway railroad keyboard helmet cloud house
    mountain ocean road rock street valley bridge sign
"""
"""What CLIP-ES expects behind the classes of VOC."""


def background_words(classes: Sequence[str]) -> list[str]:
    """Those of `BACKGROUND` that no class is called after; of COCO's classes all but keyboard and sign."""
    words = {word for name in classes for word in name.lower().split()}
    return [word for word in BACKGROUND.split() if word not in words]


def embed_text(source: str, classes: Sequence[str], background: Sequence[str] | None) -> tuple[Tensor, Tensor, Any]:
    """Embeddings of length 1 of class names (C, E) and of what is behind them (M, E), and the M names.

    Args:
        source: a `.npz` file with `classes` (C',), the names of a data set's classes in any order, their `embeddings`
            (C', E), `background` (M',) and `background_embeddings` (M', E); or `NAME/WEIGHTS`, a model of open_clip
            (the extra `clip`) and its tag or file, which embeds `TEMPLATE` with the names, or `PROMPTS` for them.
        classes: of the data set.
        background: names; None takes all of the file, or `background_words`.

    Raises:
        InputError: the file cannot be read, or lacks a class or a name; open_clip is missing or does not know the
            model.
    """
    if source.endswith(".npz"):
        return _read_text(source, classes, background)
    name, slash, weights = source.partition("/")
    if not (name and slash and weights):
        raise InputError(
            f"method.text is {source!r}: expected a .npz file of embeddings, or NAME/WEIGHTS of open_clip, e.g. "
            "ViT-B-16-quickgelu/openai"
        )
    behind = background_words(classes) if background is None else list(background)
    return *_encode(name, weights, classes, behind), behind


def _read_text(path: str, classes: Sequence[str], background: Sequence[str] | None) -> tuple[Tensor, Tensor, Any]:
    expected = ("classes", "embeddings", "background", "background_embeddings")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in expected}
    except KeyError as error:
        raise InputError(f"method.text={path} lacks {error}: expected the arrays {', '.join(expected)}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"method.text={path} cannot be read as a .npz file: {str(error).splitlines()[0]}") from error
    rows: list[Tensor] = []
    behind = list(map(str, arrays["background"].ravel())) if background is None else list(background)
    width = arrays["embeddings"].shape[-1] if arrays["embeddings"].ndim == 2 else 0
    for names, key, wanted in (
        ("classes", "embeddings", list(classes)),
        ("background", "background_embeddings", behind),
    ):
        known, table = list(map(str, arrays[names].ravel())), arrays[key]
        if table.shape != (len(known), width) or table.dtype.kind != "f" or not np.isfinite(table).all() or not known:
            raise InputError(
                f"method.text={path} has {key} of shape {table.shape} for {len(known)} {names}: expected a row of "
                f"finite numbers for each, all of one width"
            )
        if missing := [name for name in wanted if name not in known]:
            raise InputError(
                f"method.text={path} has no {key} of {', '.join(missing[:5])} ({len(missing)} in all), it knows "
                f"{', '.join(known[:5])}, ...: give a file with all {names} of the data set, by their very names"
            )
        picked = torch.from_numpy(table[[known.index(name) for name in wanted]].astype(np.float32))
        if (picked.norm(dim=1) < 1e-6).any():
            raise InputError(f"method.text={path} has {key} that are 0: expected the embeddings of a text tower")
        rows.append(F.normalize(picked, dim=1))
    return rows[0], rows[1], behind


@torch.no_grad()
def _encode(name: str, weights: str, classes: Sequence[str], background: Sequence[str]) -> tuple[Tensor, Tensor]:
    if find_spec("open_clip") is None:
        raise InputError(
            f"method.text={name}/{weights} needs open_clip to embed the names of classes, which is not installed: pip "
            'install "wsss[clip]", or give method.text=FILE.npz with their embeddings'
        )
    import open_clip

    try:
        model = open_clip.create_model(name, pretrained=weights).eval()
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"method.text={name}/{weights} cannot be loaded by open_clip ({said}): give a model and weights that it "
            "lists, a file of weights, or FILE.npz with embeddings"
        ) from error
    prompts = [PROMPTS.get(word.lower(), word) for word in classes] + list(background)
    rows = model.encode_text(tokenizer([TEMPLATE.format(prompt) for prompt in prompts])).float()
    return F.normalize(rows[: len(classes)], dim=1), F.normalize(rows[len(classes) :], dim=1)
