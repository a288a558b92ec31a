"""Sweeps: their jobs and names, what is left of them, what fails, how they go on, and who starts them."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from scipy.stats import ttest_rel
from tiny import OVERRIDES, Ended

from wsss import InputError
from wsss.config import config_dir, job_name, job_parts
from wsss.evaluation.comparison import bootstrap_pairs, read_counts
from wsss.report.sweep import read_sweep
from wsss.runs import begin_sweep

Command = Callable[..., Ended]
ROOT = Path(__file__).parent.parent
SHORT = [*OVERRIDES, "experiment=ablation_toco", "seed=1,2", "method.losses={},{ptc:null}"]
JOBS = ["seed=1", "seed=2", "ptc=null,seed=1", "ptc=null,seed=2"]
EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))


@pytest.fixture
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a process of its own, and test_report_of_a_sweep makes one."""
    monkeypatch.setattr("wsss.report.afterwards.write_report", lambda *_: None)


def figures(run: Path) -> dict[str, Any]:
    kept = ("val/miou", "val/map", "val/cam_miou", "steps")
    values = json.loads((run / "metrics.json").read_text())
    return {key: values[key] for key in kept}


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "summary.csv").open(newline="", encoding="utf-8") as file:
        return {(row["figure"], row["variant"]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two variants and two seeds."""
    from tiny import call

    out = tmp_path_factory.mktemp("sweep") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wsss.report.afterwards.write_report", lambda *_: None)
        assert call("train", "-m", *SHORT, f"hydra.sweep.dir={out}") == 0
    return out


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["seed=1", "method.losses={}"], "seed=1"),
        (["method.losses={ptc:null,seg:{weight:0.5}}", "seed=2"], "ptc=null,seg.weight=0.5,seed=2"),
        (["method.losses.ptc.weight=0", "method.losses.ctc.weight=1"], "ptc.weight=0,ctc.weight=1"),
        (["method.lr=1", "+transform.lr=2"], "method.lr=1,transform.lr=2"),
        (["refine=par", "trainer.benchmark=true", "monitor=null"], "refine=par,benchmark=true,monitor=null"),
        (["method.cam_scales=[1.0,0.5]"], "cam_scales=_1.0,0.5_-61d2cb6a"),
        (["checkpoint='a/seed=3/checkpoints/last.ckpt'"], "checkpoint=seed=3-0c7ca34a"),
        (["dataset.root='/data/Füße'"], "root=F__e-cc1e8d7c"),
    ],
)
def test_names_of_jobs(overrides: list[str], name: str) -> None:
    swept = [override.partition("=")[0].lstrip("+") for override in overrides]
    found = job_name([*overrides, "dataset.size=32"], swept)
    plain, mark, _ = name.partition("-")
    assert found.startswith(plain + mark)
    assert len(found) == len(name)
    assert "/" not in found


def test_names_differ() -> None:
    """What is cut or replaced makes no two jobs one."""
    keys = ["checkpoint", "seed"]
    given = [["checkpoint=a/x/checkpoints/last.ckpt"], ["checkpoint=b/x/checkpoints/last.ckpt"], ["seed=" + "1" * 300]]
    assert len({job_name(one, keys) for one in given}) == 3
    assert max(len(job_name(one, keys)) for one in given) < 200
    assert job_name(["seed=1"], []) == ""
    assert job_parts(["seed=1", "method.lr=1"], ["seed"]) == {"seed": "seed=1"}


def test_what_a_sweep_leaves(swept: Path) -> None:
    """Means, deviations, and the differences in pairs of one seed, against other means of computing them."""
    record = json.loads((swept / "sweep.json").read_text())
    assert list(record["jobs"]) == JOBS
    assert record["swept"] == ["method.losses", "seed"]
    rows = rows_of(swept)
    assert [variant for figure, variant in rows if figure == "val/miou"] == ["as configured", "ptc=null"]
    for figure in ("val/miou", "val/map", "val/aux_cam_miou"):
        values = np.array([json.loads((swept / job / "metrics.json").read_text())[figure] for job in JOBS])
        first, second = values.reshape(2, 2)
        row = {key: float(value) for key, value in rows[figure, "ptc=null"].items() if key[0] in "mdps" and value}
        assert row["mean"] == pytest.approx(second.mean())
        assert row["deviation"] == pytest.approx(second.std(ddof=1))
        assert (row["difference"], row["pairs"]) == (pytest.approx((second - first).mean()), 2)
        if figure != "val/map" and (first != second).any():
            interval = ttest_rel(second, first).confidence_interval(0.95)
            assert (row["seeds_low"], row["seeds_high"]) == pytest.approx((interval.low, interval.high))
    counts = [read_counts(swept / job / "per_image.csv", "miou") for job in JOBS]
    found = bootstrap_pairs([(counts[0], counts[2]), (counts[1], counts[3])])
    row = rows["val/miou", "ptc=null"]
    assert [float(row[key]) for key in ("difference", "images_low", "images_high")] == pytest.approx(
        tuple(found), abs=1e-6
    )
    assert rows["val/cam_miou", "ptc=null"]["images_low"]  # of CAMs too
    assert not rows["val/map", "ptc=null"]["images_low"]
    summary = json.loads((swept / "summary.json").read_text())
    assert (summary["baseline"], summary["missing"]) == ("as configured", [])
    assert [job["state"] for job in summary["jobs"]] == ["finished"] * 4


def test_the_figures_do_not_depend_on_the_counts(swept: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("train", *OVERRIDES, "seed=1", f"hydra.run.dir={out}").code == 0
    assert not (out / "per_image.csv").exists()
    assert figures(out) == figures(swept / "seed=1")


@pytest.mark.usefixtures("_no_report")
def test_failed_jobs_stop_no_others(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's mistake, and an error of ours, which is shown."""
    from wsss.methods.toco import ToCo

    proper = ToCo.training_step

    def failing(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.hparams.lr == 0.5:
            raise ZeroDivisionError("of a kind that nobody expects")
        return proper(self, batch, batch_idx)

    monkeypatch.setattr(ToCo, "training_step", failing)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["-m", *OVERRIDES, "method.lr=0.1,0.5", "method.local_crop_size=8,200"]
    ended = command("train", *arguments)
    assert ended.code == 2
    assert "local_crop_size is 200" in ended.err
    assert "Traceback" in ended.err
    assert "missing: local_crop_size=8,lr=0.5: failed, ZeroDivisionError: of a kind that nobody expects" in ended.out
    (folder,) = Path("multirun").iterdir()
    assert (folder / "local_crop_size=8,lr=0.1/metrics.json").exists()
    assert json.loads((folder / "local_crop_size=8,lr=0.5/failure.json").read_text())["code"] == 1
    jobs = read_sweep(folder).jobs
    assert [job.state for job in jobs] == ["finished", "failed", "failed", "failed"]
    monkeypatch.setattr(ToCo, "training_step", proper)
    ended = command("train", *arguments, "resume=auto")
    assert "going on with multirun" in ended.out
    assert "nothing to do" in ended.out
    assert not (folder / "local_crop_size=8,lr=0.5/failure.json").exists()
    assert (folder / "local_crop_size=8,lr=0.5/metrics.json").exists()


@pytest.mark.usefixtures("_no_report")
def test_a_sweep_goes_on_where_it_was(
    swept: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished jobs are left, the others come to what they would have been; more seeds are added to a given place."""
    from wsss.methods.toco import ToCo

    proper, steps = ToCo.training_step, iter(range(100))

    def failing(self: Any, batch: Any, batch_idx: int) -> Any:
        if next(steps) == 5:  # of 2 each: in the third job
            raise KeyboardInterrupt
        return proper(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ToCo, "training_step", failing)
        ended = command("train", "-m", *SHORT)
    assert ended.code == 130
    assert "the same command with resume=auto goes on with it" in ended.err
    (folder,) = Path("multirun").iterdir()
    states = [job.state for job in read_sweep(folder).jobs]
    assert states == ["finished", "finished", "unfinished", "not run"]
    before = (folder / "seed=1/metrics.json").stat().st_mtime_ns
    assert command("train", "-m", *SHORT, "resume=auto", "data.num_workers=0").code == 0
    assert list(Path("multirun").iterdir()) == [folder]
    assert (folder / "seed=1/metrics.json").stat().st_mtime_ns == before
    assert [figures(folder / job) for job in JOBS] == [figures(swept / job) for job in JOBS]
    again = command("train", "-m", *SHORT[:-2], "seed=1,3", SHORT[-1], "resume=auto", f"hydra.sweep.dir={folder}")
    assert again.code == 0
    assert again.out.count("nothing to do") == 2
    assert {row["jobs"] for row in rows_of(folder).values()} == {"3"}
    new = command("train", "-m", *OVERRIDES, "seed=1,2", "resume=auto")
    assert "no such sweep in multirun" in new.out


def test_sweeps_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    """A job's name leaves out what its own sweep does not vary: in one directory such names would stand for others."""
    begin_sweep(tmp_path, ["seed"], {"seed=1": ["worse.kept=1", "seed=1"]}, search=False)
    losses = {"seed=1": ["worse.kept=1", "method.losses={}", "seed=1"]}
    losses |= {"ptc=null,seed=1": ["worse.kept=1", "method.losses={ptc:null}", "seed=1"]}
    begin_sweep(tmp_path, ["method.losses", "seed"], losses, search=False)
    before = (tmp_path / "sweep.json").read_text()
    assert list(json.loads(before)["jobs"]) == ["seed=1", "ptc=null,seed=1"]
    for name, overrides, said in (
        ("seed=1", ["worse.kept=1", "method.losses={ctc:null}", "seed=1"], "method.losses"),
        ("seed=9", ["worse.kept=0.5", "seed=9"], "worse.kept"),
    ):
        with pytest.raises(InputError, match=rf"other settings \({said}\) in its job"):
            begin_sweep(tmp_path, ["seed"], {name: overrides}, search=False)
    assert (tmp_path / "sweep.json").read_text() == before
    begin_sweep(tmp_path, ["seed"], {"seed=9": ["worse.kept=1", "data.num_workers=0", "seed=9"]}, search=False)


@pytest.mark.usefixtures("_no_report")
def test_no_refusal_becomes_a_warning(command: Command, tmp_path: Path) -> None:
    """Which Hydra makes of exceptions before and after a sweep."""
    (tmp_path / "seed=3").mkdir()
    (tmp_path / "seed=3/metrics.json").write_text("{")
    (tmp_path / "sweep.json").write_text('{"swept": ["seed"], "jobs": {"seed=3": ["worse.kept=2", "seed=3"]}}')
    for share, said in (("1", "other settings (worse.kept) in its job seed=3"), ("2", "metrics.json is damaged")):
        ended = command("train", "-m", f"worse.kept={share}", "seed=1,2", f"hydra.sweep.dir={tmp_path}")
        assert ended.code == 2
        assert said in ended.err.splitlines()[-1]
        assert "Warning" not in ended.err
        assert (tmp_path / "seed=1/failure.json").exists() is (share == "2")


def test_a_summary_needs_no_report(
    swept: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made where the packages of one are not installed, and where no job has begun."""
    monkeypatch.setattr("wsss.commands.report.find_spec", lambda _: None)
    (tmp_path / "sweep.json").write_text((swept / "sweep.json").read_text())
    ended = command("report", str(tmp_path))
    assert (ended.code, "a report needs" in ended.err) == (2, True)
    assert ended.out.count("not run") >= len(JOBS)
    assert len(json.loads((tmp_path / "summary.json").read_text())["missing"]) == len(JOBS) + 1


def test_what_is_missing_is_said(swept: Path, tmp_path: Path) -> None:
    """Of a sweep whose first variant has nothing, there are no differences."""
    folder = tmp_path / "sweep"
    (folder / "ptc=null,seed=1").mkdir(parents=True)
    (folder / "sweep.json").write_text((swept / "sweep.json").read_text())
    (folder / "ptc=null,seed=1/metrics.json").write_text('{"val/miou": 0.5, "val/map": null}')
    sweep = read_sweep(folder)
    assert sweep.missing == [
        *(f"{job}: not run" for job in JOBS if job != "ptc=null,seed=1"),
        "nothing of as configured, so that there are no differences from it",
    ]
    assert [(row.figure, row.mean, row.count, row.pairs) for row in sweep.rows] == [("val/miou", 0.5, 1, 0)]


@pytest.mark.slow
def test_report_of_a_sweep(swept: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made again by hand: table, figure and page."""
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    monkeypatch.setenv("COLUMNS", "200")
    folder = Path(shutil.copytree(swept, tmp_path / "sweep"))
    (folder / "summary.csv").unlink()
    (folder / "seed=2/metrics.json").unlink()
    ended = command("report", str(folder), "examples=0")
    assert ended.code == 0, ended.err
    assert "missing: seed=2: unfinished" in ended.out
    assert "95 % over images" in ended.out
    assert rows_of(folder)["val/miou", "as configured"]["jobs"] == "1"
    assert (folder / "summary.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / "report.html").read_text()
    assert "Variants of the sweep" in page
    assert "Missing is seed=2: unfinished" in page
    assert "toco, ptc=null, seed=1" in page


@pytest.mark.usefixtures("_no_report")
def test_refinements_of_two_checkpoints(swept: Path, command: Command) -> None:
    """Trainings that differ in their seeds alone are repetitions; those that differ in more are variants."""
    several = ",".join(str(swept / job / "checkpoints/last.ckpt") for job in ("seed=1", "seed=2"))
    given = [f"checkpoint={several}", "experiment=refinement", "split=val", "num_workers=0", "refine=none,par"]
    ended = command("label", "-m", *given)
    assert ended.code == 0, ended.err
    (folder,) = Path("multirun").iterdir()
    rows = rows_of(folder)
    assert {variant for _, variant in rows} == {"refine=none", "refine=par"}
    assert {row["jobs"] for row in rows.values()} == {"2"}
    assert {row["pairs"] for (_, variant), row in rows.items() if variant == "refine=par"} == {"2"}
    assert any(figure.endswith("mask_miou") for figure, _ in rows)
    several = ",".join(str(swept / job / "checkpoints/last.ckpt") for job in ("seed=1", "ptc=null,seed=1"))
    quiet = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "data.num_workers=0"]
    ended = command("eval", "-m", f"checkpoint={several}", "protocol.flip=none,sum", "protocol=single_scale", *quiet)
    assert ended.code == 0, ended.err
    folder = max(Path("multirun").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(list(folder.glob("*/metrics.json"))) == 4
    assert len({variant for _, variant in rows_of(folder)}) == 4


@pytest.mark.usefixtures("_no_report")
def test_masks_elsewhere(swept: Path, command: Command) -> None:
    """Jobs of wsss-label whose `out` is none of the sweep's directories."""
    given = [f"checkpoint={swept / 'seed=1/checkpoints/last.ckpt'}", "split=val,train", "num_workers=0"]
    ended = command("label", "-m", *given, "out=masks/${split}")
    assert ended.code == 0, ended.err
    (folder,) = Path("multirun").iterdir()
    assert not list(folder.glob("*/manifest.json"))
    sweep = read_sweep(folder)
    assert sweep.missing == []
    assert [set(job.figures) & {"val/mask_miou", "train/mask_miou"} for job in sweep.jobs] == [
        {"val/mask_miou"},
        {"train/mask_miou"},
    ]


@pytest.mark.usefixtures("_no_report")
def test_worse_labels(command: Command) -> None:
    """A share of zero is the sweep's first variant and the run that has no such setting; others are other data."""
    worse = ["-m", *OVERRIDES, "experiment=label_noise", "worse.wrong=0,0.9", "seed=1,2"]
    ended = command("train", *worse)
    assert ended.code == 0, ended.err
    (folder,) = Path("multirun").iterdir()
    assert command("train", *OVERRIDES, "seed=1", "hydra.run.dir=plain").code == 0
    assert figures(Path("plain")) == figures(folder / "wrong=0,seed=1")
    prints = {json.loads(path.read_text())["fingerprint"] for path in folder.glob("*/run.json")}
    assert len(prints) == 3  # what is wrong is drawn anew with each seed
    assert [row["jobs"] for row in rows_of(folder).values()] == ["2"] * len(rows_of(folder))
    assert command("train", *OVERRIDES, "worse.missing=1.0", "hydra.run.dir=none").code == 0
    refused = command("train", *OVERRIDES, "worse.kept=2", "hydra.run.dir=refused")
    assert (refused.code, "worse.kept is 2" in refused.err) == (2, True)


def jobs_of(experiment: str) -> Iterator[list[str]]:
    """The overrides of each variant of an experiment, with the first seed."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    content = yaml.safe_load((config_dir() / f"experiment/{experiment}.yaml").read_text())
    params = content["hydra"]["sweeper"]["params"]
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    for batch in BasicSweeper.split_arguments(parsed, None):
        yield from (job for job in batch if "seed=1" in job or "seed" not in params)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments(experiment: str) -> None:
    """Every variant composes, is named, and builds its method, whose losses are those that are not left out."""
    from wsss.assemble import build_method
    from wsss.data.datamodule import DataModule
    from wsss.data.shapes import Shapes

    config = "label" if experiment == "refinement" else "train"
    data = DataModule(None, Shapes("val", val_size=1))
    names = set()
    for overrides in jobs_of(experiment):
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = hydra.compose(config, overrides=[f"experiment={experiment}", *overrides])
        names.add(job_name(overrides, [override.partition("=")[0] for override in overrides]))
        if config == "train":
            method = build_method(cfg, data)
            kept = {key for key, settings in cfg.method.losses.items() if settings is not None}
            assert set(method.losses) == kept
    GlobalHydra.instance().clear()
    assert len(names) == len(list(jobs_of(experiment))) > 1


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.startswith("ablation_")])
@pytest.mark.usefixtures("_no_report")
def test_ablations_train(experiment: str, command: Command) -> None:
    """Two steps of every variant on the small networks of the recipes for shapes, all losses taking part."""
    few = ["dataset.train_size=8", "dataset.val_size=2", "data.batch_size=2", "data.eval_batch_size=2", "seed=1"]
    few += ["data.num_workers=0", "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    at_once = {"toco": ["method.phases=[]"], "cosa": ["method.loss_warmup_steps=-1"], "rcm_mam": ["method.rcm_start=0"]}
    ended = command("train", "-m", f"experiment={experiment}", *few, *at_once.get(experiment[9:], []))
    assert ended.code == 0, ended.err
    (folder,) = Path("multirun").iterdir()
    assert read_sweep(folder).missing == []


LAUNCHERS = {
    "joblib": ("hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_submitit_launcher", ["hydra.launcher.timeout_min=5"]),
    "ray": (
        "hydra_ray_launcher",
        ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.log_to_driver=false"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher: str, swept: Path, tmp_path: Path) -> None:
    """Jobs in processes of their own: the same figures, and a failure that is said and counted."""
    package, settings = LAUNCHERS[launcher]
    if (
        importlib.util.find_spec("hydra_plugins") is None
        or importlib.util.find_spec(f"hydra_plugins.{package}") is None
    ):
        pytest.skip(f"hydra/launcher={launcher} is not installed: pip install {package.replace('_', '-')}")
    start = [sys.executable, "-c", "from wsss.commands.train import main; main()", "-m"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = [*SHORT[:-2], "seed=1", "method.losses={},{ptc:null}", "method.local_crop_size=8,200"]
    ended = subprocess.run(
        [*start, *given, f"hydra/launcher={launcher}", *settings, "hydra.sweep.dir=sweep"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stdout[-2000:] + ended.stderr[-3000:]
    sweep = read_sweep(tmp_path / "sweep")
    assert [job.state for job in sweep.jobs] == ["finished", "failed"] * 2
    assert ended.stdout.count("missing: ") == 2
    assert all("local_crop_size is 200" in job.said for job in sweep.jobs if job.state == "failed")
    for name, same in (("seed=1", "local_crop_size=8"), ("ptc=null,seed=1", "ptc=null,local_crop_size=8")):
        assert figures(swept / name) == figures(tmp_path / "sweep" / same)


def test_directories_of_ones_own(command: Command) -> None:
    ended = command("train", "-m", *OVERRIDES, "seed=1,2", "hydra.sweep.subdir=${hydra:job.num}")
    assert ended.code == 2
    assert "hydra.sweep.subdir=${hydra:job.num}: a sweep's table finds its jobs by the directories" in ended.err
    assert not Path("multirun").exists()
