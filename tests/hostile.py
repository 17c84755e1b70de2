"""A command in a forked process that trains nothing, and may change nothing but its outputs.

What it would train, and what it tried to change elsewhere, it writes down.
"""

import importlib
import json
import os
import resource
import sys
from pathlib import Path

import torch

import gnbench.__main__
import gnbench.aggregate.__main__
import gnbench.report
import gnbench.status  # noqa: F401  (the forks need these)
from gnbench.build import base_lr, build_schedule, training_length
from gnbench.check import check, check_machine
from gnbench.runs import runner
from tests.faults import FORKS, LOCK, end

FORKS.set_forkserver_preload(["tests.faults", "tests.hostile"])  # if it does not run already
MEMORY = 4 * 1024**3
SECONDS = 60  # on a busy machine; nothing should take more than one
CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "shutil.rmtree",
}  # fmt: skip
STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"}


def watch(allowed, notes):
    """Note and forbid every change outside ``allowed``, and every start of a process."""

    def hear(event, arguments):
        if event == "open":
            path, _, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            changes = isinstance(path, str | bytes) and (flags or 0) & writes
        else:
            changes = event in CHANGES
        if not changes and event not in STARTS:
            return
        if changes:
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if event == "os.mkdir" and os.path.isdir(path):  # noqa: PTH112
                return
            if path == "/dev/null" or any(
                path == folder or path.startswith(f"{folder}/") for folder in allowed
            ):
                return
        notes.append({"event": event, "arguments": [repr(a) for a in arguments]})
        raise PermissionError(f"the test forbids {event} {arguments}")

    sys.addaudithook(hear)


def _command(module, arguments, folder, allowed):
    """In the forked process: what ``python -m <module>`` does."""
    folder = Path(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with (folder / name).open("w") as file:
            os.dup2(file.fileno(), descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")
    report = (folder / "report").open("w")
    (folder / "work").mkdir()
    os.chdir(folder / "work")
    os.environ.pop("HYDRA_FULL_ERROR", None)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    accepted, changes = [], []

    def record(config):
        check(config)
        check_machine(config)
        total, schedule = training_length(config)[0], build_schedule(config)
        accepted.append(
            {
                "config": config.plain(),
                "run_id": config.run_id,
                "run_dir": str(config.run_dir),
                "rates": [base_lr(config) * schedule(s) for s in (0, total // 2, total - 1)],
                "drawn": int(torch.randint(9, (1,), generator=_seeded(config.seed))),
            }
        )
        return {"status": "completed", "result": {"test_error": 50.0}}

    runner.run = record
    runner.run_all = lambda configs: enumerate(map(record, configs))
    watch([str(folder / "work" / "outputs"), *allowed], changes)
    sys.argv = [module, *arguments]
    try:
        main = "" if module in ("gnbench.status", "gnbench.report") else ".__main__"
        importlib.import_module(f"{module}{main}").main()
    finally:
        sys.stdout.flush()
        json.dump({"accepted": accepted, "changes": changes}, report)
        report.close()


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def leave(*positional, **settings):
    """Be a component that ends the program."""
    raise SystemExit


def command(module, arguments, folder, allowed=()):
    """Run a command to its end; return its exit code, None if it hangs."""
    process = FORKS.Process(
        target=_command, args=(module, list(arguments), str(folder), list(allowed))
    )
    with LOCK:
        process.start()
    code = end(process, SECONDS)
    if code is None:
        process.kill()
        end(process)
    return code
