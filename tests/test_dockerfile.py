"""The Dockerfile, read and its steps done by hand; compose.yaml and prefect.yaml, read."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.recipe import Recipe

ROOT = Path(__file__).parents[1]
UNTESTED = {"autoawq"}  # no part of `dev`: it draws triton; its tests run where it is installed
COMPILERS = {"build-essential", "gcc", "g++", "clang", "make", "cmake", "apt-get", "apk"}


def _stages():
    """The Dockerfile's stages: lists of (instruction, rest), continued lines joined and comments dropped."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    stages = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, _, rest = line.strip().partition(" ")
            if instruction == "FROM":
                stages.append([])
            stages[-1].append((instruction, rest.strip()))
    return stages


def _sources(stage):
    """What a stage copies from the build context."""
    copies = [shlex.split(rest) for instruction, rest in stage if instruction in ("COPY", "ADD")]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def _installs():
    """Every pip install of the build, as its words."""
    steps = [step for stage in _stages() for name, rest in stage if name == "RUN" for step in rest.split("&&")]
    return [shlex.split(step) for step in steps if "pip install" in step]


def _pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_image_is_slim_and_has_no_build_tools():
    last = _stages()[-1]
    assert last[0] == ("FROM", "python:3.11-slim")
    words = {word for name, rest in last if name == "RUN" for word in re.split(r"[\s&;|]+", rest)}
    assert not words & COMPILERS


def test_the_image_does_not_run_as_root():
    users = [rest for name, rest in _stages()[-1] if name == "USER"]
    assert users
    assert users[-1].split(":")[0] not in ("root", "0")
    made = " ".join(rest for name, rest in _stages()[-1] if name == "RUN")
    assert f"useradd --create-home --uid 10001 {users[-1]}" in made


def test_the_image_starts_the_command_with_telemetry_off():
    last = dict(_stages()[-1])
    assert last["ENTRYPOINT"] == '["requant"]'
    assert {"DO_NOT_TRACK=1", "PREFECT_SERVER_ANALYTICS_ENABLED=false"} <= set(last["ENV"].split())


def test_the_image_copies_the_venv_to_where_it_was_made():
    """A venv's scripts name their interpreter by its full path."""
    made = next(step for name, step in _stages()[0] if "-m venv" in step).split()[-1]
    assert ("COPY", f"--from=build {made} {made}") in _stages()[-1]
    assert dict(_stages()[-1])["ENV"].split()[0] == f"PATH={made}/bin:$PATH"


def test_everything_that_is_copied_is_in_the_repository_and_not_ignored():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in (source for stage in _stages() for source in _sources(stage)):
        assert (ROOT / source).exists(), source
        assert source in allowed


def test_every_install_is_held_by_the_constraints_and_torch_is_pinned():
    installs = _installs()
    assert installs
    for words in installs:
        assert words[words.index("--constraint") + 1] == "constraints.txt"
    assert "torch" in installs[0]
    assert _pins()["torch"] == "2.13.0"


def test_every_requirement_is_pinned_within_its_range_and_installed_at_its_pin():
    """What the image would install is what is tested here; a local version such as +cpu is the same release."""
    project, pins = _project(), _pins()
    named = [Requirement(text) for text in project["dependencies"]]
    named += [Requirement(text) for extra in project["optional-dependencies"].values() for text in extra]
    assert len(named) > 20
    for requirement in named:
        name = canonicalize_name(requirement.name)
        if name == "requant":
            continue
        assert name in pins, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is not {requirement.specifier}"
        if name not in UNTESTED:
            assert importlib.metadata.version(name).split("+")[0] == pins[name]


def test_what_is_installed_fits_together():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_wheel_of_what_the_build_stage_copies_installs_and_starts(tmp_path):
    """The build's last step, without its dependencies: the same files, a wheel, an empty folder, the command."""
    context, wheels, installed = (tmp_path / name for name in ("context", "wheels", "installed"))
    context.mkdir()
    for source in _sources(_stages()[0]):
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, context / source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", wheels, context]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = wheels.iterdir()
    install = [*pip, "install", "--no-deps", "--no-index", "--target", installed, wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    # -P and another folder: what starts is the wheel, not this checkout.
    start = f"import sys; sys.path.insert(0, {str(installed)!r}); import flows.cli; print(flows.cli.__file__); "
    start += "sys.argv = ['requant', '--help']; flows.cli.main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", start], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed / "flows" / "cli.py"))
    assert "plan" in done.stdout


def test_compose_starts_a_server_on_postgres_and_a_worker_of_the_deployments_pool():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = compose["services"]
    server, worker = services["server"], services["worker"]
    assert server["build"] == "."
    assert worker["image"] == server["image"]
    url = server["environment"]["PREFECT_API_DATABASE_CONNECTION_URL"]
    assert url.startswith("postgresql+asyncpg://")
    assert url.endswith("@database:5432/prefect")
    assert services["database"]["image"].startswith("postgres:")
    assert worker["environment"]["PREFECT_API_URL"] == "http://server:4200/api"
    (deployment,) = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert f"prefect worker start --pool {deployment['work_pool']['name']}" in worker["command"][0]
    for service in (server, worker):
        assert service["environment"]["DO_NOT_TRACK"] == "1"
        assert service["environment"]["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    named = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert {name for name in named if not name.startswith(".")} == set(compose["volumes"])


def test_nothing_but_this_machine_reaches_the_server_of_compose():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:4200:4200"]


def test_the_deployments_recipe_is_a_recipe_and_its_flow_is_there():
    (deployment,) = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert Recipe.model_validate(deployment["parameters"]["recipe"]).quantize
    path, _, name = deployment["entrypoint"].partition(":")
    assert f"def {name}(recipe: Recipe)" in (ROOT / path).read_text()


def test_the_hooks_run_what_make_check_runs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    makefile = (ROOT / "Makefile").read_text()
    (check,) = re.findall(r"^check: setup\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in check.splitlines()]
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
