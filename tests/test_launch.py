"""The launchers: what they would run, and that arguments reach the workers as they were typed."""

import os
import pathlib
import shlex
import stat
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
AWKWARD = [
    "--config=configs/tpu_pod.py",
    '--config.data.path=a b\'s "c"',
    "--workdir=gs://bucket/$HOME;echo x",
]


def launch(script, *arguments, **environment):
    """Runs a launcher with these variables alone, so that the machine's own do not leak in."""
    path = f"{environment.pop('PATH', '')}:{os.environ['PATH']}".strip(":")
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env={"PATH": path, "HOME": "/", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def write_program(path, body):
    path.write_text(body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_tpu_dry_run_prints_the_command_and_runs_nothing():
    result = launch(
        "tpu_vm.sh", "--dry-run", "train", *AWKWARD, TPU_NAME="pod", ZONE="us-east5-a", PROJECT="p"
    )
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert {"--zone=us-east5-a", "--worker=all", "--project=p"} < set(words)
    remote = shlex.split(words[-1].removeprefix("--command="))
    assert remote == [
        *["cd", "jaxrec", "&&", "env", "JAXREC_DISTRIBUTED=1", ".venv/bin/python", "-m", "jaxrec.train"],
        *AWKWARD,
    ]


def test_tpu_workers_get_the_arguments_and_the_environment(tmp_path):
    """A stand-in for gcloud runs the command as a worker's shell would."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "jaxrec/.venv/bin").mkdir(parents=True)
    write_program(
        tmp_path / "bin/gcloud",
        f'#!/bin/bash\ncd {shlex.quote(str(tmp_path))}\nlast=${{!#}}\nexec bash -c "${{last#--command=}}"\n',
    )
    write_program(
        tmp_path / "jaxrec/.venv/bin/python",
        f"#!{sys.executable}\nimport os, sys\nprint(os.environ['XLA_FLAGS'])\nprint(repr(sys.argv[1:]))\n",
    )
    result = launch(
        "tpu_vm.sh",
        "train",
        *AWKWARD,
        PATH=str(tmp_path / "bin"),
        TPU_NAME="pod",
        ZONE="z",
        XLA_FLAGS="--a --b=c d",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["--a --b=c d", repr(["-m", "jaxrec.train", *AWKWARD])]


def test_tpu_setup_copies_the_checkout_and_installs_on_every_worker():
    result = launch("tpu_vm.sh", "--dry-run", "setup", TPU_NAME="pod", ZONE="us-east5-a")
    assert result.returncode == 0, result.stderr
    archive, copy, install = result.stdout.splitlines()
    assert archive.startswith("git archive")
    assert "tpu-vm scp" in copy
    assert "--worker=all" in copy
    assert "make -C jaxrec install EXTRAS=tpu" in shlex.split(install)[-1]


def test_gpu_dry_run_prints_the_command_and_runs_nothing():
    result = launch("gpu_box.sh", "--dry-run", "train", *AWKWARD)
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    assert words[:2] == ["exec", "env"]
    assert "JAX_PLATFORMS=cuda,cpu" in words
    assert words[-len(AWKWARD) - 3 :] == [".venv/bin/python", "-m", "jaxrec.train", *AWKWARD]
    assert shlex.split(launch("gpu_box.sh", "--dry-run", "setup").stdout) == [
        "make",
        "install",
        "EXTRAS=cuda",
    ]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gpu_box.sh"])
def test_no_arguments_print_the_usage(script):
    result = launch(script)
    assert result.returncode == 2
    assert "--dry-run" in result.stderr


@pytest.mark.parametrize(("missing", "given"), [("TPU_NAME", {"ZONE": "z"}), ("ZONE", {"TPU_NAME": "t"})])
def test_a_missing_variable_is_named(missing, given):
    result = launch("tpu_vm.sh", "--dry-run", "train", **given)
    assert result.returncode != 0
    assert f"set {missing}" in result.stderr


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_is_clean(script):
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
