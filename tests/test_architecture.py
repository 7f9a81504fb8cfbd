"""The rules between modules: who may import whom, and what importing costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modeling.run.identity import code_files, imported_files
from tests.helpers import ROOT

MODULES = sorted(path for path in (ROOT / "modeling").rglob("*.py") if path.name != "__init__.py")
ROOMS = sorted(path.parent.name for path in (ROOT / "modeling").glob("*/__init__.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
HYDRA_SCRIPTS = {"main", "prepare_data", "sample", "evaluate", "convert", "train_encoder", "search"}

# What the modules of each room import beside their own: other rooms, and of the core the named modules or all of it.
ALLOWED = {
    "core": {"system", "distributed"},
    "system": set(),
    "distributed": {"system"},
    "datasets": {"system", "core.sections", "core.stage"},
    "run": {"system", "distributed", "core"},
    "measures": {"system", "distributed", "core", "datasets.decoding"},
    "interchange": {"system", "core"},
    "comparison": {"system", "run.identity", "core.options"},
}


def room(path: Path) -> str:
    """The room of a module of the package."""
    return "core" if path.parent.name == "modeling" else path.parent.name


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_every_room_is_in_the_table():
    assert set(ALLOWED) == {"core", *ROOMS}


@pytest.mark.parametrize("name", ALLOWED)
def test_a_room_imports_what_it_may_and_needs_each_permission(name):
    found = set()
    for path in (module for module in MODULES if room(module) == name):
        for target in imported_files(path):
            other = room(target)
            if target.name == "__init__.py" or other == name:
                continue
            is_part = {f"{other}.{target.stem}", other} & ALLOWED[name] == {f"{other}.{target.stem}"}
            found.add(f"{other}.{target.stem}" if is_part else other)
    assert found == ALLOWED[name]


def test_imports_go_downward_only():
    """No module imports itself through others."""
    closures = {path: set(code_files(path)) - {path} for path in MODULES}
    assert not [path for path, files in closures.items() if any(path in closures.get(file, ()) for file in files)]


def test_the_network_and_the_diffusion_process_do_not_know_each_other():
    networks, process = {"unet", "ddpm_unet"}, {"diffusion", "schedules", "samplers"}
    for path in (path for path in MODULES if path.stem in networks | process):
        other = process if path.stem in networks else networks
        assert not other & {file.stem for file in code_files(path)}


@pytest.mark.parametrize(
    ("package", "users"),
    [
        ("hydra", {"command_line"}),
        ("omegaconf", {"command_line", "reading", "config", "stage", "values"}),
        ("pydantic", {"config", "sections", "options", "reading", "values"}),
        ("wandb", {"wandb_tracker"}),
        ("safetensors", {"checkpoint", "pipeline", "reading"}),
        ("torch_fidelity", {"extractors", "distances"}),
        ("altair", {"charts"}),
        ("vl_convert", {"page"}),
        ("jinja2", {"page"}),
        ("optuna", {"search"}),
        ("diffusers", set()),
        ("dvc", set()),
    ],
)
def test_a_library_is_known_where_it_belongs_only(package, users):
    assert {path.stem for path in [*MODULES, *SCRIPTS] if package in imports(path)} == users


def test_files_are_parsed_by_the_typed_reader_only():
    """What `json.load`, a YAML file or an array holds is checked, and an error names the file."""
    parsers = re.compile(
        r"\bjson\.loads?\(|\b(np|numpy)\.load|yaml\.\w*load|OmegaConf\.load|safe_open|load_file\(|\bcsv\.\w*[rR]eader"
    )
    paths = [*MODULES, *SCRIPTS, *(ROOT / "hydra_plugins").glob("*.py")]
    assert {path.stem for path in paths if parsers.search(path.read_text())} == {"reading"}
    # Of pickles: checkpoints and other projects' weights, and CIFAR-10's own, by an unpickler that knows three names.
    pickled = {path.stem for path in paths if re.search(r"torch\.load\(|Unpickler\(", path.read_text())}
    assert pickled == {"checkpoint", "cifar10"}


def test_no_module_hides_one_of_the_standard_library():
    assert not {path.stem for path in MODULES} & sys.stdlib_module_names


def test_no_two_modules_share_a_name():
    stems = [path.stem for path in MODULES]
    assert sorted(set(stems)) == sorted(stems)


def test_files_are_short():
    paths = [*MODULES, *SCRIPTS, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    assert not {str(path): n for path in paths if (n := len(path.read_text().splitlines())) > 250}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that are loaded after a statement in a fresh process."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_training_library_needs_torch_and_tqdm_alone():
    loaded = loaded_by("import modeling.training, modeling.heldout, modeling.checkpoint, modeling.data")
    assert not loaded & {"hydra", "omegaconf", "pydantic", "wandb", "dvc", "safetensors"}


@pytest.mark.parametrize("name", sorted(HYDRA_SCRIPTS))
def test_a_script_is_checked_before_anything_heavy_is_imported(name):
    assert not loaded_by(f"import {name}") & {"torch", "torchvision", "numpy", "wandb"}


# ---- the function that walks imports


def test_imports_are_followed_through_packages_at_any_depth(tmp_path):
    files = {
        "main.py": "import os\nfrom ours.room.inner.deep import f\nimport ours.flat\nfrom ours import constant, other",
        "ours/__init__.py": "constant = 1",
        "ours/flat.py": "def f():\n    from ours.late import g",
        "ours/late.py": "",
        "ours/other.py": "import json",
        "ours/unused.py": "",
        "ours/room/__init__.py": "",
        "ours/room/inner/__init__.py": "",
        "ours/room/inner/deep.py": "from ours.room import sibling",
        "ours/room/sibling.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {path.relative_to(tmp_path).as_posix() for path in code_files(tmp_path / "main.py", tmp_path)}
    assert found == files.keys() - {"ours/unused.py"}


@pytest.mark.parametrize("line", ["from ours.missing import f", "import ours.missing", "from ours.a.b import c"])
def test_an_import_of_ours_that_is_no_file_is_an_error(tmp_path, line):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("")
    (tmp_path / "main.py").write_text(line)
    with pytest.raises(FileNotFoundError, match=r"main\.py: imports ours\."):
        code_files(tmp_path / "main.py", tmp_path)


def test_a_relative_import_is_an_error(tmp_path):
    (tmp_path / "main.py").write_text("from . import x")
    with pytest.raises(ValueError, match="relative imports are not followed"):
        imported_files(tmp_path / "main.py", tmp_path)
