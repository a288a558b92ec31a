"""The tower that is trained on drawings: what it writes is what the methods read, and its embeddings are theirs."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny import CLIP, CLIP_OVERRIDES, call
from tower import BACKBONE, BACKGROUND, contrast, draw, embed, train

from wsss.data.pixels import Normalise
from wsss.networks.clip import CLIPTower


def test_contrast_is_a_softmax_for_each_that_is_shown() -> None:
    scores, shown = torch.randn(2, 4), torch.tensor([[True, False, True, False], [False, False, False, True]])
    rows = [scores[0, [0, 1, 3]], scores[0, [2, 1, 3]], scores[1, [3, 0, 1, 2]]]
    expected = torch.stack([F.cross_entropy(row, torch.tensor(0)) for row in rows]).mean()
    torch.testing.assert_close(contrast(scores, shown), expected)


def test_methods_read_what_is_written(tmp_path: Path) -> None:
    arguments = CLIP["backbone_args"]
    for folder in ("a", "b"):
        accuracy = train(tmp_path / folder, steps=4, batch=4, images=20, arguments=arguments)
        assert 0 <= accuracy <= 1
    weights, text = (tmp_path / "a" / name for name in ("tower.safetensors", "text.npz"))
    assert sorted(tmp_path.glob("a/*")) == sorted((weights, text))
    assert weights.read_bytes() == (tmp_path / "b/tower.safetensors").read_bytes()  # and so was the training the same

    tower, random = CLIPTower(BACKBONE, str(weights), arguments), CLIPTower(BACKBONE, None, arguments)
    assert not torch.equal(tower.key, random.key)
    image, shown, _ = draw("val", 3, 32, most=1)
    assert (shown.sum(1) == 1).all()
    normalised = torch.stack([Normalise(tower.mean, tower.std)(one) for one in image.permute(0, 2, 3, 1).numpy()])
    tokens = tower(normalised).blocks[-1]
    theirs = tower.embed(tower.last_block(tokens, tower.first_norm(tokens)))
    with torch.no_grad():
        torch.testing.assert_close(embed(tower, image)[1], theirs)

    known = [o for o in CLIP_OVERRIDES if not o.startswith(("method.weights", "method.text", "dataset.num_classes"))]
    given = [f"method.weights={weights}", f"method.text={text}", "recipe=null"]
    assert call("train", "method=clip_es", *known, *given, f"hydra.run.dir={tmp_path / 'run'}") == 0
    stored = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    with np.load(text) as file:
        np.testing.assert_allclose(stored["state_dict"]["text"], file["embeddings"], atol=1e-6)
    assert tuple(stored["hyper_parameters"]["background"]) == BACKGROUND
    assert torch.equal(stored["state_dict"]["tower.key"], tower.key)
