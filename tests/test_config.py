import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import gnbench
from gnbench import ConfigError
from gnbench.build import compose
from gnbench.config import conf_dir, identity, run_id

GROUPS = ("model", "norm", "dataset", "optimizer", "schedule", "batch", "experiment")
FILES = sorted(p.relative_to(conf_dir()) for p in conf_dir().rglob("*.yaml"))


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
def test_every_yaml_composes_into_a_run_that_can_be_trained(file):
    group, option = file.parts[0], file.stem
    config = compose(f"{group}={option}")
    if group != "experiment":
        assert config[group].name == option
    else:
        assert config.study != "default"


def test_no_yaml_is_forgotten():
    others = {"config.yaml", "aggregate.yaml", "status.yaml", "bench.yaml", "bench_quick.yaml"}
    assert all(f.parts[0] in (*GROUPS, "hydra") or str(f) in others for f in FILES)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name in sorted(others):
            hydra_compose(name.removesuffix(".yaml"), return_hydra_config=True)


@pytest.mark.parametrize("preset", sorted(p.stem for p in (conf_dir() / "experiment").glob("*")))
def test_every_preset_opens_with_its_command(preset):
    text = (conf_dir() / "experiment" / f"{preset}.yaml").read_text()
    assert text.startswith(f"# @package _global_\n# python -m gnbench experiment={preset}")


def test_the_presets_hold_the_thirteen_networks_of_the_report():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        grid = hydra_compose("config", ["experiment=figure3"], return_hydra_config=True)
    assert grid.hydra.mode.name == "MULTIRUN"
    assert grid.hydra.sweeper.params == {"norm": "bn,gn", "batch_size": "64,32,16,8,4,2"}
    assert (grid.dataset.name, grid.model.name, grid.epochs) == ("cifar10", "simplenetv2", 30)
    baseline = compose("experiment=figure3_baseline")
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
    assert run_id(compose(override)) != run_id(compose())


@pytest.mark.parametrize(
    "override",
    [
        "study=other",
        "outputs=elsewhere",
        "device=cpu",
        "engine=eager",
        "progress=lines",
        "rerun=true",
        "checkpoint_seconds=1",
        "dataset.root=/data",
        "optimizer.lr=1e-3",
        "seed=0",
    ],
)
def test_how_it_is_executed_does_not(override):
    assert run_id(compose(override)) == run_id(compose())


def test_the_identity_survives_the_record_and_the_process():
    config = compose("norm=gn", "batch_size=2")
    stored = json.loads(json.dumps(OmegaConf.to_container(config, resolve=True)))
    assert identity(stored) == identity(config)
    assert run_id(stored) == run_id(config)
    # A change of this name orphans every run that anybody has trained: make it on purpose.
    assert run_id(config).startswith("cifar10-simplenetv2-gn-bs2-seed0-")
    assert run_id(config) == "cifar10-simplenetv2-gn-bs2-seed0-1d2c1fce"


def test_whole_floats_are_integers_to_the_identity():
    assert run_id(compose("optimizer.weight_decay=0")) == run_id(
        compose("optimizer.weight_decay=0.0")
    )


BAD = {
    "batch_size=0": "batch_size=0: must be an integer >= 1",
    "batch_size=-2": "batch_size=-2: must be an integer >= 1",
    "batch_size=abc": "'abc' of type 'str' could not be converted to Integer",
    "batch_size=50001": r"batch_size=50001 is larger than the training set \(50000 images",
    "epochs=0": "epochs=0: must be an integer >= 1",
    "epochs=1.5": "Value '1.5' of type 'float' could not be converted to Integer",
    "epoks=3": "Could not override 'epoks'; Key 'epoks'",
    "+epoks=3": "epoks: there is no such setting",
    "+batch.size=3": "batch.size: there is no such setting",
    "+dataset.size=3": "dataset.size: there is no such setting",
    "outputs=''": "outputs='' is not a folder",
    "optimizer=sgd optimizer.nesterov=maybe": "optimizer.nesterov=maybe: must be of type bool",
    "dataset.root=null": "dataset.root=null: choose a folder",
    "dataset._target_=nope.nope": "dataset._target_=nope.nope: No module named 'nope'",
    "dataset.mean=0.3": "dataset.mean=0.3: must be a list",
    "model=resnet18 model.layers=3": "model.layers=3: must be a list of numbers",
    "model=resnet18 model.layers=[a,1,1,1]": r"model.layers=\['a', 1, 1, 1\]: must be a list",
    "schedule=multistep schedule.milestones=[x]": "schedule.milestones=.* must be a list",
    "norm.num_grups=4": "Key 'num_grups'",
    "norm=batch": "Available options in 'norm': bn; gn",
    "model=vgg": "Available options in 'model'",
    "norm.num_groups=24": "num_groups=24 does not divide 32 channels: use 1, 2, 4, 8, 16, 32",
    "norm.channels_per_group=8": "num_groups=16 and channels_per_group=8: give exactly one",
    "norm.num_groups=null": "num_groups=None and channels_per_group=None: give exactly one",
    "norm.eps=0": "norm.eps=0: must be a number over 0",
    "norm.affine=sometimes": "norm.affine=sometimes: must be of type bool",
    "optimizer.lr=abc": "optimizer.lr=abc: must be a number over 0",
    "optimizer.lr=-1": "optimizer.lr=-1: must be a number over 0",
    "optimizer.lr=nan": "optimizer.lr=nan: must be a number",
    "optimizer.lr=inf": "optimizer.lr=inf: must be a number",
    "optimizer.betas=3": "optimizer.betas=3: give two numbers",
    "optimizer.betas=[1.5,0.9]": r"optimizer.betas=\[1.5, 0.9\]: give two numbers",
    "optimizer.betas=[a,b]": "optimizer.betas=.*: give two numbers",
    "norm=lrn norm.alpha=abc": "norm.alpha=abc: must be a number",
    "batch=fixed_steps batch.reference_size=60000 schedule.warmup_epochs=30": "warmup_epochs=30",
    "optimizer.decay_norm_and_bias=some": "choose one of true, false",
    "precision=fp16": "precision=fp16: choose one of fp32, bf16",
    "engine=warp": "engine=warp: choose one of auto, eager, graph",
    "device=tpu": "device=tpu: choose one of auto, cpu, cuda, cuda:N",
    "device=cuda:77": "device=cuda:77: this machine has . CUDA devices",
    "progress=loud": "progress=loud: choose one of auto, bar, lines",
    "seed=-1": "seed=-1: must be an integer from 0",
    "study=../x": "study='../x' is not a plain name",
    "study=''": "study='' is not a plain name",
    "study=a/b": "study='a/b' is not a plain name",
    "dataset.name=a/b": "dataset.name='a/b' is not a plain name",
    "model=null": "Config group override must be a string",
    "dataset.train_size=9": "dataset.train_size=9: must be an integer from 10 to 50000",
    "dataset.train_size=x": "dataset.train_size=x: must be an integer",
    "dataset.mean=[0.5]": r"must be a list of one number per channel \(3\)",
    "dataset.std=[0,1,1]": "dataset.std=.*: must be positive",
    "dataset.image=[3]": r"dataset.image=\[3\]: give \[channels, height, width\]",
    "dataset.image=[3,4,4]": "images of 4×4 pixels are too small for this network",
    "dataset.augmentation=mixup": "choose one of none, flip, pad_crop_flip",
    "batch.lr_rule=cubic": "batch.lr_rule=cubic: choose one of none, linear, sqrt",
    "schedule.per=day": "per=day: choose step or epoch",
    "schedule.warmup_epochs=30": "warmup_epochs=30: must be less than the 30 epochs",
    "model.init=magic": "init=magic: choose one of torch, he",
    "model.dropout=2": "model.dropout=2: must be a number from 0 to 1",
    "model.final_pool=maybe": "model.final_pool=maybe: must be of type bool",
    "checkpoint_seconds=-1": "checkpoint_seconds=-1.0: must be a number from 0",
    "+norm.foo=1": "unexpected keyword argument 'foo'",
    "model=resnet18 model.layers=[100000,1,1,1]": "give at most 1000 blocks in all",
    "epochs=1000000000000000000000": "epochs=10*: must be at most 9223372036854775807",
    f"batch.reference_size=1{'0' * 400}": "must be at most 9223372036854775807",
    f"norm.eps=1{'0' * 400}": "norm.eps=10*: must be a number over 0",
    "norm=lrn norm.k=nan": "norm.k=nan: must be a number",
    "norm=lrn norm.k=1000000000000000000000": "norm=lrn.*: int too big to convert",
    "optimizer.lr=1e308 batch=linear_lr batch_size=1024": "optimizer.lr=1e.308.*becomes infinite",
    "schedule=multistep schedule.gamma=1e300": "schedule=multistep.*becomes infinite",
    "batch.name=${nope}": "batch.name: Interpolation key 'nope' not found",
    "wait=${study}": "wait: While dereferencing interpolation",
    "norm.name=${run_id:}": "norm.name: RecursionError raised while resolving interpolation",
    "norm._target_=torch.nn.NoSuchNorm": "norm._target_=torch.nn.NoSuchNorm",
    "model._target_=torch.nn.NoSuchNet": "model._target_=torch.nn.NoSuchNet",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_line_that_names_the_value(override):
    with pytest.raises(ConfigError, match=BAD[override]) as caught:
        compose(*override.split(" "))
    assert "\n" not in str(caught.value)


def test_a_batch_norm_with_a_cumulative_average_is_checked_on_real_values():
    """torch reads a counter then, which no meta tensor has."""
    compose("norm=bn", "norm.momentum=null")
    network = ("model=resnet18", "model.stem=imagenet", "norm.momentum=null", "batch_size=1")
    with pytest.raises(ConfigError, match="Expected more than 1 value per channel"):
        compose(*network, "norm=bn")


def test_instance_norm_of_a_single_pixel_is_refused():
    with pytest.raises(ConfigError, match="norm=in, batch_size=64: Expected more than 1 spatial"):
        compose("model=resnet18", "model.stem=imagenet", "norm=in")


def test_batch_norm_of_a_single_value_is_refused():
    overrides = ("model=resnet18", "model.stem=imagenet", "batch_size=1")
    compose(*overrides, "norm=gn")
    with pytest.raises(ConfigError, match="batch_size=1: Expected more than 1 value per channel"):
        compose(*overrides, "norm=bn")


def test_checking_leaves_the_random_generator_alone():
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    compose("norm=bn")
    assert torch.equal(torch.rand(1), expected)


def test_the_report_s_group_norm_is_reachable_by_an_override():
    from gnbench.build import build_model
    from gnbench.norms import ReferenceGroupNorm

    config = compose("norm._target_=gnbench.norms.ReferenceGroupNorm")
    layers = [m for m in build_model(config).modules() if isinstance(m, ReferenceGroupNorm)]
    assert len(layers) == 6


def test_lazy_names_are_all_there():
    for name in gnbench.__all__:
        assert getattr(gnbench, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gnbench.nothing  # noqa: B018


def test_the_data_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("GNBENCH_DATA", "/somewhere")
    assert compose().dataset.root == "/somewhere"
    monkeypatch.delenv("GNBENCH_DATA")
    assert Path(compose().dataset.root).parts[0] == "~"
