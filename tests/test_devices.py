"""Training on two devices, which are two processes on this CPU."""

import subprocess
from pathlib import Path

import pytest
import torch
from kill import settings
from tiny import COSA_OVERRIDES, WECLIP_OVERRIDES, WECLIP_PLUS_OVERRIDES, call


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mctformer", "weaktr"])
def test_two_devices_are_two_batches_a_step(tmp_path: Path, method: str) -> None:
    """The same images make a step on two devices and, batch by batch, on one: so do the same weights come out."""
    # its losses are means over images
    arguments = [*settings(method, steps=6, workers=0), "global_batch_size=4", "per_image=true"]
    two = ["trainer.devices=2", "trainer.strategy=ddp", f"hydra.run.dir={tmp_path / 'two'}"]
    done = subprocess.run(["wsss-train", *arguments, *two], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{method} (") == 1  # one process speaks
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'one'}") == 0
    one, both = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == both.keys()
    for key, value in one.items():
        torch.testing.assert_close(both[key], value, atol=2e-6, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    counts = [(tmp_path / run / "per_image.csv").read_text().splitlines() for run in ("one", "two")]
    assert counts[0][0] == counts[1][0]
    counted = [sorted(line.split(",")[:3] for line in lines[1:]) for lines in counts]
    assert counted[0] == counted[1]
    assert not list((tmp_path / "two").glob("per_image.*.csv"))


EARLY = "method.warmup_weights={seg: null, swap_cam: null, dense_energy: null}"
ON_TWO = {
    "decoder that no loss reaches at first": ["method=cosa", *COSA_OVERRIDES, EARLY],  # has no gradient to share
    "thresholds of all values": ["method=cosa", *COSA_OVERRIDES, "method.dynamic_thresholds={batches: 2}"],
    "frozen tower": ["method=weclip", *WECLIP_OVERRIDES],
    "two frozen towers": ["method=weclip", *WECLIP_PLUS_OVERRIDES],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_TWO)
def test_two_devices_train(tmp_path: Path, case: str) -> None:
    two = ["trainer.devices=2", "trainer.strategy=ddp", f"hydra.run.dir={tmp_path}"]
    arguments = [*ON_TWO[case], "trainer.max_steps=2", *two]
    done = subprocess.run(["wsss-train", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    for values in checkpoint.get("cam_values", {}).values():  # of one step of labels, the second
        assert len(values) == 1
        assert len(values[0]) > 0


def test_global_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = settings("cam", steps=3, workers=0)
    assert call("train", *arguments, "global_batch_size=6", f"hydra.run.dir={tmp_path / 'a'}") == 0
    assert "takes 3 batches of 2 on 1 device: the recipe's 6 images" in capsys.readouterr().out
    state = torch.load(tmp_path / "a/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 9
    for wrong in (["global_batch_size=3"], ["global_batch_size=4", "trainer.accumulate_grad_batches=1"]):
        assert call("train", *arguments, *wrong, f"hydra.run.dir={tmp_path / 'b'}") == 2
        assert "does not make the recipe's global_batch_size" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
