"""WeakTr against recordings of the original code: every array of `--golden DIR`/weaktr."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from official import mctformer_to_official, read_official
from omegaconf import OmegaConf
from recorded import fit
from torch import Tensor

from wsss.cam import rescale_photograph
from wsss.config import config_dir
from wsss.losses import build
from wsss.losses.cross_entropy import ClippedCrossEntropyLoss
from wsss.methods.mctformer import MCTformer
from wsss.networks.decoders import MaskTransformer
from wsss.networks.mct import attend_apart

FILE = "weaktr/weaktr_clipped_ce"
WEIGHTS, FORWARD, TRAINING = (f"weaktr/weaktr_{name}" for name in ("weights", "forward", "training"))
CAMS, DECODER = "weaktr/weaktr_cams", "weaktr/weaktr_mask_decoder"

# What no array tells. Shapes, classes, depth, heads, reductions and steps come from the arrays.
SETTINGS: dict[str, Any] = {"scales": (1.0, 1.2)}
LOSSES = {"cls": "cls", "patch_cls": "pat", "fine_cls": "fine"}
"""Our loss keys and the recorded ones; in the steps of a training fine is attn."""

EXCEPTED = (
    (FILE, "*/logits */gt start_value patch_size", "input"),
    (WEIGHTS, "sd/norm.*", "unused parameter, not imported"),
    (WEIGHTS, "img_size patch", "told by other arrays, compared with them"),
    (FORWARD, "*/images_u8", "input"),
    (TRAINING, "batch*/* lr", "input"),
    (TRAINING, "names group0 group1", "names"),
    (CAMS, "image_u8 target", "input"),
    (DECODER, "sd/* tokens heads grid", "input"),
)


def normalised(images: Tensor) -> Tensor:
    """Bytes (B, H, W, 3) -> (B, 3, H, W)."""
    mean, std = torch.tensor(MCTformer.mean), torch.tensor(MCTformer.std)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def build_method(recordings: Any, folder: Path, **given: Any) -> MCTformer:
    """A method from recorded weights, by way of a file as the original code writes it."""
    recorded = recordings(WEIGHTS)
    path = folder / "checkpoint.pth"
    state = {key.removeprefix("sd/"): tensor for key, tensor in recorded.items() if key.startswith("sd/")}
    torch.save({"model": state}, path)
    name, ours, values, _ = read_official(MCTformer, path)
    assert name == "weaktr"
    told = values["backbone_args"]
    for key, value in (("depth", told["depth"]), ("heads", told["num_heads"]), ("num_classes", values["num_classes"])):
        assert value == recorded[key].item()
    assert (told["img_size"], told["patch_size"]) == (recorded["img_size"].item(), recorded["patch"].item())
    values["fusion"] = {"pool": str(recorded["pool"])} | {
        ours: recorded[theirs].item()
        for ours, theirs in (("reduction", "reduction"), ("feature_reduction", "feat_reduction"))
    }
    node: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "method" / "weaktr.yaml"))
    composed = {key: value for key, value in node.items() if key not in ("_target_", "backbone", "backbone_args")}
    settings = composed | {"attention_layers": told["depth"]} | values | given
    method = MCTformer(backbone="vit_tiny_patch16_224", **settings)
    method.load_state_dict(ours)
    return method.eval()


@pytest.fixture(scope="session")
def method(recordings: Any, tmp_path_factory: pytest.TempPathFactory) -> MCTformer:
    return build_method(recordings, tmp_path_factory.mktemp("weaktr")).requires_grad_(False)


def test_export_gives_back_what_was_imported(recordings: Any, match: Any, method: MCTformer) -> None:
    state = mctformer_to_official(method.state_dict())
    recorded = {key.removeprefix("sd/"): t for key, t in recordings(WEIGHTS).items() if key.startswith("sd/")}
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in recorded.items()}
    for name in recorded:
        if not name.startswith("norm."):
            match(WEIGHTS, f"sd/{name}", state[name])
    fusion, args = method.hparams.fusion, method.hparams.backbone_args
    for key, value in (
        ("reduction", fusion["reduction"]),
        ("feat_reduction", fusion["feature_reduction"]),
        ("depth", len(method.encoder.blocks)),
        ("heads", args["num_heads"]),
        ("num_classes", method.num_classes),
    ):
        match(WEIGHTS, key, value)


def test_forward(recordings: Any, match: Any, method: MCTformer) -> None:
    arrays, encoder = recordings(FORWARD), method.encoder
    for name in dict.fromkeys(key.split("/")[0] for key in arrays):
        image = normalised(arrays[f"{name}/images_u8"])
        tokens, output = encoder(image, 1, affinity=True), method(image)
        state, size = encoder.embed(image)
        position = encoder.position(size, tuple(image.shape[-2:]))
        outputs, raw = [], []
        for block in encoder.blocks:
            state, added, heads = attend_apart(block, state)
            outputs.append(added)
            raw.append(torch.stack(list(heads), dim=1))
        assert method.head is not None
        assert tokens.affinity is not None
        patch_cam = method.head(tokens.patches)
        weights = encoder.fusion(torch.stack(outputs)).flatten(1)
        pooled = [len(image), weights.shape[1], state.shape[1], state.shape[2] // encoder.blocks[0].attn.num_heads]
        torch.testing.assert_close(encoder(image).patches, tokens.patches)  # fused attention
        attention, coarse = output["attention"], patch_cam.relu()
        ours = {
            "class_logits": output["logits"],
            "patch_logits": method.pool(patch_cam),
            "fine_logits": output["cam"].mean(dim=(-2, -1)),
            "aaf_weights": weights,
            "cams": attention * coarse,
            "P": tokens.affinity,
            "fine_cam": output["cam"],
            "coarse_cam": coarse,
            "X": attention,
            "attn_raw_image0": torch.stack(raw)[:, 0],
            "o_image0": torch.stack(outputs)[:, 0],
            "feat_pooled_shape": torch.tensor(pooled),
            "class_tokens_out": tokens.class_tokens[-1],
            "patch_tokens_out": tokens.patches.flatten(2).mT,
            "pos_embed_used": position,
        }
        for key in (key.removeprefix(f"{name}/") for key in arrays if key.startswith(f"{name}/")):
            if key != "images_u8":
                # values reach 15, those of the maps of attention 1
                atol = 1e-6 if key in ("aaf_weights", "X", "P", "attn_raw_image0") else 5e-5
                match(FORWARD, f"{name}/{key}", ours[key], rtol=1e-5, atol=atol)


def test_cams(recordings: Any, match: Any, method: MCTformer) -> None:
    """From the views that the original drew, and from the photograph by our own scales."""
    arrays = recordings(CAMS)
    image, label = normalised(arrays["image_u8"][None]), arrays["target"]
    scaled = [image, *(rescale_photograph(image, s, method.mean, method.std) for s in SETTINGS["scales"][1:])]
    views = [view for one in scaled for view in (one, one.flip(-1))]
    for index, view in enumerate(views):
        match(CAMS, f"view{index}", view, atol=2e-3)  # the network's input, rounded to half precision
    for kind in ("refine", "norefine"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(method.hparams, "refine", kind == "refine")
            total = torch.zeros(())
            for index in range(len(views)):
                cam = method(arrays[f"view{index}"].float())["cam"] * label[:, :, None, None]
                cam = torch.nn.functional.interpolate(cam, size=image.shape[-2:], mode="bilinear")
                total = total + (cam.flip(-1) if index % 2 else cam)
            with pytest.MonkeyPatch.context() as scales:
                scales.setattr(method, "cam_scales", SETTINGS["scales"])
                ours = method.multiscale(image)[0]
        present = label[0].nonzero()[:, 0]
        match(CAMS, f"{kind}/classes", present)
        match(CAMS, f"{kind}/cam", method.normalise(total)[0, present], atol=5e-5)
        torch.testing.assert_close(ours[present], arrays[f"{kind}/cam"], rtol=0, atol=2e-3)
        if f"{kind}/sum" in arrays:
            recorded = arrays[f"{kind}/sum"]
            step = -(-image.shape[-1] // recorded.shape[-1])
            match(CAMS, f"{kind}/sum", total[0, :, ::step, ::step], rtol=1e-5, atol=5e-5 * recorded.abs().max())


# --- training ---------------------------------------------------------------------------------------------------------


def batches(arrays: Any) -> list[dict[str, Any]]:
    count = len({key.split("/")[0] for key in arrays if key.startswith("batch")})
    return [
        {"image": normalised(arrays[f"batch{k}/images_u8"]), "label": arrays[f"batch{k}/labels"]} for k in range(count)
    ]


def test_gradients(recordings: Any, match: Any, tmp_path: Path) -> None:
    arrays, method = recordings(TRAINING), build_method(recordings, tmp_path).train()
    method.log = method.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    batch = batches(arrays)[0]
    losses = dict(method.losses)
    for ours, theirs in LOSSES.items():
        method.zero_grad()
        method.losses = torch.nn.ModuleDict({ours: losses[ours]})
        result = method.training_step(batch, 0)
        result["loss"].backward()
        match(TRAINING, f"loss/{theirs}", result["loss"], rtol=1e-5)
        norms = mctformer_to_official(
            {n: torch.tensor(-1.0) if p.grad is None else p.grad.double().norm() for n, p in as_shaped(method)}
            | {n: p for n, p in method.named_parameters() if n == "encoder.cls_token"}
        )
        norms["cls_token"] = torch.tensor(-1.0) if (g := method.encoder.cls_token.grad) is None else g.double().norm()
        norms |= {"norm.weight": torch.tensor(-1.0), "norm.bias": torch.tensor(-1.0)}
        values = torch.stack([norms[name].double() for name in arrays["names"].tolist()])
        match(TRAINING, f"grad_norm/{theirs}", values, rtol=1e-4, atol=1e-7)
    method.zero_grad()
    method.losses = torch.nn.ModuleDict(losses)
    method.training_step(batch, 0)["loss"].backward()
    gradients = mctformer_to_official({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    for key in (key for key in arrays if key.startswith("grad/")):
        atol = 1e-5 * arrays[key].abs().max().item() + 1e-9
        match(TRAINING, key, gradients[key.removeprefix("grad/")], rtol=1e-4, atol=atol)


def as_shaped(method: MCTformer) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in method.named_parameters() if name != "encoder.cls_token"]


class Steps(pl.Callback):
    """The loss terms of each step of a training."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.logged.append(outputs["terms"])


def test_training(recordings: Any, match: Any, tmp_path: Path) -> None:
    arrays = recordings(TRAINING)
    lr, count = arrays["lr"].item(), len(arrays["step/cls_loss"])
    method = build_method(recordings, tmp_path, lr=lr).train()
    method.rate = lambda epoch: lr  # the original's loop was recorded without its schedule
    data, steps = batches(arrays), Steps()
    trainer = fit(method, [data[step % len(data)] for step in range(count)], steps, tmp_path)
    for ours, theirs in LOSSES.items():
        found = torch.stack([terms[ours] for terms in steps.logged])
        match(TRAINING, f"step/{theirs.replace('fine', 'attn')}_loss", found, rtol=1e-4)

    free, decayed = trainer.optimizers[0].param_groups
    match(TRAINING, "group_wd", torch.tensor([free["weight_decay"], decayed["weight_decay"]], dtype=torch.double))
    named = mctformer_to_official(dict(method.named_parameters()))
    for key, group in (("group0", free), ("group1", decayed)):
        names = {name for name, tensor in named.items() if any(tensor is p for p in group["params"])}
        assert names == {name for name in arrays[key].tolist() if not name.startswith("norm.")}

    state = mctformer_to_official(method.state_dict())
    first = recordings(WEIGHTS)
    state |= {name: first[f"sd/{name}"] for name in ("norm.weight", "norm.bias")}  # nothing trains them
    # the gradient of the bias of the keys is 0 but for rounding, and Adam makes steps of it, either way
    drift = 2 * lr * count
    for key in (key for key in arrays if key.startswith("final/")):
        atol = torch.full(arrays[key].shape, 2e-5, dtype=torch.double)
        if key.endswith("qkv.bias"):
            atol[len(atol) // 3 : -len(atol) // 3] = drift
        match(TRAINING, key, state[key.removeprefix("final/")], atol=atol)
    names = arrays["names"].tolist()
    norms = torch.stack([state[name].double().norm() for name in names])
    atol = torch.tensor([drift if name.endswith("qkv.bias") else 1e-5 for name in names], dtype=torch.double)
    match(TRAINING, "final_norm", norms, rtol=1e-4, atol=atol)


# --- the last stage ---------------------------------------------------------------------------------------------------


def test_mask_decoder(recordings: Any, match: Any) -> None:
    arrays = recordings(DECODER)
    state = {key.removeprefix("sd/"): tensor for key, tensor in arrays.items() if key.startswith("sd/")}
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    _, count, width = state["cls_emb"].shape
    decoder = MaskTransformer(width, count, arrays["heads"].item(), depth)
    decoder.load_state_dict(state)
    tokens = arrays["tokens"].mT.unflatten(2, tuple(arrays["grid"].tolist()))
    match(DECODER, "masks", decoder(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["below_start", "with_ignore", "above_start", "one_hard_patch", "batch_of_one"])
def test_clipped_cross_entropy(recordings: Any, match: Any, case: str) -> None:
    arrays = recordings(FILE)
    logits, label = arrays[f"{case}/logits"].clone().requires_grad_(), arrays[f"{case}/gt"].long()
    settings = {"start": arrays["start_value"].item(), "patch": arrays["patch_size"].item()}
    loss = build("clipped_ce", **settings)
    assert isinstance(loss, ClippedCrossEntropyLoss)
    value = loss(logits, label)
    value.backward()
    match(FILE, f"{case}/loss", value, rtol=1e-6)
    match(FILE, f"{case}/pixel_loss", loss.pixels(logits, label), atol=1e-6)
    match(FILE, f"{case}/grad", logits.grad, atol=1e-9)
    match(FILE, f"{case}/pixel_ce", ClippedCrossEntropyLoss(start=-1.0).pixels(logits, label), atol=1e-6)
    if case == "above_start":
        assert torch.equal(loss.pixels(logits, label), ClippedCrossEntropyLoss(start=-1.0).pixels(logits, label))
