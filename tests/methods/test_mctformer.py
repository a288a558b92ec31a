"""MCTformer: its versions, what they compute and refuse, images of any size and label."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from official import mctformer_to_official
from omegaconf import OmegaConf

from wsss import InputError
from wsss.checkpoints import read_checkpoint
from wsss.config import config_dir
from wsss.losses import build as build_loss
from wsss.methods.mctformer import MAPS, MCTformer
from wsss.networks.mct import (
    AdaptiveAttentionFusion,
    JointPosition,
    MCTEncoder,
    attend,
    global_average_pool,
    global_weighted_rank_pool,
)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
VERSIONS = ("mctformer_v1", "mctformer", "mctformer_plus", "weaktr")


def build(version: str = "mctformer", num_classes: int = 3, **arguments: Any) -> MCTformer:
    torch.manual_seed(0)
    node: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "method" / f"{version}.yaml"))
    composed = {key: value for key, value in node.items() if key not in ("_target_", "attention_layers")}
    small = {"backbone": "vit_tiny_patch16_224", "backbone_args": SMALL, "attention_layers": 2}
    if composed["fusion"] is not None:
        small["fusion"] = composed["fusion"] | {"reduction": 2, "feature_reduction": 3}
    method = MCTformer(num_classes, **(composed | small | arguments))
    method.log = method.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return method


def batch(num_classes: int = 3) -> dict[str, Any]:
    torch.manual_seed(1)
    label = torch.zeros(3, num_classes)
    label[0, 0] = label[1, -1] = 1  # the third image has no label
    return {"image": torch.randn(3, 3, 32, 32), "label": label}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("num_classes", [1, 3])
def test_training_step_is_finite_with_any_labels(version: str, num_classes: int) -> None:
    method = build(version, num_classes)
    result = method.training_step(batch(num_classes), 0)
    assert set(result["terms"]) == set(method.losses)
    result["loss"].backward()
    unused = [n for n, p in method.named_parameters() if p.grad is None]
    assert unused == []
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (41, 70), (9, 100)])
def test_images_of_any_size(version: str, size: tuple[int, int]) -> None:
    method = build(version, cam_scales=(1.0, 2.0)).eval()
    output = method.infer(torch.randn(2, 3, *size))
    assert output["cam"].shape == (2, 3, *size)
    assert output["attention"].shape == (2, 3, size[0] // 8, size[1] // 8)
    assert output["seg"] is None
    assert 0 <= output["cam"].min() <= output["cam"].max() <= 1


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(InputError, match="an image of 7x40 pixels is smaller than one patch of 8"):
        build()(torch.zeros(1, 3, 40, 7))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"attention_layers": 4}, "attention_layers is 4: vit_tiny_patch16_224 has 3 blocks, use 1 to 3"),
        ({"attention_layers": 0}, "use 1 to 3"),
        ({"map_type": "heat"}, "map_type is 'heat': expected one of attention, patchcam, fused, root_fused"),
        ({"patch_pooling": "max"}, "patch_pooling is 'max': expected one of None, gap, gwrp"),
        ({"patch_pooling": None, "losses": None}, "losses.patch_cls: MCTformer does not compute it"),
        (
            {"patch_pooling": None, "losses": {"cls": {}}},
            "map_type is 'fused': expected without patch_pooling one of attention",
        ),
        ({"position": "none"}, "position is 'none': expected one of joint, split"),
        ({"classify_by": "all"}, "classify_by is 'all'"),
        ({"backbone_args": SMALL | {"img_size": 4}}, "img_size is 4: expected at least one patch of 8"),
        ({"losses": {"fine_cls": {}}}, "losses.fine_cls: MCTformer does not compute it, only cls, patch_cls, cct"),
        ({"fusion": {"reduction": 7}}, "fusion.reduction is 7: expected 1 to 6"),
        ({"fusion": {"reduction": None}}, "fusion.reduction is None: expected 1 to 6"),
        ({"fusion": {"reduction": 2, "feature_reduction": 13}}, "fusion.feature_reduction is 13: expected 1 to 12"),
        ({"fusion": {"pool": "sum"}}, "fusion.pool is 'sum': expected max or avg"),
        ({"fusion": {"depth": 2}}, "fusion.depth does not exist: known are reduction, feature_reduction, pool"),
        ({"losses": {"cct": {"layers": 0}}}, "losses.cct.layers is 0"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        build(**arguments)
    assert said in str(refused.value)


def test_maps_and_refinement() -> None:
    method = build().eval()
    image = torch.randn(1, 3, 32, 40)
    tokens = method.encoder(image, 2, affinity=True)
    assert tokens.attention is not None
    assert tokens.affinity is not None
    assert method.head is not None
    state, maps = method.encoder.embed(image)[0], []
    for block in method.encoder.blocks:
        maps.append(attend(block, state)[1])
        state = block(state)
    torch.testing.assert_close(tokens.attention.flatten(2), (maps[1] + maps[2])[:, :3, 3:] / 2)
    torch.testing.assert_close(tokens.affinity, sum(maps)[:, 3:, 3:])
    attention, spread = tokens.attention.flatten(2), tokens.affinity[0]
    patch_cam = method.head(tokens.patches).relu().flatten(2)
    expected = {
        "attention": attention,
        "patchcam": patch_cam,
        "fused": attention * patch_cam,
        "root_fused": (attention * patch_cam) ** 0.5,
    }
    for name, cam in expected.items():
        method.locate = MAPS[name]
        method.hparams.refine = False
        torch.testing.assert_close(method(image)["cam"].flatten(2), cam)
        method.hparams.refine = True
        refined = torch.stack([sum(spread[p, q] * cam[0, :, q] for q in range(20)) for p in range(20)], dim=1)
        torch.testing.assert_close(method(image)["cam"].flatten(2)[0], refined)


@pytest.mark.parametrize("rows", [None, 4])
def test_attention_of_a_block(rows: int | None) -> None:
    """What a block gives, its gradient, and what it looks at are the same as timm's own."""
    block = build(backbone_args=SMALL | {"qk_norm": True, "init_values": 0.1}).double().encoder.blocks[0]
    tokens = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    seen: list[Any] = []
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = block(tokens)
    expected_map = seen[0].mean(1)[:, :rows]
    block.attn.fused_attn = True
    output, weights = attend(block, tokens, rows)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, expected_map)
    for ours, theirs in ((output, expected), (weights, expected_map)):
        torch.testing.assert_close(
            *(torch.autograd.grad(x.square().sum(), tokens, retain_graph=True) for x in (ours, theirs))
        )


def test_attention_is_fused_where_no_patch_is_asked_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    for method, fused in ((build(), 0), (build(refine=False), 3)):
        method.training_step(batch(), 0)
        assert len(calls) == 3
        method(batch()["image"])
        assert len(calls) == 3 + fused
        calls.clear()


@pytest.mark.parametrize("version", VERSIONS)
def test_tokens_are_seen_where_the_attention_of_all_blocks_is_asked_for(version: str) -> None:
    """`wsss-eval detail=true`: then no block is called itself."""
    method = build(version, attention_layers=3, refine=False).eval()
    method.measure_details()
    with method.watching_tokens():
        method.infer(torch.randn(1, 3, 32, 32))
    assert method.metrics["over_smoothing"].images == 1


def test_blocks_of_another_kind_are_refused() -> None:
    with pytest.raises(InputError, match="has blocks of its own"):
        build(backbone="vit_small_patch16_18x2_224", backbone_args={"depth": 1})


def test_class_tokens_start_from_those_of_the_backbone(tmp_path: Path) -> None:
    """At the backbone's own grid nothing is resized; a smaller table of + repeats or drops cells."""
    args = {key: value for key, value in SMALL.items() if key != "img_size"}
    deit = timm.create_model("vit_tiny_patch16_224", img_size=32, **args)
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    encoder = MCTEncoder(5, "vit_tiny_patch16_224", str(tmp_path / "deit.pth"), SMALL)
    assert isinstance(encoder.position, JointPosition)
    torch.testing.assert_close(encoder.position.pos_embed[:, 5:], deit.pos_embed[:, 1:])
    for c in range(5):
        torch.testing.assert_close(encoder.cls_token[:, c], deit.cls_token[:, 0])
        torch.testing.assert_close(encoder.position.pos_embed[:, c], deit.pos_embed[:, 0])
    torch.testing.assert_close(encoder.blocks[2].mlp.fc1.weight, deit.blocks[2].mlp.fc1.weight)
    split = MCTEncoder(2, "vit_tiny_patch16_224", str(tmp_path / "deit.pth"), SMALL | {"img_size": 64}, "split")
    table = split.position.pos_embed_pat.unflatten(1, (8, 8))
    torch.testing.assert_close(table[:, ::2, ::2].flatten(1, 2), deit.pos_embed[:, 1:])
    torch.testing.assert_close(table[:, 1::2, ::2], table[:, ::2, ::2])


def test_a_wide_network_at_the_rate_of_a_narrow_one(tmp_path: Path) -> None:
    """One step of AdamW moves the class logits by as much more as there are more channels; that is said."""
    moved = []
    for width in (32, 128):
        torch.manual_seed(0)
        method = build(backbone_args=SMALL | {"embed_dim": width})
        optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
        before = method(batch()["image"])["logits"].detach()
        method.training_step(batch(), 0)["loss"].backward()
        optimizer.step()
        moved.append((method(batch()["image"])["logits"].detach() - before).abs().mean())
    assert moved[1] > 2 * moved[0]
    args = {key: value for key, value in SMALL.items() if key != "img_size"}
    deit = timm.create_model("vit_tiny_patch16_224", img_size=32, **args)
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    rate = 6.25e-5 * 384 / SMALL["embed_dim"]
    with pytest.warns(UserWarning, match=rf"2.0 times as fast as in the paper.* set method.lr={rate:.3g}"):
        build(weights=str(tmp_path / "deit.pth"), lr=2 * rate)


def test_files_that_are_mixed_up(tmp_path: Path) -> None:
    args = {key: value for key, value in SMALL.items() if key != "img_size"}
    deit = timm.create_model("vit_tiny_patch16_224", img_size=32, **args)
    path = tmp_path / "file.pth"
    torch.save({"model": deit.state_dict()}, path)
    with pytest.raises(InputError, match=f"ImageNet weights .* train from it with method.weights={path}"):
        read_checkpoint(str(path))
    torch.save({"model": mctformer_to_official(build().state_dict())}, path)
    with pytest.raises(InputError, match=r"has 3 class tokens, expected one: .* checkpoint=FILE"):
        build(weights=str(path))
    torch.save({"cls_token": torch.zeros(1, 1, 4)}, path)
    with pytest.raises(InputError, match="is no vision transformer"):
        build(weights=str(path))


@pytest.mark.parametrize("version", VERSIONS)
def test_official_files_tell_their_version(tmp_path: Path, version: str) -> None:
    path, method = tmp_path / "checkpoint.pth", build(version)
    official = mctformer_to_official(method.state_dict())
    torch.save({"model": {f"module.{name}": tensor for name, tensor in official.items()}}, path)
    checkpoint = read_checkpoint(str(path))
    assert checkpoint["wsss"]["method"] == version
    assert checkpoint["hyper_parameters"]["backbone_args"] == {
        "embed_dim": 24, "depth": 3, "patch_size": 8, "img_size": 32, "mlp_ratio": 4.0,
        "num_heads": 2 if version == "weaktr" else None,
    }  # fmt: skip
    assert all(torch.equal(tensor, method.state_dict()[name]) for name, tensor in checkpoint["state_dict"].items())
    assert checkpoint["state_dict"].keys() == method.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("blocks.1.norm1.weight"), "lacks blocks.1.norm1.weight (1 in all)"),
        (lambda s: s.update({"extra": torch.zeros(1)}), "has unknown extra"),
        (lambda s: s.update({"head.bias": torch.zeros(7)}), "unexpected shape in head.bias"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 3 + 15, 24)}), "has 15 patch positions, which is no square"),
    ],
    ids=["missing", "unknown", "shape", "grid"],
)
def test_damaged_official_files(tmp_path: Path, change: Any, said: str) -> None:
    state = dict(mctformer_to_official(build().state_dict()))
    change(state)
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError) as refused:
        read_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert said in str(refused.value)
    assert "method=mctformer" in str(refused.value)


def test_equal_weights_are_the_mean_attention() -> None:
    method = build("weaktr").eval()
    image = torch.randn(2, 3, 32, 40)
    plain = MCTEncoder(3, "vit_tiny_patch16_224", None, SMALL)
    plain.load_state_dict({n: t for n, t in method.encoder.state_dict().items() if not n.startswith("fusion.")})
    assert method.encoder.fusion is not None
    for layer in (0, 2):
        torch.nn.init.zeros_(method.encoder.fusion.gate[layer].weight)  # the sigmoid of 0
    depth = len(plain.blocks)
    fused, mean = (encoder(image, depth, affinity=True) for encoder in (method.encoder, plain))
    for of_fused, of_mean in ((fused.attention, mean.attention), (fused.affinity, mean.affinity / depth)):
        torch.testing.assert_close(2 * of_fused, of_mean)


def test_the_fusion_weighs_interleaved_channels() -> None:
    """Against a hand-written table: channel c is of head c mod H; map m of head m // L in block m mod L."""
    depth, heads, width = 3, 2, 6
    fusion = AdaptiveAttentionFusion(depth, heads, width, reduction=2, feature_reduction=3, pool="avg")
    outputs = torch.randn(depth, 1, 4, width)
    features = []
    for head in range(heads):
        for layer in range(depth):
            channels = [head, head + 2, head + 4]
            features.append(fusion.feature(outputs[layer, 0, :, channels].mean(0)))
    expected = fusion.gate(torch.cat(features))
    torch.testing.assert_close(fusion(outputs)[0].flatten(), expected)


def test_refined_maps_teach_the_fusion_alone() -> None:
    method = build("weaktr", losses={"fine_cls": {}})
    method.training_step(batch(), 0)["loss"].backward()
    taught = {name for name, p in method.named_parameters() if p.grad is not None}
    assert taught == {name for name, _ in method.named_parameters() if name.startswith("encoder.fusion.")}


def test_pooling() -> None:
    maps = torch.tensor([[[[3.0, -1.0], [2.0, 0.0]]]])
    assert global_average_pool(maps).item() == 1
    ranked = (3 + 0.5 * 2 + 0.25 * 0 - 0.125) / 1.875
    assert global_weighted_rank_pool(maps, 0.5).item() == pytest.approx(ranked)
    torch.testing.assert_close(global_weighted_rank_pool(maps, 1.0), global_average_pool(maps))
    assert global_weighted_rank_pool(maps, 0.0).item() == 3


def test_class_token_contrast_against_its_formula() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(3, 2, 4, 5, dtype=torch.double, requires_grad=True)
    label = torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.double)
    loss = build_loss("cct", layers=2)(tokens, label)
    expected = torch.zeros((), dtype=torch.double)
    for layer in tokens[1:]:
        for image, present in zip(layer, label, strict=True):
            unit = image / image.norm(dim=1, keepdim=True)
            for j in present.nonzero()[:, 0]:
                cosines = unit @ unit[j]
                expected = expected + (cosines.exp().sum().log() - cosines[j]) / present.sum() / 2 / 2
    torch.testing.assert_close(loss, expected)
    gradient, reference = (torch.autograd.grad(value, tokens, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, reference)
    assert (gradient[:, 1] == 0).all()
    assert (gradient[0] == 0).all()


def test_classification_by_both_heads() -> None:
    method = build("mctformer_plus").eval()
    image = torch.randn(2, 3, 32, 32)
    tokens = method.encoder(image)
    assert method.head is not None
    both = (tokens.class_tokens[-1].mean(-1) + method.pool(method.head(tokens.patches))) / 2
    torch.testing.assert_close(method(image)["logits"], both)
