"""ResNet38 against recordings of the original code: `--golden DIR`/resnet38, and the networks of DIR/ppc_seam."""

import json
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from wsss.losses import build
from wsss.networks.affinity import AffinityHead, pair_affinity
from wsss.networks.resnet38 import ResNet38, SEAMHead, Taps, mxnet_name, propagate
from wsss.optim import parameter_groups, warmup_poly
from wsss.refine.random_walk import dense_affinity

pytestmark = pytest.mark.filterwarnings("ignore:ResNet38 starts from random weights")

# What no array and no name tells. Shapes, widths and classes come from the recordings.
SETTINGS: dict[str, Any] = {
    "resnet38": {
        "frozen_stages": 2,
        "heads_from_scratch": {
            "psa_resnet38_cls": True,
            "psa_resnet38_aff": True,
            "seam_resnet38": True,
            "ppc_resnet38_contrast": True,
            "kaist_aeft_net_gpp": False,
        },
        "f9_factor": 0.02,
        "poly": {"lr": 0.1, "weight_decay": 5e-4, "max_steps": 10, "start": (1.0, -2.0)},
    },
    "ppc_seam": {"networks": {"seam": "seam_resnet38", "ppc": "ppc_resnet38_contrast"}},
}

EXCEPTED = (
    # files, arrays, why perturb.py leaves them alone
    ("resnet38/resnet38_forward", "x64 x128 cls_label", "input"),
    ("resnet38/psa_functions", "poly_grads", "input"),
    ("ppc_seam/networks", "x64 pcm_cam pcm_f pcm_f9_weight", "input"),
)


# --- recordings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def read_json(recordings: Any) -> Callable[[str], Any]:
    def read(name: str) -> Any:
        path = recordings.folder / "resnet38" / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"{path} is not there")
        return json.loads(path.read_text())

    return read


@pytest.fixture(scope="session")
def fill(recordings: Any) -> Callable[[nn.Module], nn.Module]:
    """Gives a module the weights of the recordings, which depend on its names, in evaluation mode."""
    path = recordings.folder / "resnet38" / "fill.py"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    spec = spec_from_file_location("fill", path)
    assert spec is not None
    assert spec.loader is not None
    source = module_from_spec(spec)
    spec.loader.exec_module(source)

    def filled(module: nn.Module) -> nn.Module:
        state = {name: torch.from_numpy(source.fill(name, tensor.shape)) for name, tensor in expected(module).items()}
        module.load_state_dict(state, strict=False)
        return module.eval()

    return filled


def expected(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in module.state_dict().items() if not name.endswith("num_batches_tracked")}


@pytest.fixture(scope="session")
def names(read_json: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """For every network the recorded entries of its state dict, by name and in order."""
    return {
        network: {entry["name"]: entry for entry in entries} for network, entries in read_json("param_names").items()
    }


def body(names: Any, network: str) -> ResNet38:
    return ResNet38(width=names[network]["conv1a.weight"]["shape"][0], **FROZEN)


FROZEN = {"frozen_stages": SETTINGS["resnet38"]["frozen_stages"]}


def head_entries(names: Any, network: str, ours: ResNet38) -> list[dict[str, Any]]:
    return [entry for name, entry in names[network].items() if name not in ours.state_dict()]


@pytest.fixture(scope="session")
def network(names: Any, fill: Any) -> ResNet38:
    return fill(body(names, "psa_resnet38_cls"))


@pytest.fixture(scope="session")
def weight(names: Any, fill: Any) -> Callable[[str, str], Tensor]:
    """Of a convolution without bias in the head of a network."""

    def filled(network: str, name: str) -> Tensor:
        head = nn.Module()
        out, channels, *kernel = names[network][f"{name}.weight"]["shape"]
        head.add_module(name, nn.Conv2d(channels, out, kernel, bias=False))
        return fill(head).state_dict()[f"{name}.weight"]

    return filled


@pytest.fixture(scope="session")
def taps(recordings: Any, network: ResNet38) -> Callable[[str, str], Taps]:
    """Features of a recorded image, computed once."""
    done: dict[tuple[str, str], Taps] = {}

    def features(file: str, key: str) -> Taps:
        if (file, key) not in done:
            with torch.no_grad():
                done[file, key] = network(recordings(file)[key])
        return done[file, key]

    return features


def relative(recorded: Tensor, share: float = 2e-5) -> float:
    """Tolerance for activations and their gradients, which reach several hundred."""
    return share * recorded.abs().max().item()


# --- names and groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", SETTINGS["resnet38"]["heads_from_scratch"])
def test_names_shapes_and_order_of_the_body(names: Any, network: str) -> None:
    with torch.device("meta"):
        ours = body(names, network)
    parameters = dict(ours.named_parameters())
    listed = [
        {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "kind": "parameter" if name in parameters else "buffer",
        }
        for name, tensor in ours.state_dict().items()
    ]
    assert listed == list(names[network].values())[: len(listed)]


@pytest.mark.parametrize("network", SETTINGS["ppc_seam"]["networks"].values())
def test_names_shapes_and_order_of_the_seam_head(names: Any, network: str) -> None:
    with torch.device("meta"):
        ours = body(names, network)
        entries = head_entries(names, network, ours)
        head = seam_head(names, network, ours)
    assert [(name, list(t.shape)) for name, t in head.state_dict().items()] == [
        (e["name"], e["shape"]) for e in entries
    ]


def seam_head(names: Any, network: str, ours: ResNet38) -> SEAMHead:
    recorded = names[network]
    projection = recorded["fc_proj.weight"]["shape"][0] if "fc_proj.weight" in recorded else None
    return SEAMHead(ours.channels, recorded["fc8.weight"]["shape"][0] - 1, projection)


@pytest.mark.parametrize("network", SETTINGS["resnet38"]["heads_from_scratch"])
def test_optimiser_groups(names: Any, read_json: Any, network: str) -> None:
    recorded = read_json("param_groups")[network]
    with torch.device("meta"):
        ours = body(names, network)
        for entry in head_entries(names, network, ours):
            if entry["kind"] == "parameter":
                add_parameter(ours, entry["name"], torch.empty(entry["shape"]))
    # the heads' batch norms are frozen like the body's
    own = {id(p): name for name, p in ours.named_parameters()}
    learnt = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert learnt == recorded["requires_grad_in_train"]
    known = ResNet38(width=1).state_dict()
    children = [child for name, child in ours.named_children() if not any(key.startswith(f"{name}.") for key in known)]
    scratch = children if SETTINGS["resnet38"]["heads_from_scratch"][network] else []
    groups = parameter_groups(ours, 0.01, 5e-4, scratch)
    assert [[own[id(p)] for p in group["params"]] for group in groups] == recorded["groups"]


def add_parameter(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, nn.Parameter(tensor, requires_grad=tensor.ndim == 4))


def test_names_in_mxnet(read_json: Any, names: Any) -> None:
    with torch.device("meta"):
        ours = expected(body(names, "psa_resnet38_cls"))
    recorded = read_json("mxnet_key_map")
    kept = {row["mxnet"]: (row["torch"], row["shape"]) for row in recorded if row["torch"] is not None}
    assert kept == {mxnet_name(name): (name, list(tensor.shape)) for name, tensor in ours.items()}


def test_poly_schedule_and_groups(recordings: Any, match: Any) -> None:
    """With weight decay in the place of the momentum, as the original code passes it."""
    file, arrays, settings = (
        "resnet38/psa_functions",
        recordings("resnet38/psa_functions"),
        SETTINGS["resnet38"]["poly"],
    )
    decay, start = settings["weight_decay"], torch.tensor(settings["start"])
    network = nn.ModuleDict({"body": nn.Linear(1, len(start)), "head": nn.Linear(1, len(start))})
    groups = parameter_groups(network, settings["lr"], decay, [network["head"]])
    parameters = [p for group in groups for p in group["params"]]
    for p in parameters:
        p.data = start.clone().view_as(p)
    optimizer = SGD(groups, settings["lr"], momentum=decay)
    schedule = LambdaLR(optimizer, warmup_poly(settings["max_steps"], warmup_steps=0))
    rates, states = [], []
    for gradient in arrays["poly_grads"]:
        rates.append([group["lr"] for group in optimizer.param_groups])
        for p in parameters:
            p.grad = gradient.clone().view_as(p)
        optimizer.step()
        schedule.step()
        states.append(torch.stack([p.detach().flatten() for p in parameters]))
    match(file, "poly_lrs", torch.tensor(rates, dtype=torch.double), rtol=1e-10)
    match(file, "poly_params", torch.stack(states), atol=1e-6)
    used = torch.tensor([group["momentum"] for group in optimizer.param_groups], dtype=torch.double)
    match(file, "poly_sgd_momentum_actually_used", used, rtol=1e-10)


# --- PSA and KAIST ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stages(recordings: Any, network: ResNet38, taps: Any) -> dict[str, Tensor]:
    """Output of every block for x64, and the taps."""
    found: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [child.register_forward_hook(remember(name)) for name, child in network.named_children()]
    found |= taps("resnet38/resnet38_forward", "x64")._asdict()
    for hook in hooks:
        hook.remove()
    return found


def test_stages(recordings: Any, match: Any, stages: dict[str, Tensor]) -> None:
    file, arrays = "resnet38/resnet38_forward", recordings("resnet38/resnet38_forward")
    assert {f"stage_{name}" for name in stages} == {key for key in arrays if key.startswith("stage_")}
    for name, found in stages.items():
        recorded = arrays[f"stage_{name}"]
        corner = found if recorded.ndim == found.ndim else found[0]
        corner = corner[tuple(slice(size) for size in recorded.shape)]
        match(file, f"stage_{name}", corner, atol=relative(recorded))


@pytest.fixture(scope="session")
def statistics(recordings: Any, read_json: Any) -> dict[str, Any]:
    """stages.json, whose numbers are compared and counted like arrays; frozen parameters have NaN for a gradient."""
    content = read_json("stages")
    columns = {key: [stage[key] for stage in content["stages"]] for key in ("mean", "std", "absmax")}
    columns["cls_grad_norms"] = [torch.nan if norm is None else norm for norm in content["cls_grad_norms"].values()]
    recordings.files["resnet38/stages"] = {
        key: torch.tensor(column, dtype=torch.double) for key, column in columns.items()
    }
    return content


def test_statistics_of_the_stages(
    recordings: Any, match: Any, stages: dict[str, Tensor], statistics: dict[str, Any]
) -> None:
    listed = [(stage["stage"], stage["shape"]) for stage in statistics["stages"]]
    assert listed == [(name, list(t.shape)) for name, t in stages.items()]
    found = [stage.double() for stage in stages.values()]
    file, std = "resnet38/stages", recordings("resnet38/stages")["std"]
    match(file, "mean", torch.stack([stage.mean() for stage in found]), atol=2e-5 * std)
    match(file, "std", torch.stack([stage.std(correction=0) for stage in found]), rtol=2e-5)
    match(file, "absmax", torch.stack([stage.abs().max() for stage in found]), rtol=2e-5)


@pytest.mark.parametrize("suffix", ["", "_x128"])
def test_psa_classifier(recordings: Any, match: Any, taps: Any, weight: Any, suffix: str) -> None:
    file, arrays = "resnet38/resnet38_forward", recordings("resnet38/resnet38_forward")
    fc8 = weight("psa_resnet38_cls", "fc8")
    conv6 = taps(file, suffix.removeprefix("_") or "x64").conv6
    logits = F.conv2d(conv6.mean(dim=(2, 3), keepdim=True), fc8).flatten(1)
    cam = F.relu(F.conv2d(conv6, fc8))
    match(file, f"cls_logits{suffix}", logits, atol=relative(arrays[f"cls_logits{suffix}"]))
    match(file, f"cls_forward_cam{suffix}", cam, atol=relative(arrays[f"cls_forward_cam{suffix}"]))


def test_gradients_of_the_psa_classifier(
    recordings: Any, match: Any, network: ResNet38, weight: Any, statistics: dict[str, Any]
) -> None:
    """Below the last layers rounding decides the sign of some activations, and so whether a ReLU passes a gradient.

    Two ways to compute a convolution differ by 3e-4 to 4e-3 of the largest entry, depending on the weights.
    """
    file, arrays = "resnet38/resnet38_forward", recordings("resnet38/resnet38_forward")
    fc8 = weight("psa_resnet38_cls", "fc8").requires_grad_()
    logits = F.conv2d(network(arrays["x64"]).conv6.mean(dim=(2, 3), keepdim=True), fc8).flatten(1)
    loss = build("cls")(logits, arrays["cls_label"])
    match(file, "cls_loss", loss, rtol=1e-5)
    parameters = {**dict(network.named_parameters()), "fc8.weight": fc8}
    learnt = {name: p for name, p in parameters.items() if p.requires_grad}
    gradients = dict(zip(learnt, torch.autograd.grad(loss, list(learnt.values())), strict=True))
    recorded = arrays["cls_grad_fc8"]
    match(file, "cls_grad_fc8", gradients["fc8.weight"][:, : recorded.shape[1], 0, 0], atol=relative(recorded))
    recorded = arrays["cls_grad_b3_conv_branch2a"]
    corner = gradients["b3.conv_branch2a.weight"][: len(recorded), : recorded.shape[1]]
    match(file, "cls_grad_b3_conv_branch2a", corner, atol=relative(recorded, 8e-3))
    assert list(statistics["cls_grad_norms"]) == list(parameters)
    norms = [gradients[name].double().norm().item() if name in gradients else torch.nan for name in parameters]
    match("resnet38/stages", "cls_grad_norms", torch.tensor(norms, dtype=torch.double), rtol=1e-3)


def test_names_shapes_and_order_of_the_affinity_head(names: Any) -> None:
    with torch.device("meta"):
        ours = body(names, "psa_resnet38_aff")
        entries = head_entries(names, "psa_resnet38_aff", ours)
        head = AffinityHead(ours.channels)
    assert [(name, list(t.shape)) for name, t in head.state_dict().items()] == [
        (e["name"], e["shape"]) for e in entries
    ]


def test_affinity_of_psa(recordings: Any, match: Any, network: ResNet38, fill: Any, taps: Any) -> None:
    file, arrays, radius = "resnet38/resnet38_forward", recordings("resnet38/resnet38_forward"), 5
    head = fill(AffinityHead(network.channels))
    stages = taps(file, "x128")
    size = (stages.conv6.shape[-2], stages.conv6.shape[-1])
    with torch.no_grad():
        head.f9.weight.mul_(SETTINGS["resnet38"]["f9_factor"])
        features = head(stages, size)
    affinity = pair_affinity(features, radius)
    match(file, "aff_feature_x128", features[:, ::8], atol=relative(arrays["aff_feature_x128"]))
    match(file, "aff_sparse_x128", affinity, atol=relative(arrays["aff_sparse_x128"]))
    match(file, "aff_dense_x128", dense_affinity(affinity, size, radius)[0], atol=relative(arrays["aff_dense_x128"]))


def test_two_layer_head_of_kaist(recordings: Any, match: Any, taps: Any, weight: Any) -> None:
    file, arrays = "resnet38/resnet38_forward", recordings("resnet38/resnet38_forward")
    name = "kaist_aeft_net_gpp"
    features = F.relu(F.conv2d(taps(file, "x64").conv6, weight(name, "fc8")))
    cam = F.conv2d(features, weight(name, "fc9"))
    step = features.shape[1] // arrays["kaist_feat256"].shape[1]
    ours = {"kaist_feat256": features[:, ::step], "kaist_cam": cam, "kaist_gap_logits": cam.mean(dim=(2, 3))}
    for key, value in ours.items():
        match(file, key, value, atol=relative(arrays[key]))


# --- SEAM and PPC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SETTINGS["ppc_seam"]["networks"])
def test_seam_head(
    recordings: Any, match: Any, names: Any, network: ResNet38, fill: Any, taps: Any, method: str
) -> None:
    file, arrays = "ppc_seam/networks", recordings("ppc_seam/networks")
    image = arrays["x64"]
    head = fill(seam_head(names, SETTINGS["ppc_seam"]["networks"][method], network))
    with torch.no_grad():
        output = head(image, taps(file, "x64"))
    ours = {"cam": at_image_size(output.cam, image), "cam_rv": at_image_size(output.revised_cam, image)}
    for key, value in ours.items():
        step = value.shape[-1] // arrays[f"{method}_{key}"].shape[-1]
        ours[key] = value[..., ::step, ::step]
    if method == "seam":
        ours["cam_low"] = output.cam
    else:
        ours |= {"f_proj": output.projection, "cam_rv_down": output.revised_cam}
    for key, value in ours.items():
        recorded = arrays[f"{method}_{key}"]
        match(file, f"{method}_{key}", value, atol=relative(recorded, 1e-5))


def at_image_size(maps: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(maps, size=image.shape[-2:], mode="bilinear", align_corners=True)


def test_pixel_correlation(recordings: Any, match: Any) -> None:
    file, arrays = "ppc_seam/networks", recordings("ppc_seam/networks")
    revised = propagate(arrays["pcm_cam"], F.conv2d(arrays["pcm_f"], arrays["pcm_f9_weight"]))
    match(file, "pcm_out", revised, atol=relative(arrays["pcm_out"], 1e-5))
