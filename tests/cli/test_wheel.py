"""The built package holds all that the repository runs with, and works away from it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from ppo_kit.sandbox.world import PROMPT_OF

ROOT = Path(__file__).parents[2]
SCRIPTS = "Scripts" if os.name == "nt" else "bin"
ELSEWHERE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ppo_kit", "recipes")


def build(kind: str, source: Path, to: Path) -> Path:
    """The wheel or sdist that the project's own build backend makes, without the network."""
    to.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(to)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return to / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files, where a build may leave its own."""
    folder = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel installed, and this one's other packages to import."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / SCRIPTS / "python"
    install = ["--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *install]
    done = subprocess.run(command, env=ELSEWHERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    # Folders that a .pth file adds are only searched; theirs are not read, so the checkout that is installed
    # in this environment is not found.
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return folder


@pytest.fixture
def run(environment: Path, tmp_path: Path):
    """``run(program, *arguments)``: a program of the environment, in another folder."""

    def start(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [environment / SCRIPTS / program, *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=ELSEWHERE, capture_output=True, text=True, timeout=600
        )

    return start


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_package_and_recipes(source, wheel):
    def files(folder: str) -> set[str]:
        found = (path for path in (source / folder).rglob("*") if path.is_file())
        return {path.relative_to(source).as_posix() for path in found}

    wanted = files("ppo_kit") | {f"ppo_kit/{name}" for name in files("recipes")}
    assert names(wheel) == wanted


def test_the_source_distribution_builds_the_same_wheel(source, wheel, tmp_path):
    archive = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert names(build("wheel", unpacked, tmp_path / "again")) == names(wheel)


def test_the_installed_command_lists_and_copies_its_recipes(run, environment, tmp_path):
    imported = run("python", "-c", "import ppo_kit; print(ppo_kit.__file__)").stdout.strip()
    assert Path(imported).is_relative_to(environment)
    listed = run("ppo-kit", "list")
    assert listed.returncode == 0, listed.stderr
    for recipe in (ROOT / "recipes").glob("*.py"):
        assert f" {recipe.stem} " in listed.stdout
        assert run("ppo-kit", "copy", recipe.stem).returncode == 0
        assert (tmp_path / recipe.name).read_text() == recipe.read_text()
    helped = run("python", "-X", "importtime", "ppo_max.py", "--help")
    assert "--kl-coef FLOAT" in helped.stdout
    assert not {"torch", "transformers"} & {
        line.rpartition("| ")[2].strip() for line in helped.stderr.split("\n")
    }


def test_a_recipe_and_a_variant_of_it_run_away_from_the_repository(run, tmp_path, save_sandbox_models):
    save_sandbox_models(tmp_path, layers=1)
    with gzip.open(tmp_path / "prompts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in list(PROMPT_OF)[:30])
    (tmp_path / "tiny.yaml").write_text(
        "policy: policy\nreward: reward\nprompts: prompts.jsonl.gz\nsteps: 1\nrollout_size: 4\n"
        "minibatch_size: 4\nmax_new_tokens: 4\nheld_out: 4\ncritic_pretrain_steps: 1\nptx_coef: 0\n"
    )
    done = run("ppo-kit", "ppo_max", "--config", "tiny.yaml", "--out", "first")
    assert done.returncode == 0, done.stderr
    assert run("ppo-kit", "copy", "ppo_max", "--to", "mine.py").returncode == 0
    text = (tmp_path / "mine.py").read_text()
    assert "KLPenalty(cfg.kl_coef)" in text
    (tmp_path / "mine.py").write_text(text.replace("KLPenalty(cfg.kl_coef)", "KLPenalty(3 * cfg.kl_coef)"))
    done = run("ppo-kit", "mine.py", "--config", "first/config.json", "--out", "second")
    assert done.returncode == 0, done.stderr
    first, second = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("first", "second")
    )
    assert second["kl_coef"] == pytest.approx(3 * first["kl_coef"])
