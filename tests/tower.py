"""A small image tower in CLIP's place, trained on drawings, so that CLIP-ES and WeCLIP have figures without a download.

    python -m tests.tower OUT

writes OUT/tower.safetensors and OUT/text.npz, which `method.weights=` and `method.text=` take on `dataset=shapes`. It
learns from drawings of another seed than those that the methods are measured on, with up to three objects, and knows
the classes of each and no mask. As in CLIP a softmax over the cosines with all texts, times 100, draws the class token
to a text of the image; the texts are vectors that are learnt. Those of the background are for drawings without an
object, whichever of them comes closest. The last block also learns to draw the mean of the patches there, by which
CLIP-ES looks at an image; blocks before it do not, else every patch would carry the classes of the whole image.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from wsss.data.shapes import Shapes
from wsss.networks.clip import CLIPTower
from wsss.writing import write_whole

BACKBONE = "vit_base_patch16_clip_quickgelu_224"
ARGUMENTS = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}  # as the recipes for shapes
BACKGROUND = ("ground", "grass", "sky", "water")
SCALE = 100.0  # of the cosines
SEED = 1  # of the drawings


def draw(split: str, count: int, size: int, most: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (N, 3, H, W) in 8 bits, whether they show each class or none (N, C + 1), and the names of the classes."""
    shapes = Shapes(split, train_size=count, val_size=count, size=size, objects=(0, most), seed=SEED)
    items = [shapes[index] for index in range(count)]
    image = torch.from_numpy(np.stack([item["image"] for item in items])).permute(0, 3, 1, 2).contiguous()
    label = torch.from_numpy(np.stack([item["label"] for item in items])).bool()
    return image, torch.cat([label, ~label.any(1, keepdim=True)], 1), shapes.classes


def embed(tower: CLIPTower, image: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, E) of length 1 by the class token, and by the mean of the patches (`CLIPTower.embed`)."""
    network = tower.network
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    patches = network.patch_embed.proj((image / 255 - mean) / std).flatten(2).mT
    tokens = torch.cat([network.cls_token.expand(len(image), -1, -1), patches], 1) + network.pos_embed
    tokens = network.blocks[:-1](network.norm_pre(tokens))
    of_class = network.head(network.norm(network.blocks[-1](tokens))[:, 0])
    return F.normalize(of_class, dim=-1), tower.embed(network.blocks[-1](tokens.detach()))


def score(embedding: Tensor, text: Tensor) -> Tensor:
    """(B, C + 1): cosines, times `SCALE`, with the classes, and of those with the background the smooth maximum."""
    cosines = SCALE * embedding @ F.normalize(text, dim=1).mT
    classes, behind = cosines.split([len(text) - len(BACKGROUND), len(BACKGROUND)], 1)
    return torch.cat([classes, behind.logsumexp(1, keepdim=True)], 1)


def contrast(scores: Tensor, shown: Tensor) -> Tensor:
    """Mean cross-entropy of what is shown, each against all that is not; both (B, C + 1)."""
    others = scores.masked_fill(shown, -torch.inf).logsumexp(1, keepdim=True)
    return (F.softplus(others - scores) * shown).sum() / shown.sum()


def train(
    out: Path, steps: int = 1200, batch: int = 64, images: int = 20_000, arguments: Mapping[str, Any] = ARGUMENTS
) -> float:
    """Writes the files; returns the accuracy of the patches' mean on 1,000 other drawings of one object or none."""
    torch.manual_seed(0)
    tower = CLIPTower(BACKBONE, None, arguments)
    tower.network.requires_grad_(True)
    image, shown, classes = draw("train", images, arguments["img_size"], most=3)
    text = nn.Parameter(torch.randn(len(classes) + len(BACKGROUND), tower.embedding))
    optimizer = torch.optim.AdamW([*tower.network.parameters(), text], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(1, steps + 1):
        chosen = torch.randint(images, (batch,))
        turned = torch.rot90(image[chosen], int(torch.randint(4, ())), (2, 3))
        loss = torch.stack([contrast(score(row, text), shown[chosen]) for row in embed(tower, turned)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    with torch.no_grad():
        image, shown, _ = draw("val", 1_000, arguments["img_size"], most=1)
        scores = torch.cat([score(embed(tower, part)[1], text) for part in image.split(100)])
    right = shown.gather(1, scores.argmax(1, keepdim=True))[:, 0].float()
    print(f"accuracy {right.mean():.3f}, of drawings with an object {right[~shown[:, -1]].mean():.3f}")
    with write_whole(out / "tower.safetensors") as file:
        file.write(save({name: tensor.detach().contiguous() for name, tensor in tower.network.state_dict().items()}))
    rows = F.normalize(text.detach(), dim=1).numpy()
    with write_whole(out / "text.npz") as file:
        names = {"classes": np.array(classes), "background": np.array(BACKGROUND)}
        parts = {"embeddings": rows[: len(classes)], "background_embeddings": rows[len(classes) :]}
        np.savez(file, **names, **parts)
    return float(right.mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    given = parser.parse_args()
    train(given.out, given.steps)
