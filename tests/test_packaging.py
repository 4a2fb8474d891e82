"""What is installed, under which names, and that the documented examples run."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import mtkd_fast

ROOT = Path(__file__).parent.parent
SETUP = ast.parse((ROOT / "setup.py").read_text())


def setup_argument(name: str):
    (call,) = [n for n in ast.walk(SETUP) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup"]
    return ast.literal_eval({keyword.arg: keyword.value for keyword in call.keywords}[name])


def in_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_version_is_one_number_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mtkd_fast.__version__)
    assert "version" in (ROOT / "pyproject.toml").read_text().split("dynamic")[1].splitlines()[0]


def test_the_top_level_name_kernels_stays_free():
    """Hugging Face owns it; ours are mtkd_fast.kernels and mtkd_fast.bench."""
    code = (
        "import sys, mtkd_fast, mtkd_fast.kernels, mtkd_fast.bench, importlib.util; "
        "print('kernels' in sys.modules, 'bench' in sys.modules, importlib.util.find_spec('kernels'))"
    )
    kernels, bench, spec = in_python(code).split(" ", 2)
    assert (kernels, bench) == ("False", "False")
    assert str(ROOT) not in spec


def test_every_package_is_mapped_to_a_folder():
    folders = setup_argument("package_dir")
    assert folders == {"mtkd_fast.kernels": "kernels", "mtkd_fast.bench": "bench"}
    for package in setup_argument("packages"):
        folder = package.replace(".", "/")
        for name, there in folders.items():
            folder = re.sub(f"^{name.replace('.', '/')}(?=/|$)", there, folder)
        assert (ROOT / folder / "__init__.py").exists(), f"{package}: {folder} is no package"


def test_every_folder_with_python_code_is_installed():
    installed = set(setup_argument("packages"))
    found = {"mtkd_fast." + path.parent.name for path in (ROOT / "mtkd_fast").glob("*/__init__.py")}
    for path in (ROOT / "bench").rglob("__init__.py"):
        found.add(".".join(("mtkd_fast", *path.parent.relative_to(ROOT).parts)))
    assert found | {"mtkd_fast.kernels", "mtkd_fast.bench"} == installed - {"mtkd_fast"}


def test_the_command_is_a_function_that_is_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["mtkd-fast"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_page_of_the_benchmark_is_installed():
    assert [(ROOT / "bench" / name).exists() for name in setup_argument("package_data")["mtkd_fast.bench"]] == [True]


def test_types_are_announced():
    assert (Path(mtkd_fast.__file__).parent / "py.typed").exists()
    assert "py.typed" in setup_argument("package_data")["mtkd_fast"]


def test_torch_is_no_build_requirement():
    requires = (ROOT / "pyproject.toml").read_text().split("[build-system]")[1].split("]")[0]
    assert "torch" not in requires


def test_the_kernels_never_import_the_library():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not node.module.startswith("mtkd_fast"), path
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("mtkd_fast") for name in node.names), path


def test_the_import_starts_no_triton_and_no_gpu():
    """Importing is cheap: Triton is loaded by the first call that needs it."""
    assert in_python("import sys, mtkd_fast; print('mtkd_fast.triton_ops' in sys.modules)") == "False"


@pytest.mark.parametrize("value", ["", "0"])
def test_without_the_interpreter_cpu_tensors_are_refused_by_triton(value):
    code = f"""
import os
os.environ["TRITON_INTERPRET"] = {value!r}
import mtkd_fast, torch
try:
    mtkd_fast.multi_teacher_kd_loss(torch.zeros(2, 3), [torch.zeros(2, 3)], implementation="triton")
except ValueError as error:
    print(error)
"""
    if "triton is not installed" in mtkd_fast.implementations()["triton"].note:
        pytest.skip("Triton is not installed")
    assert "CPU tensors need TRITON_INTERPRET=1" in in_python(code)


def modules():
    """All of ours but the extension, and what only Triton or the benchmark can import."""
    names = ["mtkd_fast"]
    for package in (mtkd_fast, importlib.import_module("mtkd_fast.losses")):
        names += [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if not name.endswith(("_C", "triton_ops", "kernels", "bench"))]


@pytest.mark.parametrize("name", modules())
def test_documented_examples_run(name):
    module = importlib.import_module(name)
    examples = {"torch": torch, "mtkd_fast": mtkd_fast, **vars(mtkd_fast)}
    failed, _ = doctest.testmod(module, extraglobs=examples, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_every_public_function_and_class_shows_an_example():
    for name in mtkd_fast.__all__:
        public = getattr(mtkd_fast, name)
        if inspect.isfunction(public) or (inspect.isclass(public) and issubclass(public, torch.nn.Module)):
            assert ">>>" in public.__doc__, f"{name} has no example"


def test_the_readme_is_finished():
    readme = (ROOT / "README.md").read_text()
    assert not re.findall(r"@[A-Z]+@", readme)
    for image in re.findall(r"!\[.*?\]\((.+?)\)", readme):
        assert (ROOT / image).exists(), image


def test_the_method_in_contributing_runs():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = text[text.index("## Adding a method") :].split("```python\n")[1].split("```")[0]
    found = {}
    exec(code, found)
    student = torch.randn(8, 10, requires_grad=True)
    found["SharpKDLoss"]()(student, torch.randn(3, 8, 10), torch.randint(10, (8,))).backward()
    assert student.grad.abs().sum() > 0
