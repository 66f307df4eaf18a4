"""The wheel holds the whole product: every module imports and every asset is there without the source tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

_IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import ditq
assert ditq.__file__.startswith(sys.argv[1]), ditq.__file__
names = [m.name for m in pkgutil.walk_packages(ditq.__path__, "ditq.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
from ditq.checkpoint import BUILT_IN
from ditq.calibration.prompts import builtin_prompts
from ditq.recipe import load_recipe, shipped_recipes
for folder in BUILT_IN.values():
    assert (folder / "model_index.json").is_file(), folder
    assert (folder / "README.md").is_file(), folder
assert len(builtin_prompts("vbench")) > 900
assert {load_recipe(name).name for name in shipped_recipes()} >= {"w4a8", "w8a8"}
print(len(names))
"""


def test_the_wheel_holds_every_module_and_asset(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("ditq", "calibration", "export"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels = tmp_path / "wheels"
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    command = [sys.executable, "-I", "-c", _IMPORT_ALL, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40
