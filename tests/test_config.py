"""Configuration: files and signatures say the same, recipes hold no typo, the command line is arranged right."""

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from wsss.commandline import order_arguments
from wsss.config import config_dir, given_values, quote
from wsss.evaluation.protocol import Protocol

CONF = config_dir()
GIVEN_BY_THE_COMMAND = {
    "method": {"num_classes", "classes"},
    "dataset": {"split"},
    "refine": {"self", "image", "cam", "instances"},
}
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.mark.parametrize(
    "path",
    sorted(path for group in ("method", "dataset", "transform", "refine") for path in CONF.glob(f"{group}/*.yaml")),
    ids=str,
)
def test_file_and_signature_agree(path: Any) -> None:
    group = path.parent.name
    node: Any = OmegaConf.load(path)
    parameters = inspect.signature(hydra.utils.get_object(node._target_)).parameters
    names = set(parameters) - GIVEN_BY_THE_COMMAND.get(group, set())
    # of refine=walk and irn_walk the command loads the network, whose method is the target
    assert set(node) - {"_target_", *(("affinity",) if path.stem.endswith("walk") else ())} == names
    versions = [p for p in path.parent.glob("*.yaml") if f"_target_: {node._target_}\n" in p.read_text()]
    # a second version of the same class differs in its values
    assert min((differences(p, parameters, names) for p in versions), key=len) == {}


def differences(path: Any, parameters: Any, names: set[str]) -> dict[str, Any]:
    """Values of a file that are not the defaults of a signature."""
    plain: Any = OmegaConf.to_container(OmegaConf.load(path))
    # a dict's default is what the parts of the class default to; test_toco compares them
    defaults = {name: parameters[name].default for name in names if "${" not in str(plain[name])}
    known = {name: value for name, value in defaults.items() if value not in (None, inspect.Parameter.empty)}
    return {k: plain[k] for k, v in known.items() if (list(v) if isinstance(v, tuple) else v) != plain[k]}


@pytest.mark.parametrize("path", sorted(CONF.glob("protocol/*.yaml")), ids=str)
def test_protocols_name_all_there_is(path: Any) -> None:
    assert set(OmegaConf.load(path)) == set(inspect.signature(Protocol).parameters)  # type: ignore[call-overload]


def leaves(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_names_only_keys_that_exist(recipe: str) -> None:
    method, dataset = recipe.rsplit("_", 1)
    if not (CONF / "dataset" / f"{dataset}.yaml").exists():
        pytest.skip(f"dataset={dataset} does not exist yet")
    bare = compose("train", overrides=[f"method={method}", f"dataset={dataset}", "~recipe"])
    full = compose("train", overrides=[f"method={method}", f"dataset={dataset}"])
    assert set(leaves(OmegaConf.to_container(full))) == set(leaves(OmegaConf.to_container(bare)))


def test_the_paper_recipe_is_the_paper() -> None:
    cfg = compose("train", overrides=["dataset=voc"])
    assert cfg.method.released_behaviour
    assert cfg.transform.released_behaviour
    assert (cfg.method.weights, cfg.transform.crop_size, cfg.protocol.size) == ("orig_in21k_ft_in1k", 448, 448)
    assert (cfg.trainer.max_steps, cfg.data.batch_size, cfg.method.lr) == (20000, 2, 6e-5)


@pytest.mark.parametrize(
    "value",
    ["a b", "x=1", "(1)", "{a}", "~/x", "grüße", "it's", 'say "hi"', "a,b", "2007_000032", "back\\slash", "end\\"],
)
def test_paths_reach_hydra_as_they_are(value: str) -> None:
    (override,) = order_arguments([f"dataset.root={value}"])
    assert OverridesParser.create().parse_override(override).value() == value
    assert given_values([override], "dataset.root") == [value]


def test_sweeps_over_paths_stay_sweeps() -> None:
    arguments = order_arguments(["dataset.root=/a b,/c=d", "-m"])
    assert arguments[0] == "-m"
    assert given_values(arguments, "dataset.root") == ["/a b", "/c=d"]


def test_existing_paths_are_not_split_at_their_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "a", "c", "d,e,f"):
        (tmp_path / name).mkdir()
    for given, expected in (
        (f"{tmp_path}/a,b", [f"{tmp_path}/a,b"]),
        ("a,b,c", ["a,b", "c"]),
        ("c,a,b,new,d,e,f,d,e", ["c", "a,b", "new", "d,e,f", "d", "e"]),
        ("x,y", ["x", "y"]),
    ):
        arguments = order_arguments(["-m", f"dataset.root={given}"])
        assert given_values(arguments, "dataset.root") == expected
    (one,) = order_arguments(["hydra.sweep.dir=x,y", "-m"])[1:]  # of which there is one
    assert given_values([one], "hydra.sweep.dir") == ["x,y"]


def test_options_come_first() -> None:
    given = ["method=toco", "--config-dir", "conf", "seed=1", "-m"]
    assert order_arguments(["recipe=null"]) == ["~recipe"]
    assert order_arguments(given) == ["--config-dir", "conf", "-m", "method=toco", "seed=1"]


@pytest.mark.parametrize(
    "value",
    [None, True, False, 1, 1.0, 1e-7, "true", "x: y", [], {}, [1.0, 0.5], {"a": [1, {"b": None}], "c": 1.0}],
)
def test_plain_values_survive_hydra(value: Any) -> None:
    parsed = OverridesParser.create().parse_override(f"key={quote(value)}").value()
    plain = OmegaConf.to_container(OmegaConf.create({"key": parsed}))
    assert plain == {"key": value}
    assert type(plain["key"]) is type(value)  # type: ignore[index]


@pytest.mark.parametrize(
    ("method", "dataset", "own"),
    [
        ("toco", "voc", "toco_voc"),
        ("toco", "coco", "toco_coco"),
        ("segmentation", "voc", "large_fov"),
        ("segmentation", "coco", "large_fov"),
        ("cosa", "voc", "cosa"),
        ("cosa", "coco", "cosa"),
        ("cam", "voc", None),
    ],
)
def test_the_papers_protocol_is_each_methods_own(method: str, dataset: str, own: str | None) -> None:
    """protocol=paper is what conf/protocol has for the method, else one scale; the masks choose the threshold."""
    names = [f"method={method}", f"dataset={dataset}"]
    paper = OmegaConf.to_container(compose("eval", overrides=[*names, "protocol=paper"]).protocol)
    expected: Any = OmegaConf.to_container(compose("eval", overrides=[*names, f"protocol={own or 'paper'}"]).protocol)
    assert paper == expected | {"threshold": "best"}
    assert Protocol(**paper).rules(0.4) == ("best", "fixed", "otsu")


def test_neither_masks_nor_true_labels_help_where_no_protocol_is_named() -> None:
    """Of wsss-eval, and of the stage evaluate of every pipeline."""
    honest = OmegaConf.load(CONF / "protocol/honest.yaml")
    assert compose("eval").protocol == honest
    measured = 0
    for pipeline, dataset in itertools.product(sorted((CONF / "pipeline").glob("*.yaml")), ("shapes", "voc", "coco")):
        stage = compose("run", overrides=[f"pipeline={pipeline.stem}", f"dataset={dataset}"]).pipeline.stages.get(
            "evaluate"
        )
        if stage is not None:
            own = [o for o in stage.overrides if "{" not in o]
            protocol = compose("eval", overrides=["method=segmentation", f"dataset={dataset}", *own]).protocol
            assert (protocol.image_labels, protocol.threshold, protocol.crf) == ("predicted", "fixed", None)
            assert protocol.extras.crf is not None  # in the same pass
            assert dataset == "shapes" or protocol == honest
            measured += 1
    assert measured >= 18
