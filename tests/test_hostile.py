"""Whatever is typed: one clear line and nothing written, or a run that can be trained."""

import functools
import itertools
import json
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gnbench.config import conf_dir
from tests import faults, hostile

GROUPS = ("model", "norm", "dataset", "optimizer", "schedule", "batch", "tracker", "experiment")
NUMBERS = (
    "-1", "0", "1", "2", "3", "7", "64", "-0.0", "0.5", "1.0", "1e-300", "1e300", "-1e300", "nan",
    "-nan", "inf", "-inf", "1000000000000000000", "9223372036854775808", f"1{'0' * 30}",
    f"1{'0' * 400}", f"1{'0' * 5000}", "1e18", "0x10", "1_000", "007", "1.", ".5", "--1",
)  # fmt: skip
WORDS = (
    "", "''", '""', "null", "true", "false", "yes", "on", "abc", "'a b'", "' '", "a b", "😀",
    "'😀'", "שלום", "\u202eabc", "e\u0301", "'a\u2028b'", "'a\tb'", "'a\nb'", "a\nb", "\ufeff",
    "x" * 300, "'" + "x y" * 100 + "'", "???", "'???'", "!!int 3", "none", "NULL", "~", "cuda:0",
    "cuda:99999999999999999999", "cuda:-1", "cpu:7", "%s", "{}", "$", "\\", "\x1b[31m",
)  # fmt: skip
PATHS = (
    "../x", "/etc/x", "~/x", "a/b", "..", ".", "/", "./x", "a/../../x", "//x", "x/", "-", "-x",
    ".hidden", "con:", "a\\b", "/proc/x", "/dev/null", "/dev/null/x", "'a/ b'", "a..b",
)  # fmt: skip
COLLECTIONS = (
    "[]", "[1]", "[0,0,0]", "[1,2]", "[a,b]", "[1,1,1,1]", "[100000,1,1,1]", "[1,1,1,100000]",
    "[0.5,0.9]", "[nan,0.5]", "[inf,1,1]", "[3,100000,100000]", "[3,1000000000000000000,2]",
    "[1000000000000000000,32,32]", "[true,true,true]", "[null]", "[[1,2],[3]]", "[1,[2,{a:3}]]",
    "[-1,32,32]", "[3,32,32]", "[1e300,1e300,1e300]", "[1e-300,1e-300,1e-300]", "{}", "{a:1}",
    "{a:{b:[1]}}", "{_target_:os.system}", "{name:x,_target_:builtins.exit}", "{'':1}", "{1:2}",
)  # fmt: skip
INTERPOLATIONS = (
    "${oc.env:HOME}", "${oc.env:NOPE}", "${nope}", "${run_id:}", "${run_id}", "${batch_size}",
    "${epochs}", "${model}", "${study}", "${nope:}", "${", "${}", "${${batch_size}}", "$x",
    "${oc.decode:'['}", "${hydra:run.dir}", "${hydra.run.dir}", "${.name}", "${..seed}", "${...x}",
    "'${nope}'", "\\${nope}", "${oc.env:HOME}/x", "x${seed}",
)  # fmt: skip
SYNTAX = (
    "1,2", "1,", ",", "a,b", "0,1,nan", "[", "]", "{", "}", "(", ")", "'", '"', "[1,2", "1]",
    "{a:1", "choice(1,2)", "choice()", "range(1,3)", "range(1,1000000000)", "interval(0,1)",
    "glob(*)", "shuffle(1,2)", "sort(3,1)", "tag(a,1)", "int(3)", "str(3)", "float(1)", "nope(3)",
    "a=b", "=", "==", "a:b", "@", "a@b", "#", "bn,bn", "gn,nope", "'1,2'", "1 2", "*",
)  # fmt: skip
TARGETS = (
    "os.system", "builtins.exit", "sys.exit", "os.getcwd", "math.sqrt", "builtins.dict",
    "builtins.int", "torch.nn.Linear", "torch.nn.Identity", "torch.nn.ReLU", "torch.optim.Adagrad",
    "torch.optim.LBFGS", "gnbench", "gnbench.nothing", "os", "nope", ".", "..", "a..b", "a.", ".a",
    "gnbench.norms.group_norm", "gnbench.models.ResNet", "gnbench.models.SimpleNet", "time.sleep",
    "gnbench.schedules.constant", "tests.tiny.dataset", "tests.tiny.Greedy", "antigravity.x",
)  # fmt: skip
UNKNOWN = (
    "epoks", "model.nope", "norm.num_grups", "hydra.nope", "nope.nope", "a.b.c.d", "dataset.0",
    "batch.", ".batch", "batch..name", "😀", "", " ", "model.layers[0]", "model.layers.0",
    "optimizer.betas.1", "dataset.image.0", "model@norm", "norm@pkg", "model.block._target_",
    "_target_", "hydra", "hydra/launcher", "hydra/sweeper", "hydra.mode", "hydra.launcher",
    "hydra.verbose", "hydra.job.name", "hydra.sweeper.params", "hydra.callbacks", "schema",
    "model._args_", "model._recursive_", "model._convert_", "norm._args_", "optimizer._args_",
)  # fmt: skip
RAW = (
    "=", "==", "a", "~model", "~norm.name", "~batch_size", "~", "+", "++", "~nope", "+a", "++a=",
    "model", "'", "[", "--", "--nope", "-x", "-1", "~dataset.root", "~dataset.image", "~batch",
    "~schedule.name", "~optimizer.decay_norm_and_bias", "+model=resnet18", "model@x=resnet18",
    "+model@x=resnet18", "--config-name=nope", "-cn=nope", "--config-path=/nope", "--cfg=nope",
    "--info=nope", "--package=nope", "-cd=/nope", "--experimental-rerun=nope", "~model._target_",
)  # fmt: skip


def flat(prefix, node):
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flat(f"{prefix}{key}.", value)


@functools.cache
def known():
    """Return every setting there is, each with an override that makes it be there."""
    found = {}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for group in GROUPS:
            for path in sorted((conf_dir() / group).glob("*.yaml")):
                choice = f"{group}={path.stem}"
                config = OmegaConf.to_container(hydra_compose("config", [choice]))
                for key in flat("", config):
                    found.setdefault(key, set()).add(choice)
    return {key: sorted(choices) for key, choices in sorted(found.items())}


VALUES = st.one_of(
    *map(st.sampled_from, (NUMBERS, WORDS, PATHS, COLLECTIONS, INTERPOLATIONS, SYNTAX)),
    st.text(
        st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=6
    ),
)
BATCH = 4  # commands of an example
PROFILE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # each try is a command: too slow to shrink
)
MANY = settings(PROFILE, max_examples=25 * faults.REPEAT)
FEWER = settings(PROFILE, max_examples=5 * faults.REPEAT)


@st.composite
def overrides(draw):
    """One override that may be anything, with the choice of a component that knows its key."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return [draw(st.sampled_from(RAW))]
    if kind == 1:
        key, others = draw(st.sampled_from(UNKNOWN)), []
    else:
        key = draw(st.sampled_from(list(known())))
        choice = draw(st.sampled_from(known()[key]))
        others = [choice] if key.partition(".")[0] == choice.partition("=")[0] != key else []
    value = draw(st.sampled_from(TARGETS) if key.endswith("_target_") else VALUES)
    prefix = draw(st.sampled_from(["", "", "", "", "+", "++", "~"]))
    return [*others, f"{prefix}{key}={value}"]


def notes_a_plan_elsewhere(command):
    """Tell a sweep that is told to write to a folder other than outputs/, as it then does."""
    words = [argument.lstrip("+").partition("=")[0] for argument in command]
    return "outputs" in words and ("-m" in words or "experiment" in words)


COMMANDS = st.tuples(
    st.sampled_from([[], [], ["-m"]]),
    st.lists(overrides(), min_size=1, max_size=2).map(lambda lists: [*itertools.chain(*lists)]),
).map(lambda parts: [*parts[0], *parts[1]])
COMMANDS = COMMANDS.filter(lambda command: not notes_a_plan_elsewhere(command))
FOLDERS = st.sampled_from((*WORDS, *PATHS, *NUMBERS, *INTERPOLATIONS, *SYNTAX))
ANSWERS = st.tuples(
    st.sampled_from(["gnbench.status", "gnbench.aggregate", "gnbench.report"]),
    st.lists(
        st.tuples(
            st.sampled_from(
                ["study", "outputs", "figure", "figure.order", "figure.baseline",
                 "figure.reference", "nope", "+nope", "~study"]
            ),
            FOLDERS,
        ).map("=".join),
        min_size=1,
        max_size=2,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Run a command; return its exit code, what it said, its report and what it wrote."""
    numbers = itertools.count()
    base = tmp_path_factory.mktemp("hostile")

    def called(module, arguments, allowed=()):
        folder = base / str(next(numbers))
        folder.mkdir()
        code = hostile.command(module, arguments, folder, allowed)
        assert code is not None, f"it hangs: {arguments}"
        out, err, report = (
            (folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr", "report")
        )
        written = sorted(str(path.relative_to(folder)) for path in (folder / "work").rglob("*"))
        shutil.rmtree(folder)
        return code, out, err, json.loads(report), [w.removeprefix("work/") for w in written]

    return called


def assert_refused(err, out, written, several):
    lines = err.removesuffix("\n").split("\n")
    assert lines[0].startswith("gnbench: ")
    assert len(lines) == 1 or several, err
    assert all(line.removeprefix("gnbench: ").strip() for line in lines)
    assert out == ""
    assert written == []


def is_flag(argument):
    return argument.startswith("-") and argument != "-m"


def assert_refused_or_trainable(arguments, code, out, err, report, written):
    assert report["changes"] == []
    assert "Traceback" not in err
    if code == 2 and any(map(is_flag, arguments)) and err.startswith("usage:"):
        assert err.splitlines()[-1].startswith("gnbench: error:")
        return
    if code == 2:
        assert_refused(err, out, written, several=len(arguments) > 1)
        return
    assert code in (0, 1), err
    assert report["accepted"] or any(map(is_flag, arguments))
    assert all(path == "outputs" or path.startswith("outputs/") for path in written)
    for run in report["accepted"]:
        assert all(math.isfinite(rate) for rate in run["rates"]), run["rates"]
        assert "/" not in run["run_id"]


def two_at_a_time(case, commands):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(case, commands))


@pytest.mark.slow
@given(st.lists(COMMANDS, min_size=BATCH, max_size=BATCH))
@MANY
def test_a_command_line_is_refused_in_one_line_or_can_be_trained(call, commands):
    def check(arguments):
        assert_refused_or_trainable(arguments, *call("gnbench", arguments))

    two_at_a_time(check, commands)


@pytest.mark.slow
@given(st.lists(ANSWERS, min_size=BATCH, max_size=BATCH))
@FEWER
def test_the_readers_of_runs_refuse_in_one_line_what_is_not_there(call, commands):
    def check(command):
        code, out, err, report, written = call(*command)
        assert code == 2
        assert report["changes"] == []
        assert_refused(err, out, written, several=False)

    two_at_a_time(check, commands)


@pytest.mark.slow
def test_an_absolute_folder_for_outputs_is_the_user_s_choice(call, tmp_path):
    chosen = tmp_path / "elsewhere"
    code, _, err, report, written = call("gnbench", [f"outputs={chosen}"], [str(chosen)])
    assert (code, err, report["changes"], written) == (0, "", [], [])
    [run] = report["accepted"]
    assert run["run_dir"] == f"{chosen}/default/{run['run_id']}"


VARIANT = "give it to one of several by a variant: norm=bn,gn8"
REFUSED = {
    "batch_size=0": "batch_size=0: must be at least 1",
    "epoks=3": "epoks=3: there is no such setting; --cfg job lists those there are",
    "batch_size=2,4": "batch_size=2,4",
    "norm=nope": "norm/nope",
    "model": "model: this is no setting: write ",
    "outputs=~/runs": "outputs=~/runs: Hydra cannot read this value; put it in quotes",
    "~optimizer._partial_=a\nb": r"~optimizer._partial_=a\\nb: Hydra cannot read this value",
    f"epochs=1{'0' * 5000}": "",
    "-m batch_size=range(1,1000000000)": "a sweep of more than 10000 cells; split it",
    "norm._target_=tests.hostile.leave": "a _target_ ends the program",
    # Settings that the chosen option does not have.
    "norm=bn norm.num_groups=8": "norm.num_groups=8: norm=bn has no such setting, only eps, ",
    "norm=bn norm.track_running_stats=false": r"affine; .* write \+norm.track_running_stats=false",
    "norm=gn norm.num_groups=auto norm.at_most=4": r"affine; .* write \+norm.at_most=4",
    "norm=gn norm.standardize_weights=true": r"affine; .* write \+norm.standardize_weights=true",
    "norm=none norm.eps=1": "norm.eps=1: norm=none has no such setting",
    "-m norm=bn,gn norm.num_groups=8": f"norm=bn has no such setting, only eps, .*; {VARIANT}",
    "-m optimizer=adamw,sgd optimizer.betas=[0.5,0.9]": "optimizer=sgd has no such setting",
    "experiment=figure3 norm.momentum=0.2": f"norm=gn has no such setting, only .*; {VARIANT}",
    "experiment=figure3 norm.num_groups=8": "norm.num_groups=8: norm=bn has no such setting",
    # Folders that Hydra would make.
    "hydra.run.dir=x": "hydra.run.dir=x: gnbench names the folders of runs; choose outputs=DIR",
    "-m seed=0,1 hydra.sweep.subdir=${hydra.job.num}": r"hydra.sweep.subdir=\${hydra.job.num}: ",
    "-m seed=0,1 hydra.sweep.dir=x": "hydra.sweep.dir=x: gnbench names the folders of runs",
    "-m seed=0,1 ++hydra.job.chdir=true": "hydra.job.chdir=true: ",
}


@pytest.mark.parametrize("typed", REFUSED, ids=lambda typed: typed[:50].strip())
def test_bad_input_is_one_line_that_says_what_to_do(call, typed):
    code, out, err, report, written = call("gnbench", typed.split(" "))
    assert code == 2
    assert report["accepted"] == report["changes"] == []
    assert re.search(REFUSED[typed], err)
    assert_refused(err, out, written, several=False)


def test_every_fault_of_a_sweep_is_named_once(call):
    _, out, err, _, written = call("gnbench", ["-m", "norm.num_groups=16,24,48", "batch_size=2,0"])
    divisors = "use 1, 2, 4, 8, 16, 32"
    assert sorted(err.removeprefix("gnbench: ").splitlines()) == [
        "batch_size=0: must be at least 1",
        f"model=simplenetv2, norm=gn: num_groups=24 does not divide 32 channels: {divisors}",
        f"model=simplenetv2, norm=gn: num_groups=48 does not divide 32 channels: {divisors}",
    ]
    assert_refused(err, out, written, several=True)


ACCEPTED = {
    "-m norm=bn,syncbn norm.momentum=0.2": ["bn", "syncbn"],
    "-m norm.momentum=0.2 norm=choice(bn,syncbn) +norm.track_running_stats=true": ["bn", "syncbn"],
    "experiment=figure3 batch_size=8 norm=bn,syncbn norm.momentum=0.2": ["bn", "syncbn"],
    "experiment=figure3 batch_size=8 norm.eps=0.1": ["bn", "gn"],
    "-m norm=bn,gn8": ["bn", "gn"],
}


@pytest.mark.slow
@pytest.mark.parametrize("typed", ACCEPTED)
def test_a_setting_of_several_norms_goes_to_each(call, typed):
    code, _, err, report, _ = call("gnbench", typed.split(" "))
    assert code in (0, 1), err  # 1: nothing was trained
    norms = [run["config"]["norm"] for run in report["accepted"]]
    assert [norm["name"] for norm in norms] == ACCEPTED[typed]
    assert all(norm.get("momentum") == 0.2 for norm in norms) == ("momentum" in typed)


def test_parts_of_one_s_own_and_a_name_that_yaml_takes_for_true(call, tmp_path):
    (tmp_path / "norm").mkdir()
    text = "defaults: [bn]\nname: {}\n"
    (tmp_path / "norm" / "mine.yaml").write_text(text.format("mine"))
    (tmp_path / "norm" / "odd.yaml").write_text(text.format("on"))
    here = f"--config-dir={tmp_path}"
    code, _, err, report, _ = call("gnbench", [here, "norm=mine"])
    assert (code, [run["config"]["norm"]["name"] for run in report["accepted"]]) == (0, ["mine"])
    _, _, err, _, _ = call("gnbench", [here, "norm=mine", "norm.num_groups=8"])
    assert "norm=mine has no such setting, only eps" in err
    code, out, err, _, written = call("gnbench", [here, "-m", "norm=odd", "seed=0,1"])
    assert code == 2
    assert "norm.name=True: " in err
    assert "put it in quotes" in err
    assert_refused(err, out, written, several=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["norm._target_=tests.hostile.leave"],
        ["-m", "norm=bn,gn", "norm.num_groups=8"],
    ],
    ids=lambda arguments: arguments[-1],
)
@pytest.mark.slow
def test_the_real_command_does_as_the_forks_do(cli, tmp_path, arguments):
    done = cli(*arguments, check=2)
    assert_refused(done.stderr, done.stdout, list(tmp_path.iterdir()), several=False)
