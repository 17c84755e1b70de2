"""Settings: what composes, what makes a run the run it is, what is refused and in which words."""

import copy
import functools
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import nn

import gnbench
from gnbench import ConfigError, check
from gnbench.build import build_model
from gnbench.check import compose, composed
from gnbench.config import RunConfig, conf_dir
from gnbench.identity import identity, run_id
from gnbench.norms import ReferenceGroupNorm
from tests import pictures

ROOT = Path(__file__).parents[1]
GROUPS = ("model", "norm", "dataset", "optimizer", "schedule", "batch", "experiment")
FILES = sorted(p.relative_to(conf_dir()) for p in conf_dir().rglob("*.yaml"))
IDS = dict(
    line.rsplit(" ", 1) for line in (ROOT / "tests" / "ids.txt").read_text().splitlines()
)  # of runs that people have: a change of one orphans its run


@functools.cache
def chosen(*choice):
    return composed(*choice)


def parsed(*overrides):
    """Return a run without asking whether it can be trained. Hydra, which is slow, composes each
    option once; what else is set here is set without it."""
    parser = OverridesParser.create()
    preset = [override for override in overrides if override.startswith("experiment=")]
    config = copy.deepcopy(chosen(*preset))
    for override in parser.parse_overrides([o for o in overrides if o not in preset]):
        key, value = override.key_or_group, override.value()
        if key in GROUPS:
            value = chosen(f"{key}={value}")[key]
        OmegaConf.update(config, key, value, merge=False, force_add=override.is_add())
    return RunConfig.parse(config)


def checked(*overrides):
    config = parsed(*overrides)
    check.check(config)
    check.check_machine(config)
    return config


def test_compose_leaves_the_hydra_application_around_it_alone():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        around = GlobalHydra.instance()
        loader = around.config_loader()
        for settings, error in (((), None), (("norm=none_such",), ConfigError)):
            with pytest.raises(error) if error else nullcontext():
                compose(*settings)
            assert GlobalHydra.instance() is around
            assert around.config_loader() is loader
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] in GROUPS], ids=str)
def test_every_yaml_composes_into_a_run_that_can_be_trained(file, tmp_path):
    choice = f"{file.parts[0]}={file.relative_to(file.parts[0]).with_suffix('')}"
    if choice == "dataset=folder":
        root = pictures.tree(tmp_path / "pictures", {"a": 40, "b": 40})
        choices = (choice, f"dataset.root={root}", f"dataset.cache={tmp_path}")
        assert checked(*choices).dataset.name == "folder"
        return
    params = chosen(choice).hydra.sweeper.params if "experiment" in choice else None
    if choice == "norm=frozen_bn":  # it needs pretrained weights
        with pytest.raises(ConfigError, match="statistics must come with pretrained weights"):
            checked(choice)
        return
    for norm in (params or {}).get("norm", "").split(","):  # a preset may sweep over it
        config = checked(choice, *([f"norm={norm}"] if norm else []))
    variant = "defaults:" in (conf_dir() / file).read_text()  # of an option, whose name it has
    if "experiment" in choice:
        assert config.study != "default"
    elif choice in ("model=torchvision", "model=timm"):  # the name is that of the network
        assert config.model.name.endswith(f"_{config.model.arch}")
    elif not variant:
        assert getattr(config, file.parts[0]).name == file.stem


def test_no_yaml_is_forgotten():
    commands = ["config", "aggregate", "status", "evaluate", "memory", "bench", "bench_quick"]
    commands += ["report", "archive", "compare", "show"]
    others = {f"{command}.yaml" for command in commands}
    # Those of tracker/ need packages: tests/test_trackers.py.
    assert all(f.parts[0] in (*GROUPS, "tracker", "hydra") or str(f) in others for f in FILES)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name in sorted(others):
            hydra_compose(name.removesuffix(".yaml"), return_hydra_config=True)


PRESETS = (conf_dir() / "experiment").rglob("*.yaml")


@pytest.mark.parametrize(
    "preset", sorted(str(p.relative_to(conf_dir() / "experiment").with_suffix("")) for p in PRESETS)
)
def test_every_preset_opens_with_its_command(preset):
    text = (conf_dir() / "experiment" / f"{preset}.yaml").read_text()
    assert text.startswith(f"# @package _global_\n# python -m gnbench experiment={preset}")


def test_the_presets_hold_the_thirteen_networks_of_the_report():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        grid = hydra_compose("config", ["experiment=figure3"], return_hydra_config=True)
    assert grid.hydra.mode.name == "MULTIRUN"
    assert grid.hydra.sweeper.params == {"norm": "bn,gn", "batch_size": "2,4,8,16,32,64"}
    assert (grid.dataset.name, grid.model.name, grid.epochs) == ("cifar10", "simplenetv2", 30)
    assert parsed("experiment=replicate/deuscher2021").run_id == parsed("experiment=figure3").run_id
    baseline = parsed("experiment=figure3_baseline")
    assert (baseline.model.name, baseline.norm.name) == ("resnet34", "bn")
    assert (baseline.batch_size, baseline.epochs) == (128, 200)
    assert baseline.study == grid.study == "figure3"


@pytest.mark.parametrize(
    "override",
    [
        "model=simplenet",
        "model.dropout=0.1",
        "norm=bn",
        "norm.eps=0.001",
        "dataset=fashion_mini",
        "dataset.train_size=1000",
        "dataset.augmentation=none",
        "dataset.order=sorted_by_class",
        "optimizer=sgd",
        "optimizer.lr=0.002",
        "schedule.per=epoch",
        "batch=sqrt_lr",
        "batch_size=32",
        "epochs=29",
        "precision=bf16",
        "seed=1",
    ],
)
def test_what_a_run_is_enters_its_identity(override):
    assert parsed(override).run_id != parsed().run_id


@pytest.mark.parametrize(
    "override",
    [
        "study=other",
        "outputs=elsewhere",
        "device=cpu",
        "engine=eager",
        "progress=lines",
        "estimate=false",
        "rerun=true",
        "checkpoint_seconds=1",
        "dataset.root=/data",
        "optimizer.lr=1e-3",
        "seed=0",
    ],
)
def test_how_it_is_executed_does_not(override):
    assert parsed(override).run_id == parsed().run_id


def test_every_run_that_people_have_keeps_its_id():
    assert {overrides: parsed(*overrides.split(" ")).run_id for overrides in IDS} == IDS


def test_the_identity_survives_the_record_and_the_process():
    config = parsed("norm=gn", "batch_size=2")
    stored = json.loads(json.dumps(config.plain()))
    assert identity(stored) == config.identity
    assert run_id(stored) == config.run_id == "cifar10-simplenetv2-gn-bs2-seed0-1d2c1fce"


def test_the_reference_runs_are_the_runs_of_their_folders():
    records = list((ROOT / "outputs" / "reference").rglob("run.json"))
    assert len(records) >= 2
    for path in records:
        assert run_id(json.loads(path.read_text())["config"]) == path.parent.name
    preset = parsed("experiment=figure3", "norm=gn")
    assert preset.run_id in {path.parent.name for path in records}


def test_whole_floats_are_integers_to_the_identity():
    decay = [parsed(f"optimizer.weight_decay={value}").run_id for value in ("0", "0.0")]
    assert decay[0] == decay[1]


def test_a_variant_is_the_run_that_its_settings_make():
    assert parsed("norm=gn8").run_id == parsed("norm=gn", "norm.num_groups=8").run_id


def test_a_config_is_a_value():
    config = parsed("norm=bn", "batch_size=4")
    assert config == parsed("batch_size=4", "norm=bn")
    assert len({config, parsed("norm=bn", "batch_size=4"), config.with_(seed=1)}) == 2
    assert config.with_(batch_size=64).run_id == parsed("norm=bn").run_id
    with pytest.raises(ConfigError, match="batch_size=0: must be at least 1"):
        config.with_(batch_size=0)
    seeds = [run.seed for run in config.with_(replicas=3, seed=5).runs()]
    assert seeds == [5, 6, 7]


BAD = {
    "batch_size=0": "batch_size=0: must be at least 1",
    "batch.accumulate=0": "batch.accumulate=0: must be at least 1",
    "batch_size=64 batch.accumulate=1000": "batch_size=64 batch.accumulate=1000 is larger.*most 50",
    "batch.decay_rule=per_year": "batch.decay_rule='per_year': choose one of none, per_step, per_",
    "batch.decay_rule=per_step optimizer.weight_decay=null": "optimizer=adamw has no weight_decay",
    "norm=ghost_bn batch_size=8": "norm.images=16: a batch has batch_size=8 images; .* most 8",
    "norm=bgn norm.channels_per_group=5": "channels_per_group=5 does not divide 32 channels",
    "batch_size=-2": "batch_size=-2: must be at least 1",
    "batch_size=abc": "batch_size=abc: must be an integer",
    "batch_size=50001": r"batch_size=50001 is larger than the training set \(50000 images",
    "epochs=0": "epochs=0: must be at least 1",
    "epochs=1.5": "epochs=1.5: must be an integer",
    "+epoks=3": "epoks: there is no such setting",
    "+batch.size=3": "batch.size: there is no such setting",
    "+dataset.size=3": "dataset.size: there is no such setting",
    "outputs=''": "outputs='' is not a folder",
    "optimizer=sgd optimizer.nesterov=maybe": "optimizer.nesterov=maybe: must be of type bool",
    "dataset.root=null": "dataset.root=.*: must be of type str",
    "dataset._target_=nope.nope": "dataset._target_=nope.nope: No module named 'nope'",
    "dataset.mean=0.3": "dataset.mean=0.3: must be a list",
    "model=resnet18 model.layers=3": "model.layers=3: must be of type list",
    "model=resnet18 model.layers=[a,1,1,1]": r"model.layers=\['a', 1, 1, 1\]: must be of type list",
    "schedule=multistep schedule.milestones=[x]": "schedule.milestones=.* must be of type list",
    "norm.num_groups=24": "num_groups=24 does not divide 32 channels: use 1, 2, 4, 8, 16, 32",
    "norm.channels_per_group=8": "num_groups=16 and channels_per_group=8: give exactly one",
    "norm.num_groups=null": "num_groups=None and channels_per_group=None: give exactly one",
    "norm.eps=0": "norm.eps=0: must be more than 0",
    "norm.affine=sometimes": "norm.affine=sometimes: must be of type bool",
    "optimizer.lr=abc": "optimizer.lr=abc: must be a number",
    "optimizer.lr=-1": "optimizer.lr=-1: must be more than 0",
    "optimizer.lr=nan": "optimizer.lr=nan: must be a finite number",
    "optimizer.lr=inf": "optimizer.lr=inf: must be a finite number",
    "optimizer.betas=3": "optimizer.betas=3: must be a list",
    "optimizer.betas=[1.5,0.9]": r"optimizer.betas\[0\]=1.5: must be less than 1",
    "optimizer.betas=[a,b]": r"optimizer.betas\[0\]=a: must be a number",
    "norm=lrn norm.alpha=abc": "norm.alpha=abc: must be of type float",
    "batch=fixed_steps batch.reference_size=60000 schedule.warmup_epochs=30": "warmup_epochs=30",
    "optimizer.decay_norm_and_bias=some": "bias=some: must be true or false",
    "precision=fp16": "precision=fp16: choose one of fp32, tf32, bf16",
    "engine=warp": "engine=warp: choose one of auto, eager, graph",
    "device=tpu": "device=tpu: choose one of auto, cpu, cuda, cuda:N",
    "device=cuda:77": "device=cuda:77: this machine has . CUDA devices",
    "progress=loud": "progress=loud: choose one of auto, bar, lines",
    "seed=-1": "seed=-1: must be at least 0",
    "study=../x": "study='../x' is not a plain name",
    "study=''": "study='' is not a plain name",
    "study=a/b": "study='a/b' is not a plain name",
    "dataset.name=a/b": "dataset.name='a/b' is not a plain name",
    "dataset.train_size=9": "dataset.train_size=9: must be from 10 to 50000",
    "dataset.train_size=x": "dataset.train_size=x: must be an integer",
    "dataset.mean=[0.5]": r"must be a list of one number per channel \(3\)",
    "dataset.std=[0,1,1]": r"dataset.std\[0\]=0: must be more than 0",
    "dataset.image=[3]": r"dataset.image=\[3\]: must be a list of 3",
    "dataset.image=[3,4,4]": "images of 4×4 pixels are too small for this network",
    "dataset.order=sorted": "order=sorted: choose one of shuffled, sorted_by_class, class_blocks",
    "dataset.order=class_blocks": "order=class_blocks dataset.block=None: class_blocks needs a bl",
    "dataset.order=sorted_by_class batch=fixed_steps batch_size=48": "23,460 steps",
    "dataset.block=32": "dataset.order=shuffled dataset.block=32: class_blocks needs a block",
    "dataset.order=class_blocks dataset.block=0": "dataset.block=0: must be at least 1",
    "dataset.order=class_blocks dataset.block=50001": "dataset.block=50001: must be at most 50000",
    "dataset.augmentation=mixup": "choose one of none, flip, pad_crop_flip",
    "batch.lr_rule=cubic": "batch.lr_rule=cubic: choose one of none, linear, sqrt",
    "schedule.per=day": "per=day: choose step or epoch",
    "schedule.warmup_epochs=30": "warmup_epochs=30.0: must be less than the 30 epochs",
    "model.init=magic": "init=magic: choose one of torch, he",
    "model.dropout=2": "model.dropout=2: must be at most 1",
    "model.final_pool=maybe": "model.final_pool=maybe: must be of type bool",
    "checkpoint_seconds=-1": "checkpoint_seconds=-1: must be at least 0",
    "+norm.foo=1": "unexpected keyword argument 'foo'",
    "model=resnet18 model.layers=[100000,1,1,1]": "give at most 1000 blocks in all",
    "epochs=1000000000000000000000": "epochs=10*: must be at most 9223372036854775807",
    f"batch.reference_size=1{'0' * 400}": "must be at most 9223372036854775807",
    f"norm.eps=1{'0' * 400}": "norm.eps=10*…: must be a number",
    "norm=lrn norm.k=nan": "norm.k=nan: must be a finite number",
    "norm=lrn norm.k=1000000000000000000000": "norm=lrn.*: int too big to convert",
    "optimizer.lr=1e308 batch=linear_lr batch_size=1024": "optimizer.lr=1e.308.*becomes infinite",
    "schedule=multistep schedule.gamma=1e300": "schedule=multistep.*becomes infinite",
    "batch.name=${nope}": "batch.name: Interpolation key 'nope' not found",
    "wait=${study}": "wait=default: must be true or false",
    "norm.name=${nope:}": "norm.name: ",
    "norm._target_=torch.nn.NoSuchNorm": "norm._target_=torch.nn.NoSuchNorm",
    "model._target_=torch.nn.NoSuchNet": "model._target_=torch.nn.NoSuchNet",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_line_that_names_the_value(override):
    with pytest.raises(ConfigError, match=BAD[override]) as caught:
        checked(*override.split(" "))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["epoks=3", "norm.num_grups=4", "norm=batch", "model=null"])
def test_what_hydra_refuses_is_a_fault_of_the_configuration_too(override):
    with pytest.raises(ConfigError) as caught:
        compose(override)
    assert "\n" not in str(caught.value)


class Net(nn.Module):
    """A network of one's own. Its norm sees maps of 1×1."""

    def __init__(self, norm, image, classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(image[0], 16, image[1:]), norm(16), nn.Flatten())
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.features(x))


def with_network(name, *overrides):
    model = {"name": "own", "_target_": f"tests.test_config.{name}"}
    return parsed("norm=bn", *overrides).with_(model=model)


class Auxiliary(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class Map(Net):
    def forward(self, x):
        return super().forward(x)[..., None, None]


class FewerInEvaluation(Net):
    def forward(self, x):
        return super().forward(x)[:, : None if self.training else 9]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("Auxiliary", "in training it returns tuple for 64 images of 10 classes"),
        ("Map", r"in training it returns \(64, 10, 1, 1\) for 64 images of 10 classes"),
        ("FewerInEvaluation", r"in evaluation it returns \(\d+, 9\) .* shape \(\d+, 10\)"),
    ],
)
def test_what_a_network_returns_must_be_logits(network, message):
    with pytest.raises(ConfigError, match=message):
        check.check(with_network(network))
    check.check(with_network("Net"))


PIXEL = ("model=resnet18", "model.stem=imagenet", "model.layers=[1,1,1,1]")  # 32×32 becomes 1×1


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ((*PIXEL, "norm=in"), "norm=in, batch_size=64: "),
        ((*PIXEL, "norm=gn", "batch_size=1"), ""),
        ((*PIXEL, "norm=bn", "batch_size=1"), "norm=bn, batch_size=1: "),
        # torch reads a counter then, which no meta tensor has.
        ((*PIXEL, "norm=bn", "norm.momentum=null", "batch_size=1"), "norm=bn, batch_size=1: "),
        ((*PIXEL, "norm=bn", "norm.momentum=null"), ""),
        ((*PIXEL, "norm=gn", "norm.num_groups=null", "norm.channels_per_group=1"), "512 groups"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, tuple) else "",
)
def test_a_norm_of_single_values_is_refused(overrides, refused):
    with pytest.raises(ConfigError, match=refused) if refused else nullcontext():
        check.check(parsed(*overrides))


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["norm=gn"], r"GroupNorm\(16 groups\) on .* normalizes single values"),
        (["norm=gn", "norm._target_=gnbench.norms.ReferenceGroupNorm"], "normalizes single values"),
        (["norm=gn8"], ""),
        (["dataset.train_size=33", "batch_size=32"], ""),  # the last batch is dropped
        (["+norm.track_running_stats=false"], ""),
        # The last chunk of the test images is one image, and there are no running statistics.
        (["+norm.track_running_stats=false", "dataset.test_images=10001"], "norm=bn, batch_size="),
        (["dataset.test_images=10001"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_norm_of_single_values_in_a_network_of_one_s_own(overrides, refused):
    with pytest.raises(ConfigError, match=refused) if refused else nullcontext():
        check.check(with_network("Net", *overrides))


def test_bf16_is_refused_where_the_processor_emulates_it(monkeypatch):
    monkeypatch.setattr(check, "has_native_bf16", lambda device: False)
    with pytest.raises(ConfigError, match=r"precision=bf16: .* in emulation, .* precision=fp32"):
        compose("precision=bf16", "device=cpu")
    check.check(parsed("precision=bf16"))  # of other machines this says nothing
    monkeypatch.setattr(check, "has_native_bf16", lambda device: True)
    compose("precision=bf16", "device=cpu")


def test_checking_leaves_the_random_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    compose("norm=bn")
    assert torch.equal(torch.rand(1), expected)


def test_the_report_s_group_norm_is_reachable_by_an_override():
    config = compose("norm._target_=gnbench.norms.ReferenceGroupNorm")
    layers = [m for m in build_model(config).modules() if isinstance(m, ReferenceGroupNorm)]
    assert len(layers) == 6


def test_lazy_names_are_all_there():
    for name in gnbench.__all__:
        assert getattr(gnbench, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gnbench.nothing  # noqa: B018


def test_the_data_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    for value, root in (
        ("/somewhere", "/somewhere"),
        ("~/data", "/home/of/somebody/data"),
        ("", "/home/of/somebody/.cache/gnbench"),
    ):
        monkeypatch.setenv("GNBENCH_DATA", value)
        assert parsed().dataset.root == root
    assert parsed("outputs='~/runs'").outputs == "/home/of/somebody/runs"


@pytest.mark.parametrize("group", ["model", "norm", "dataset", "optimizer", "schedule", "batch"])
@pytest.mark.parametrize("value", ["true", "1", "1.5"])
def test_a_name_that_yaml_takes_for_something_else_is_refused(group, value):
    with pytest.raises(ConfigError, match=rf"{group}\.name=.*: .* in quotes"):
        parsed(f"{group}.name={value}")


def test_folders_of_one_s_own_are_searched(tmp_path):
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm" / "mine.yaml").write_text("defaults: [bn]\nname: mine\n")
    assert compose("norm=mine", config_dirs=[str(tmp_path)]).norm.name == "mine"
    with pytest.raises(ConfigError, match="norm/mine"):
        compose("norm=mine")
