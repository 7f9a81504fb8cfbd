"""The rules between modules: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

MODULES = sorted((ROOT / "modeling").glob("*.py"))
SCRIPTS = [
    ROOT / f"{name}.py"
    for name in ("main", "prepare_data", "sample", "evaluate", "convert", "compare", "train_encoder")
]
HYDRA_SCRIPTS = {path.stem for path in SCRIPTS} - {"compare"}
STANDARD = sys.stdlib_module_names

# What each module may import of ours; whoever is missing here has not been thought about.
ALLOWED = {
    "layers": set(),
    "loss_scale": set(),
    "unet": {"layers"},
    "ddpm_unet": {"layers", "unet"},
    "schedules": set(),
    "diffusion": {"schedules"},
    "samplers": {"diffusion", "runtime", "seeding"},
    "linear_denoiser": set(),
    "seeding": set(),
    "files": set(),
    "signals": set(),
    "progress": set(),
    "ema": set(),
    "shapes": set(),
    "runtime": set(),
    "config": set(),
    "options": {"config"},
    "stage": {"config"},
    "images": {"files"},
    "data": {"files", "seeding"},
    "checkpoint": {"files"},
    "tracking": {"files"},
    "cifar10": {"files", "progress"},
    "pictures": {"cifar10", "files", "progress"},
    "preparation": {"cifar10", "files", "pictures", "progress", "shapes"},
    "run_step": {"diffusion", "ema", "images", "loss_scale", "runtime", "seeding", "signals"},
    "training": {"data", "diffusion", "images", "progress", "run_step", "runtime"},
    "heldout": {"diffusion", "images", "progress", "runtime", "seeding"},
    "evaluation": {"diffusion", "images", "runtime", "seeding"},
    "sampling": {"diffusion", "files", "images", "progress", "runtime", "samplers", "seeding"},
    "interchange": {"ddpm_unet"},
    "encoder": {"checkpoint", "files", "images", "progress", "runtime", "seeding"},
    "features": {"checkpoint", "encoder", "files", "images", "progress"},
    "controls": {"features", "seeding"},
    "neighbours": {"images", "progress"},
    "comparison": set(),
    "references": {"comparison", "files", "stage"},
    "build": {"config", "data", "ddpm_unet", "diffusion", "runtime", "schedules", "seeding", "tracking", "unet"},
    "trained": {
        "build", "checkpoint", "config", "diffusion", "files", "images", "linear_denoiser", "options", "runtime",
        "sampling", "schedules",
    },
    "measures": {
        "config", "data", "evaluation", "features", "files", "heldout", "images", "neighbours", "options", "progress",
        "runtime", "sampling", "trained",
    },
    "run_folder": {"checkpoint", "files", "stage"},
    "run": {
        "build", "checkpoint", "config", "data", "ema", "files", "heldout", "progress", "run_folder", "run_step",
        "runtime", "samplers", "seeding", "stage", "tracking", "training",
    },
    "session": {
        "build", "checkpoint", "config", "files", "images", "progress", "run", "run_folder", "run_step", "signals",
        "stage", "training",
    },
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def ours(path: Path) -> set[str]:
    """The modules of this package that a file imports."""
    known = {module.stem for module in MODULES}
    return {name.split(".")[1] for name in imports(path) if name.startswith("modeling.")} & known


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem != "__init__"], ids=lambda path: path.stem)
def test_imports_go_downward_only(path):
    assert ours(path) <= ALLOWED[path.stem]


@pytest.mark.parametrize(
    ("package", "users"),
    [
        ("hydra", HYDRA_SCRIPTS),
        ("omegaconf", HYDRA_SCRIPTS | {"compare", "config", "stage"}),
        ("pydantic", {"config", "options"}),
        ("wandb", {"tracking"}),
        ("safetensors", {"checkpoint", "convert"}),
        ("torch_fidelity", {"features"}),
        ("diffusers", set()),
        ("dvc", set()),
    ],
)
def test_a_library_is_known_where_it_belongs_only(package, users):
    found = {path.stem for path in [*MODULES, *SCRIPTS] if package in {name.split(".")[0] for name in imports(path)}}
    assert found == users


def test_no_module_hides_one_of_the_standard_library():
    assert not {path.stem for path in MODULES} & STANDARD


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that are loaded after a statement in a fresh process."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_training_library_needs_torch_and_tqdm_alone():
    loaded = loaded_by("import modeling.training, modeling.heldout, modeling.checkpoint")
    assert not loaded & {"hydra", "omegaconf", "pydantic", "wandb", "dvc", "safetensors"}


@pytest.mark.parametrize("name", sorted(HYDRA_SCRIPTS))
def test_a_script_is_checked_before_anything_heavy_is_imported(name):
    assert not loaded_by(f"import {name}") & {"torch", "torchvision", "numpy", "wandb"}
