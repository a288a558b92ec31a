"""CLIP-ES and WeCLIP at the commands and in Python: what is frozen, kept, resumed and refused; numbers: parity."""

import json
import os
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kill import compare, settings
from PIL import Image
from test_resume import interrupted
from tiny import CLIP, CLIP_OVERRIDES, WECLIP, WECLIP_OVERRIDES, WECLIP_PLUS, WECLIP_PLUS_OVERRIDES, Ended, call
from torch import Tensor

import wsss
from wsss import InputError
from wsss.methods.clip_es import CLIPES, gradient_maps
from wsss.methods.weclip import WeCLIP, log_odds
from wsss.networks.cache import FeatureCache
from wsss.networks.clip import Seen

Command = Callable[..., Ended]


def build(target: Any = WeCLIP, **arguments: Any) -> Any:
    given = {CLIPES: CLIP, WeCLIP: WECLIP}[target] | arguments
    torch.manual_seed(0)
    method = target(num_classes=3, classes=("a", "b", "c"), **given)
    method.log = method.log_dict = lambda *args, **kwargs: None
    return method


@pytest.fixture
def batch() -> dict[str, Any]:
    torch.manual_seed(1)
    box = torch.tensor([[0, 32, 0, 32], [8, 32, 0, 24]])
    return {"image": torch.randn(2, 3, 32, 32), "label": torch.tensor([[1.0, 0, 1], [0, 1, 0]]), "image_box": box}


# --- in Python --------------------------------------------------------------------------------------------------------


def test_gradient_maps_are_gradients() -> None:
    """In double precision, by finite differences."""
    method = build(CLIPES).double()
    tokens = torch.randn(1, 5, 24, dtype=torch.double)
    label = torch.tensor([[1.0, 0, 1]])
    arguments = (method.tower, method.text, method.background_text, 3.0)
    found = gradient_maps(*arguments, tokens, label, torch.tensor([2]))
    normed = method.tower.first_norm(tokens)

    def probability(normed: Tensor) -> Tensor:
        embedding = method.tower.embed(method.tower.last_block(tokens, normed))
        logits = 3.0 * embedding @ torch.cat([method.text[[0, 2]], method.background_text]).mT
        return logits.softmax(1)[0, 1]

    for place in ((0, 1, 3), (0, 4, 20)):
        moved = [normed.clone(), normed.clone()]
        moved[0][place] += 1e-5
        moved[1][place] -= 1e-5
        slope = (probability(moved[0]) - probability(moved[1])) / 2e-5
        torch.testing.assert_close(found.gradient[place[0], place[1] - 1, place[2]], slope, rtol=1e-6, atol=1e-10)
    assert not found.raw.requires_grad


@pytest.mark.parametrize("target", [CLIPES, WeCLIP])
def test_maps_are_of_the_classes_that_are_sought(target: Any, batch: dict[str, Any]) -> None:
    method = build(target).eval()
    cam = method.infer_batch(batch)["cam"]
    assert (cam[batch["label"] == 0] == 0).all()
    assert (cam[batch["label"] == 1].amax((-2, -1)) > 0.9).any()
    found = method.infer(batch["image"])
    assert (found["cam"][found["logits"] <= 0] == 0).all()
    with torch.inference_mode():  # as Lightning evaluates
        torch.testing.assert_close(method.infer_batch(batch)["cam"], cam)
    nothing = method.infer_batch(batch | {"label": torch.zeros(2, 3)})["cam"]
    assert (nothing == 0).all()


def test_the_order_of_classes_does_not_matter(batch: dict[str, Any]) -> None:
    method = build(CLIPES).eval()
    turned = deepcopy(method)
    turned.text.copy_(method.text.flip(0))
    turned.background_text.copy_(method.background_text.flip(0))
    other = turned.infer_batch(batch | {"label": batch["label"].flip(1)})["cam"].flip(1)
    torch.testing.assert_close(other, method.infer_batch(batch)["cam"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [{}, WECLIP_PLUS], ids=["weclip", "with dino"])
def test_features_kept_and_not_are_equal(batch: dict[str, Any], arguments: dict[str, Any]) -> None:
    plain, keeping = (build(**arguments | {"cache_features": size}) for size in (None, 1.0))
    for again in range(2):
        results = []
        for method in (plain, keeping):
            torch.manual_seed(2)
            results.append(method.training_step(batch, 0))
        torch.testing.assert_close(results[0]["loss"], results[1]["loss"])
        assert keeping.cache.hits == 2 * again
    cams = [method.eval().infer_batch(batch)["cam"] for method in (plain, keeping)]
    torch.testing.assert_close(cams[0], cams[1], rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        cams = [method.infer_batch(batch)["cam"] for method in (plain, keeping)]
    assert torch.equal(*cams)  # of this precision, not of the one before
    small = build(cache_features=1e-9)  # nothing fits
    small.training_step(batch, 0)
    assert (len(small.cache.kept), small.cache.size) == (0, 0)


@pytest.mark.parametrize("arguments", [{}, WECLIP_PLUS], ids=["weclip", "with dino"])
def test_features_in_files_are_those_in_memory(
    batch: dict[str, Any], tmp_path: Path, arguments: dict[str, Any]
) -> None:
    """Bit by bit, also of a method that is built again; another tower, precision or image finds nothing of it."""
    looked: list[int] = []

    def loss_of(**more: Any) -> Tensor:
        method = build(**arguments | more)
        proper = type(method.tower).forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(method.tower), "forward", lambda tower, image: looked.append(1) or proper(tower, image))
            torch.manual_seed(2)
            loss: Tensor = method.training_step(batch, 0)["loss"]
        return loss

    files = {"cache_folder": str(tmp_path / "cache")}
    expected = loss_of(cache_features=1.0)
    losses = [loss_of(**files), loss_of(**files), loss_of(**files, cache_features=1.0)]
    assert all(torch.equal(loss, expected) for loss in losses)
    assert len(looked) == 2 + 2  # in memory, and for the files; never again
    towers = 1 + ("dino" in arguments)
    assert len(list((tmp_path / "cache").glob("*"))) == towers
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 2 * towers
    assert not torch.equal(loss_of(**files, half_positions=True), expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(**files)
        loss_of(**files)
    assert len(looked) == 4 + 2 + 2
    batch["image"] = batch["image"] + 1
    loss_of(**files)
    assert len(looked) == 8 + 2
    loss_of(**files, backbone_args=WECLIP["backbone_args"] | {"num_heads": 1})  # the same weights, other heads
    assert len(looked) == 10 + 2


def test_files_of_features_are_bounded_whole_and_mended(tmp_path: Path) -> None:
    images = torch.randn(4, 1, 3, 8, 8)
    looked: list[Tensor] = []

    def look(image: Tensor) -> Seen:
        looked.append(image)
        return Seen(image.mean() + torch.zeros(2, 1, 5, 100), image.std() + torch.zeros(3, 1, 5, 5), (2, 2))

    def cache(size: float) -> FeatureCache:
        return FeatureCache("tower", None, str(tmp_path), size)

    def files() -> list[Path]:
        return sorted(tmp_path.glob("*/*"), key=lambda path: path.stat().st_mtime_ns)

    one = cache(1.0)
    first = one(images[0], look)
    size = files()[0].stat().st_size
    two = cache(2.5 * size / 1e9)  # room for two of them
    for index in (1, 0, 2):  # the first one is used again, the second one not
        time.sleep(0.01)
        two(images[index], look)
    assert len(files()) == 2
    assert len(looked) == 3
    again = cache(1.0)(images[0], look)
    assert len(looked) == 3
    assert torch.equal(again.blocks, first.blocks)
    assert (again.attention.shape, again.size) == (first.attention.shape, (2, 2))
    cache(0.5 * size / 1e9)(images[3], look)  # no room for any: nothing is removed for it
    assert len(files()) == 2

    for damaged in (b"", files()[0].read_bytes()[: size // 2], b"x" * size):
        for path in files():
            path.write_bytes(damaged)
        count = len(looked)
        assert torch.equal(cache(1.0)(images[0], look).blocks, first.blocks)
        assert len(looked) == count + 1
    with pytest.MonkeyPatch.context() as patch:  # killed before the file has its name
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache(1.0)(images[3], look)
    assert all(path.suffix == ".safetensors" for path in files())
    left = files()[0].with_name(".left.tmp")  # what SIGKILL leaves is never read, and goes first
    left.write_bytes(b"x" * 10 * size)
    os.utime(left, (0, 0))
    cache(4 * size / 1e9)(images[3], look)
    assert not left.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache_folder=.*file.* cannot be made"):
        FeatureCache("tower", None, str(tmp_path / "file" / "inner"), 1.0)


@pytest.mark.parametrize("arguments", [{}, WECLIP_PLUS], ids=["weclip", "with dino"])
def test_towers_stay_as_they_are(batch: dict[str, Any], arguments: dict[str, Any]) -> None:
    method = build(**arguments)
    towers = [tower for tower in (method.tower, method.dino) if tower is not None]
    before = [deepcopy(tower.network.state_dict()) for tower in towers]
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.1)
    method.train()
    for _ in range(5):
        loss = method.training_step(batch, 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for tower, state in zip(towers, before, strict=True):
        assert not tower.network.training
        assert all(parameter.grad is None for parameter in tower.parameters())
        assert all(torch.equal(tensor, state[name]) for name, tensor in tower.network.state_dict().items())
    assert not method.look(batch["image"])[0].blocks.requires_grad
    learnt = {name.partition(".")[0] for name, p in method.named_parameters() if p.grad is not None}
    assert learnt == {"fusion", "decoder", *(("dino_fusion",) if method.dino else ())}
    assert not [name for name in method.state_dict() if ".network." in name]


def test_the_plain_method_is_weclip_plus_without_what_it_adds(batch: dict[str, Any]) -> None:
    flags = {"dino": None, "soft_product": False, "self_labels": None, "skip_block": False}
    plain, off = build(), build(**WECLIP_PLUS | flags | {k: WECLIP.get(k) for k in ("static_steps",)} | {
        "box_threshold": 0.4, "losses": {"seg": {"weight": 1.0}, "aff": {"weight": 0.1}, "dice": None},
    })  # fmt: skip
    off.load_state_dict(plain.state_dict())
    losses = []
    for method in (plain, off):
        torch.manual_seed(3)
        losses.append(method.training_step(batch, 0)["loss"])
    assert torch.equal(*losses)


def test_own_labels_begin_at_their_step(batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {}
    for gate in (False, True):
        method = build(**WECLIP_PLUS | {"self_labels": {"step": 5, "threshold": 0.0, "gate": gate}}).eval()
        seen, dino = method.look(batch["image"])
        decoded = method.decode(seen, dino)
        predicted = torch.nn.functional.interpolate(decoded.seg, size=(32, 32), mode="bilinear").argmax(1)
        for step in (4, 5):
            monkeypatch.setattr(WeCLIP, "global_step", step)
            labels[step] = method.online_label(batch["image"], batch["label"], seen, decoded)
        shown = torch.nn.functional.pad(batch["label"], (1, 0), value=1.0)
        assert all(
            set(ids.unique().tolist()) <= set(row.nonzero()[:, 0].tolist())
            for ids, row in zip(labels[4], shown, strict=True)
        )
        allowed = torch.stack([row[ids] > 0 for ids, row in zip(predicted, shown, strict=True)])
        assert torch.equal(labels[5], torch.where(allowed, predicted, labels[4]) if gate else predicted)


def test_padding_may_be_left_out(batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    for flag in (False, True):
        method = build(ignore_padding=flag)
        proper = method.losses["seg"].forward
        monkeypatch.setattr(method.losses["seg"], "forward", lambda a, b, f=proper: seen.append(b) or f(a, b))
        method.training_step(batch, 0)
    assert (seen[0] == 255).sum() == 0
    assert (seen[1][1, :8] == 255).all()
    assert torch.equal(seen[1][0], seen[0][0])


def test_lower_precision(batch: dict[str, Any]) -> None:
    """The towers may see in bfloat16; maps and affinities are computed in float32."""
    method = build()
    with torch.autocast("cpu", torch.bfloat16):
        seen, dino = method.look(batch["image"])
        decoded = method.decode(seen, dino)
        cam = method.refined_cam(seen, batch["label"], decoded, refine=True)
        loss = method.training_step(batch, 0)["loss"]
    assert cam.dtype == decoded.affinity.dtype == torch.float32
    loss.backward()
    assert loss.isfinite()


def test_no_background(batch: dict[str, Any]) -> None:
    method = build()
    method.without_background()
    label = method.pseudo_label(batch["image"], torch.rand(2, 3, 32, 32) / 9, batch["label"])
    assert not (label == 0).any()
    assert torch.isfinite(method.training_step(batch, 0)["loss"])


def test_log_odds() -> None:
    seg = torch.randn(2, 4, 3, 3, dtype=torch.double)
    probability = seg.softmax(1)[:, 1:].amax((-2, -1))
    torch.testing.assert_close(log_odds(seg), probability.logit())
    assert log_odds(seg * 1e4).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"affinity_layers": 4}, "affinity_layers is 4"),
        ({"refine_layers": 0}, "refine_layers is 0"),
        ({"box_threshold": 1.0}, "box_threshold is 1.0"),
        ({"normalisation": "none"}, "normalisation is 'none'"),
        ({"long_side": 0}, "long_side is 0"),
        ({"self_labels": {"step": 3}}, "self_labels is"),
        ({"self_labels": {"step": "x", "threshold": 0.5, "gate": True}}, "self_labels is"),
        ({"par": {"steps": 3}}, "par.steps does not exist: known are dilations"),
        ({"decoder_heads": 0}, "decoder_heads=0, at least 1"),
        ({"channels": 15}, "channels is 15"),
        ({"cache_features": -1.0}, "cache_features is -1.0"),
        ({"cache_folder_gb": 0}, "cache_folder_gb is 0"),
        ({"backbone": "resnet18"}, "no image tower of CLIP"),
        ({"dino": "resnet18", "dino_weights": None}, "no vision transformer"),
        ({"losses": {"cross": {"weight": 1.0}}}, "set method.dino"),
        ({"text": "nothing"}, "NAME/WEIGHTS"),
        ({"weights": "huge"}, "neither a .pth"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        build(**arguments)
    assert "\n" not in str(error.value)


# --- at the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories of CLIP-ES, WeCLIP and WeCLIP+ on small shapes."""
    folder = tmp_path_factory.mktemp("clip")
    given = {"clip_es": CLIP_OVERRIDES, "weclip": WECLIP_OVERRIDES, "weclip_plus": WECLIP_PLUS_OVERRIDES}
    for name, overrides in given.items():
        method = f"method={name.removesuffix('_plus')}"
        assert call("train", method, *overrides, "recipe=null", f"hydra.run.dir={folder / name}") == 0
    return {name: folder / name for name in given}


def checkpoint(run: Path) -> str:
    return f"checkpoint={run / 'checkpoints/last.ckpt'}"


@pytest.mark.parametrize("name", ["clip_es", "weclip", "weclip_plus"])
def test_checkpoints_hold_no_tower(runs: dict[str, Path], name: str) -> None:
    stored = torch.load(runs[name] / "checkpoints/last.ckpt", weights_only=True)
    keys = {key for key in stored["state_dict"] if key.startswith(("tower.", "dino."))}
    assert keys == {"tower.key", *(("dino.key",) if name == "weclip_plus" else ())}
    steps = 0 if name == "clip_es" else 2
    assert json.loads((runs[name] / "metrics.json").read_text())["steps"] == stored["global_step"] == steps


@pytest.mark.parametrize("name", ["clip_es", "weclip", "weclip_plus"])
def test_every_command_takes_the_checkpoint(command: Command, runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    trained = json.loads((runs[name] / "metrics.json").read_text())
    where = f"hydra.run.dir={tmp_path / 'eval'}"
    same = ["protocol=single_scale", "data.eval_batch_size=2", "data.num_workers=0"]  # sums of a batch round otherwise
    ended = command("eval", checkpoint(runs[name]), *same, where)
    assert ended.code == 0, ended.err
    again = json.loads((tmp_path / "eval/metrics.json").read_text())
    for key in ("val/map", "val/cam_miou", *(("val/miou",) if name != "clip_es" else ())):
        assert again[key] == pytest.approx(trained[key], nan_ok=True), key
    for number, extra in enumerate(("protocol=honest", "detail=true", "protocol=weclip")):
        where = f"hydra.run.dir={tmp_path / str(number)}"
        ended = command("eval", checkpoint(runs[name]), extra, where, "data.num_workers=0")
        assert ended.code == 0, ended.err
    ended = command("label", checkpoint(runs[name]), f"out={tmp_path / 'labels'}", "num_workers=0", "cams=true")
    assert ended.code == 0, ended.err
    masks = sorted((tmp_path / "labels/masks").glob("*.png"))
    assert len(masks) == 6
    (tmp_path / "photographs").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (50, 37, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "photographs/a.png")
    ended = command(
        "predict", checkpoint(runs[name]), f"images={tmp_path / 'photographs'}", f"out={tmp_path / 'out'}",
        "cam=true", "num_workers=0",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    mask = np.asarray(Image.open(tmp_path / "out/masks/a.png"))
    model = wsss.load(runs[name] / "checkpoints/last.ckpt")
    np.testing.assert_array_equal(model.predict(picture).mask, mask)


@pytest.mark.parametrize("method", ["weclip", "weclip with dino"])
def test_bit_equal_resume(tmp_path: Path, method: str) -> None:
    arguments = [*settings(method, steps=6, workers=0), "recipe=null"]
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'a'}") == 0
    again = [*arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto"]
    for step in (1, 3, 5):
        interrupted(*again, step=step, method="wsss.methods.weclip.WeCLIP")
    assert call("train", *again) == 0
    agreeing, different = compare(tmp_path / "a", tmp_path / "b")
    assert different == []
    assert agreeing > 100


def test_nothing_to_learn_is_resumed(tmp_path: Path, command: Command) -> None:
    arguments = ["method=clip_es", *CLIP_OVERRIDES, "recipe=null", "resume=auto"]
    first = command("train", *arguments, f"hydra.run.dir={tmp_path / 'a'}")
    assert first.code == 0, first.err
    assert "nothing to learn" in first.out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIPES, "validation_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'b'}") != 0
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'b'}") == 0
    kept = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in "ab"]
    assert {k: v for k, v in kept[0].items() if k.startswith("val/")} == pytest.approx(
        {k: v for k, v in kept[1].items() if k.startswith("val/")}, nan_ok=True
    )


def test_another_tower_is_refused(command: Command, runs: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tower = build(CLIPES).tower.network
    with torch.no_grad():
        tower.head.bias.zero_()
        tower.norm.bias.add_(0.5)
    save_file(tower.state_dict(), tmp_path / "tower.safetensors")
    for name in ("clip_es", "weclip"):
        ended = command("eval", checkpoint(runs[name]), f"method.weights={tmp_path / 'tower.safetensors'}")
        assert ended.code == 2
        assert "sha256" in ended.err
        assert "add method.weights=FILE" in ended.err
        assert len(ended.err.strip().splitlines()) == 1


def test_true_labels_and_a_cache_of_its_own(command: Command, runs: dict[str, Path], tmp_path: Path) -> None:
    """wsss-label knows the true classes also where the training was measured without; a cache is no file's to set."""
    arguments = ["method=clip_es", *CLIP_OVERRIDES, "recipe=null", "protocol=honest", "method.cache_features=0.1"]
    ended = command("train", *arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    for name, run in (("a", runs["clip_es"]), ("b", tmp_path / "run")):
        ended = command("label", checkpoint(run), f"out={tmp_path / name}", "num_workers=0")
        assert ended.code == 0, ended.err
    masks = [{path.name: path.read_bytes() for path in (tmp_path / name / "masks").glob("*.png")} for name in "ab"]
    assert len(masks[0]) == 6
    assert masks[0] == masks[1]


def test_background_without_words() -> None:
    with pytest.raises(InputError, match=r"method\.background is empty"):
        build(CLIPES, background=[])
