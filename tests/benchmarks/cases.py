"""What benchmarks share: methods as their files configure them, and batches of random numbers."""

from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from wsss.config import class_named, config_dir
from wsss.methods.stage import Stage


def method_of(name: str, num_classes: int = 20, **arguments: Any) -> Any:
    """The method of conf/method/NAME.yaml with random weights, ready for steps without a trainer."""
    values: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "method" / f"{name}.yaml"))
    method = class_named(values.pop("_target_"))(num_classes=num_classes, **(values | arguments))
    Stage.total_steps = 100  # type: ignore[method-assign,assignment]  # a trainer would know
    method.log = method.log_dict = lambda *given, **named: None
    return method


def optimizer_of(method: Any) -> torch.optim.Optimizer:
    configured = method.configure_optimizers()
    return configured["optimizer"] if isinstance(configured, dict) else configured


def labels(count: int, num_classes: int = 20) -> Tensor:
    """(B, C) of three classes each, or of all."""
    label = torch.zeros(count, num_classes)
    return label.scatter_(1, torch.rand(count, num_classes).topk(min(3, num_classes)).indices, 1)


def training_batch(method: Any, count: int, side: int) -> dict[str, Any]:
    """The views that `method` trains on, of random numbers, `side` pixels wide."""
    square = (count, 3, side, side)
    # pixels of pseudo masks hang together, as those of images do
    ids = torch.randint(0, method.num_classes + 1, (count, 8, 8)).repeat_interleave(-(-side // 8), 1)
    mask = ids.repeat_interleave(-(-side // 8), 2)[:, :side, :side]
    cells = mask[:, ::8, ::8][:, : -(-side // 8), : -(-side // 8)]
    batch: dict[str, Any] = {
        "image": torch.randn(square),
        "label": labels(count, method.num_classes),
        "global_view": torch.randn(square),
        "local_source": torch.randn(square),
        "strong_view": torch.randn(square),
        "image_box": torch.tensor([[0, side, 0, side]]).expand(count, -1),
        "max_labels": min(3, method.num_classes),  # of an image, as the host counts them
        "pseudo_mask": mask,
        "affinity_label": cells,
    }
    return {name: view for name, view in batch.items() if name in ("label", "max_labels", *method.views)}


def on_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {key: view.to(device) if isinstance(view, Tensor) else view for key, view in batch.items()}
