"""Installation into fresh environments: with and without a compiler, with and without build isolation, broken builds.

The environments see the torch of the environment that runs the tests through a .pth file, so that nothing is
downloaded. A stand-in for csrc/, which compiles in seconds, is built; what the real sources need to be built as it is,
they are asked by themselves.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tokenfusion.kernels import extension

SITE_PACKAGES = Path(torch.__file__).parent.parent
COMPILER = (os.environ.get("CXX") or "c++").split()[0]
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER})")

BINDINGS = """
#include <Python.h>
const char* kernel_isa();
static PyObject* capability(PyObject*, PyObject*) { return PyUnicode_FromString(kernel_isa()); }
static PyMethodDef methods[] = {{"capability", capability, METH_NOARGS, nullptr}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
KERNELS = """
#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define NAME_(isa) kernel_isa_##isa
#define NAME(isa) NAME_(isa)
const char* NAME(TOKENFUSION_ISA)() { return STRING(TOKENFUSION_ISA); }
"""
HOST = """
#include <c10/core/DeviceType.h>
const char* kernel_isa_default();
const char* kernel_isa() { return c10::DeviceTypeName(c10::DeviceType::CPU).empty() ? "" : kernel_isa_default(); }
"""

SHOW_EXTENSION = """
import json
from tokenfusion import _C
from tokenfusion.kernels import extension
print(json.dumps({"file": _C.__file__, "isa": _C.capability(), "why_not": extension.why_not()}))
"""
USE_CPU_KERNEL = """
import torch, tokenfusion
query, tokens = torch.randn(2, 3, 64), torch.randn(2, 50, 64)
with tokenfusion.backend("cpu"):
    context = tokenfusion.kernels.single_query_attention(query, tokens, normalize=True)
with tokenfusion.backend("reference"):
    torch.testing.assert_close(context, tokenfusion.kernels.single_query_attention(query, tokens, normalize=True))
"""


def _load_plan():
    spec = importlib.util.spec_from_file_location("plan", ROOT / "build_support" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan"] = module
    spec.loader.exec_module(module)
    return module


plan = _load_plan()


def _environ(**changes) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TOKENFUSION_", "PYTHON"))}
    return {**kept, **changes}


def _run(command, cwd, environ=None):
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environ or _environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _checked(command, cwd, environ=None) -> str:
    done = _run(command, cwd, environ)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _copy_of_sources(folder: Path) -> Path:
    """What the package is built from, without build products and with a stand-in for csrc/."""
    products = shutil.ignore_patterns("*.egg-info", "*.so", "_build_info.json", "__pycache__")
    for name in ("build_support", "tokenfusion"):
        shutil.copytree(ROOT / name, folder / name, ignore=products)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc" / "cpu").mkdir(parents=True)
    (folder / "csrc" / "bindings.cpp").write_text(BINDINGS)
    (folder / "csrc" / "cpu" / "probe.cpp").write_text(HOST)
    (folder / "csrc" / "cpu" / "probe_kernels.cpp").write_text(KERNELS)
    return folder


class Environment:
    """A fresh virtual environment that has the packages of this one, except tokenfusion."""

    def __init__(self, folder: Path):
        _checked([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
        self.python = folder / "bin" / "python"
        self.outside = folder.parent
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site_packages = Path(_checked([self.python, "-c", query], folder).strip())
        (self.site_packages / "parent.pth").write_text(f"{SITE_PACKAGES}\n")

    def pip_install(self, *arguments, environ=None):
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--ignore-installed"]
        return _run([*pip, "-v", *arguments], self.outside, environ)

    def install(self, *arguments, environ=None) -> str:
        done = self.pip_install(*arguments, environ=environ)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def execute(self, code: str, **variables) -> str:
        return _checked([self.python, "-c", code], self.outside, _environ(**variables))

    def info(self) -> dict:
        return json.loads(_checked([self.python, "-m", "tokenfusion", "info", "--json"], self.outside))

    def extension(self) -> dict:
        return json.loads(self.execute(SHOW_EXTENSION))

    def build_record(self) -> dict:
        return json.loads((self.site_packages / "tokenfusion" / "_build_info.json").read_text())


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "venv")


@pytest.fixture
def sources(tmp_path):
    return _copy_of_sources(tmp_path / "sources")


@pytest.fixture
def no_compiler(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    return _environ(CC="/nonexistent/cc", CXX="/nonexistent/c++", PATH=str(empty))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The folder in which the wheel was built, and the wheel."""
    folder = _copy_of_sources(tmp_path_factory.mktemp("built") / "sources")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    _checked(command, folder, _environ(TOKENFUSION_CPP="1", TOKENFUSION_CUDA="0"))
    (wheel,) = (folder / "dist").glob("*.whl")
    return folder, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Environment:
    """Where the wheel was installed."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.install(built[1])
    return environment


@pytest.fixture
def library(installed):
    """The extension of the wheel that was installed, which is as it was after a test that changes it."""
    (path,) = (installed.site_packages / "tokenfusion").glob("_C.*")
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


@needs_compiler
def test_wheel_holds_package_extension_and_record(built):
    names = zipfile.ZipFile(built[1]).namelist()
    assert {"tokenfusion/__init__.py", "tokenfusion/py.typed"} <= set(names)
    assert "tokenfusion/kernels/single_query_attention/op.py" in names
    assert sum(name.startswith("tokenfusion/_C.") for name in names) == 1
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"tokenfusion"}
    record = json.loads(zipfile.ZipFile(built[1]).read("tokenfusion/_build_info.json"))
    assert record["torch"] == torch.__version__
    assert record["cpp"] == {"built": True, "reason": None, "isas": list(plan.isa_flags())}


@needs_compiler
def test_installed_wheel_runs_its_extension(installed):
    info = installed.info()
    assert info["backends"]["cpu"] == {"runs": True, "reason": None}
    assert info["isa"] == "default"


@needs_compiler
@pytest.mark.skipif(extension.why_not() is not None, reason="this checkout has no extension")
def test_installed_package_runs_the_kernels_of_this_checkout(installed, library):
    from tokenfusion import _C

    shutil.copy(_C.__file__, library)
    installed.execute(USE_CPU_KERNEL)
    assert installed.info()["isa"] in plan.isa_flags()


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not there")
@pytest.mark.parametrize("isa", plan.isa_flags())
def test_no_code_is_shared_between_instruction_sets(isa, tmp_path):
    """The linker keeps one copy of a weak function: AVX-512 code could reach a processor without it."""
    sources = sorted((ROOT / "csrc" / "cpu").rglob("*_kernels.cpp"))
    assert sources
    unoptimised = [*plan.cpp_compiler(), "-std=c++17", "-O0", *plan.isa_flags()[isa], f"-DTOKENFUSION_ISA={isa}"]
    for source in sources:  # the compiler inlines nothing of what an optimised build might not
        _checked([*unoptimised, "-c", source, "-o", "kernels.o"], tmp_path)
        weak = [line for line in _checked(["nm", "kernels.o"], tmp_path).splitlines() if line.split()[-2] in "WVu"]
        assert weak == [], source


@needs_compiler
def test_leaving_out_after_a_build_removes_the_extension(built, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    _checked(command, built[0], _environ(TOKENFUSION_CPP="0"))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "tokenfusion/_build_info.json" in names
    assert not [name for name in names if name.endswith(".so")]


@needs_compiler
def test_extension_that_cannot_load_is_not_reported_as_missing(installed, library):
    library.write_bytes(b"not a library")
    reason = installed.info()["backends"]["cpu"]["reason"]
    assert reason.startswith(f"built for torch {torch.__version__}, found torch {torch.__version__}, and cannot load (")
    installed.execute(USE_CPU_KERNEL.replace('"cpu"', '"reference"'))


@needs_compiler
def test_editable_install_finds_the_extension(sources, environment):
    environment.install("--no-build-isolation", "-e", sources, environ=_environ(TOKENFUSION_CPP="1"))
    loaded = environment.extension()
    assert loaded == {"file": str(next((sources / "tokenfusion").glob("_C.*"))), "isa": "default", "why_not": None}

    environment.install("--no-build-isolation", "-e", sources, environ=_environ(TOKENFUSION_CPP="0"))
    assert not list((sources / "tokenfusion").glob("_C.*"))
    assert environment.info()["backends"]["cpu"]["reason"] == (
        "not built: TOKENFUSION_CPP=0 was set when tokenfusion was installed"
    )


@needs_compiler
def test_isolated_build_uses_the_torch_of_the_environment(sources, environment):
    done = environment.pip_install(sources, environ=_environ(TOKENFUSION_CPP="1"))
    if "No matching distribution found for setuptools" in done.stdout:
        pytest.skip("build isolation needs setuptools and ninja from a package index, and none can be reached")
    assert done.returncode == 0, done.stdout
    info = environment.info()
    assert info["build"]["torch"] == torch.__version__
    assert info["backends"]["cpu"]["runs"]


def test_isolated_build_asks_for_torch_only_where_there_is_none(tmp_path):
    _checked([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], tmp_path)
    (tmp_path / "build_requirements").mkdir()
    for package in ("setuptools", "_distutils_hack"):
        folder = Path(importlib.util.find_spec(package).origin).parent
        (tmp_path / "build_requirements" / package).symlink_to(folder)
    path = os.pathsep.join([str(tmp_path / "build_requirements"), str(ROOT / "build_support")])
    ask = [tmp_path / "venv" / "bin" / "python", "-c"]
    ask.append("import build_backend; print(build_backend.get_requires_for_build_wheel())")
    assert _checked(ask, tmp_path, _environ(PYTHONPATH=path)).splitlines()[-1] == "['torch>=2.10']"
    with_torch = Environment(tmp_path / "with_torch")
    ask[0] = with_torch.python
    assert _checked(ask, tmp_path, _environ(PYTHONPATH=path)).splitlines()[-1] == "[]"


def test_without_a_compiler_the_package_installs_and_says_why(environment, sources, no_compiler):
    output = environment.install("--no-build-isolation", sources, environ=no_compiler)
    expected = "no C++ compiler was found: '/nonexistent/c++' is not there, as CXX says"
    assert f"C++ extension: left out: {expected}" in output
    assert not list((environment.site_packages / "tokenfusion").glob("_C.*"))
    text = _checked([environment.python, "-m", "tokenfusion", "info"], environment.outside)
    assert f"not built: {expected}" in text

    by_default = USE_CPU_KERNEL.replace('"cpu"', '"auto"') + 'print("ran by default")\n'
    failed = _run([environment.python, "-c", by_default + USE_CPU_KERNEL], environment.outside)
    assert "ran by default" in failed.stdout
    assert "backend 'cpu' cannot run here: cpu: not built: no C++ compiler" in failed.stdout


def test_without_a_compiler_insisting_fails_with_the_reason(environment, sources, no_compiler):
    done = environment.pip_install("--no-build-isolation", sources, environ={**no_compiler, "TOKENFUSION_CPP": "1"})
    assert done.returncode != 0
    assert "TOKENFUSION_CPP=1 insists on the C++ extension, but no C++ compiler was found" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_compiler_that_fails_leaves_the_extension_out(environment, sources, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'out of licences' >&2\nexit 3\n")
    compiler.chmod(0o755)
    environment.install("--no-build-isolation", sources, environ=_environ(CXX=str(compiler)))
    assert "out of licences" in environment.info()["backends"]["cpu"]["reason"]


@needs_compiler
def test_sources_that_do_not_compile_are_left_out_unless_insisted_on(environment, sources):
    (sources / "csrc" / "cpu" / "probe_kernels.cpp").write_text("#error broken\n")
    what = ["--no-build-isolation", "-e", sources]
    environment.install(*what)
    assert "the compilation failed" in environment.info()["backends"]["cpu"]["reason"]
    done = environment.pip_install(*what, environ=_environ(TOKENFUSION_CPP="1"))
    assert done.returncode != 0
    assert "TOKENFUSION_CPP=1 insists on the C++ extension, but the compilation failed" in done.stdout


def test_source_distribution_needs_no_torch_and_holds_everything(sources, tmp_path):
    (sources / "csrc" / "cpu" / "probe.h").write_text("")
    without_torch = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"
    _checked([sys.executable, "-c", without_torch, "sdist", "--formats=zip", "-d", tmp_path], sources)
    (archive,) = tmp_path.glob("*.zip")
    names = {name.partition("/")[2] for name in zipfile.ZipFile(archive).namelist()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tokenfusion").rglob("*.py")}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "build_support/plan.py", "build_support/build_backend.py"}
    wanted |= {"csrc/bindings.cpp", "csrc/cpu/probe.cpp", "csrc/cpu/probe.h", "csrc/cpu/probe_kernels.cpp"}
    assert wanted <= names


NVCC_130 = plan.Nvcc("/toolkit", "13.0")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"nvcc": plan.Nvcc("/toolkit", "13.4")}, None),
        ({"sources": []}, "no CUDA sources"),
        ({"cpp_reason": "no compiler"}, "part of the C++ extension, which is left out: no compiler"),
        ({"torch_cuda": None}, "torch 2.11.0 was built without CUDA"),
        ({"nvcc": None}, "nvcc was not found"),
        (
            {"nvcc": plan.Nvcc("/toolkit", "12.8")},
            "nvcc in /toolkit is of CUDA 12.8 and torch 2.11.0 of CUDA 13.0: their major versions must agree",
        ),
    ],
)
def test_cuda_obstacle(changes, expected):
    usual = {
        "sources": ["csrc/cuda/op.cu"],
        "cpp_reason": None,
        "torch_version": "2.11.0",
        "torch_cuda": "13.0",
        "nvcc": NVCC_130,
    }
    obstacle = plan.cuda_obstacle(**{**usual, **changes})
    assert obstacle is None if expected is None else expected in obstacle


def test_switch_leaves_out_insists_or_decides_by_itself(monkeypatch):
    monkeypatch.delenv("TOKENFUSION_CUDA", raising=False)
    assert plan.reason_to_leave_out("cuda", None) is None
    assert plan.reason_to_leave_out("cuda", "no nvcc") == "no nvcc"
    monkeypatch.setenv("TOKENFUSION_CUDA", "0")
    assert "TOKENFUSION_CUDA=0" in plan.reason_to_leave_out("cuda", None)
    monkeypatch.setenv("TOKENFUSION_CUDA", "1")
    assert plan.reason_to_leave_out("cuda", None) is None
    with pytest.raises(plan.BuildRefused, match="TOKENFUSION_CUDA=1 insists on the CUDA kernels, but no nvcc"):
        plan.reason_to_leave_out("cuda", "no nvcc")
    monkeypatch.setenv("TOKENFUSION_CUDA", "yes")
    with pytest.raises(plan.BuildRefused, match="got 'yes', expected 0"):
        plan.reason_to_leave_out("cuda", None)


def test_nvcc_is_looked_for_in_cuda_home_alone_where_it_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert plan.find_nvcc() is None


needs_nvcc = pytest.mark.skipif(
    plan.cuda_obstacle(["op.cu"], None, torch.__version__, torch.version.cuda, plan.find_nvcc()) is not None,
    reason="no nvcc that suits this torch",
)


@needs_compiler
@needs_nvcc
def test_cuda_sources_are_compiled_into_the_extension(environment, sources):
    (sources / "csrc" / "cuda").mkdir()
    (sources / "csrc" / "cuda" / "probe.cu").write_text(
        "__global__ void fill(float* x) { x[threadIdx.x] = 1; }\nvoid launch(float* x) { fill<<<1, 32>>>(x); }\n"
    )
    archs = _environ(TOKENFUSION_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    environment.install("--no-build-isolation", sources, environ=archs)
    build = environment.build_record()
    assert build["cuda"]["built"]
    assert build["cuda"]["archs"] == ["9.0+PTX"]
    assert environment.extension()["isa"] == "default"


@needs_compiler
@needs_nvcc
def test_cuda_sources_that_do_not_compile_leave_out_themselves_alone(environment, sources):
    (sources / "csrc" / "cuda").mkdir()
    (sources / "csrc" / "cuda" / "probe.cu").write_text("#error broken\n")
    environment.install("--no-build-isolation", sources)
    build = environment.build_record()
    assert "the compilation failed" in build["cuda"]["reason"]
    assert build["cpp"]["built"], build["cpp"]["reason"]
    assert environment.extension()["isa"] == "default"
