"""Builds tokenfusion._C from csrc/ where that is possible, and records in _build_info.json what was built and why not.

TOKENFUSION_CPP, TOKENFUSION_CUDA: 0 leaves the part out, 1 makes it an error if it cannot be built, unset builds it if
possible. TORCH_CUDA_ARCH_LIST chooses the GPU architectures, CXX the compiler, MAX_JOBS the number of parallel jobs.
"""

import json
import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).resolve().parent)
sys.path.insert(0, "build_support")
import plan  # noqa: E402

os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]  # ninja lies beside python
NVCC = plan.find_nvcc()
if NVCC is not None:
    os.environ["CUDA_HOME"] = NVCC.home

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except Exception as error:  # also a torch that is there and broken: the package itself still installs
    torch, torch_error, BuildExtension = None, error, build_ext

CPU_SOURCES = sorted(glob("csrc/cpu/**/*.cpp", recursive=True))
KERNEL_SOURCES = [source for source in CPU_SOURCES if source.endswith("_kernels.cpp")]
HOST_SOURCES = ["csrc/bindings.cpp", *sorted(set(CPU_SOURCES) - set(KERNEL_SOURCES))]
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))
CUDA_HOST_SOURCES = sorted(glob("csrc/cuda/*.cpp"))
COMMON_FLAGS = ["-O3", "-fno-math-errno", "-fvisibility=hidden", "-g0"]


def uses_openmp() -> bool:
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


def reasons_to_leave_out() -> dict[str, str | None]:
    """Part -> None where it is to be built, otherwise the reason why not."""
    if torch is None:
        obstacle = f"torch could not be imported for the build ({torch_error})"
    else:
        obstacle = None if plan.requested("cpp") is False else plan.cpp_obstacle(uses_openmp())
    cpp = plan.reason_to_leave_out("cpp", obstacle)
    versions = (torch.__version__, torch.version.cuda) if torch else ("", None)
    return {
        "cpp": cpp,
        "cuda": plan.reason_to_leave_out("cuda", plan.cuda_obstacle(CUDA_SOURCES, cpp, *versions, NVCC)),
    }


def extension(with_cuda: bool) -> Extension:
    openmp = ["-fopenmp"] if uses_openmp() else []
    cxx = [*COMMON_FLAGS, *openmp]
    if not with_cuda:
        return CppExtension("tokenfusion._C", HOST_SOURCES, extra_compile_args={"cxx": cxx}, extra_link_args=openmp)
    return CUDAExtension(
        "tokenfusion._C",
        [*HOST_SOURCES, *CUDA_HOST_SOURCES, *CUDA_SOURCES],
        define_macros=[("TOKENFUSION_WITH_CUDA", None)],
        extra_compile_args={"cxx": cxx, "nvcc": plan.NVCC_FLAGS},
        extra_link_args=openmp,
    )


class BuildKernels(BuildExtension):
    def run(self):
        left_out = reasons_to_leave_out()
        torch_version = torch.__version__ if torch else None
        self.force = True
        self.build_temp = os.path.join(self.build_temp, f"torch-{torch_version}")
        if left_out["cuda"] is None:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", plan.DEFAULT_CUDA_ARCHS)
            left_out["cuda"] = self.compile("cuda")
        if left_out["cpp"] is None and left_out["cuda"] is not None:
            left_out["cpp"] = self.compile("cpp")
        library = Path(self.get_ext_fullpath("tokenfusion._C"))
        if left_out["cpp"] is not None:
            library.unlink(missing_ok=True)  # of an earlier build
            self.extensions = []

        cpp_built, cuda_built = left_out["cpp"] is None, left_out["cuda"] is None
        info = {
            "version": self.distribution.get_version(),
            "torch": torch_version,
            "python": platform.python_version(),
            "compiler": plan.compiler_version(plan.cpp_compiler()) if cpp_built else None,
            "platform": f"{sys.platform} {platform.machine()}",
            "sources": plan.digest_of_sources(),
            "cpp": {"built": cpp_built, "reason": left_out["cpp"], "isas": list(plan.isa_flags()) if cpp_built else []},
            "cuda": {
                "built": cuda_built,
                "reason": left_out["cuda"],
                "archs": os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";").split(";") if cuda_built else [],
                "nvcc": NVCC.version if NVCC else None,
            },
        }
        library.parent.mkdir(parents=True, exist_ok=True)
        (library.parent / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        print(plan.report(info), flush=True)

    def compile(self, part: str) -> str | None:
        """Build the extension, up to and including this part; the reason if that fails."""
        vars(self.extensions[0]).update(vars(extension(with_cuda=part == "cuda")))
        inplace, compiler = self.inplace, self.compiler  # lost by a run that raises
        try:
            super().run()
        except Exception as error:
            self.inplace, self.compiler = inplace, compiler
            cause = f"{type(error).__name__}: {error}"
            failure = f"the compilation failed ({cause}); `pip install -v` shows the compiler's output"
            print(f"tokenfusion: {plan.TITLES[part]}: {failure}", file=sys.stderr)
            return plan.reason_to_leave_out(part, failure)
        return None

    def build_extension(self, ext):
        """The instruction sets side by side where there are processors for it: each has few files, some large."""
        jobs = plan.jobs()
        at_once = min(len(plan.isa_flags()), jobs) if self.use_ninja else 1
        with plan.environment(MAX_JOBS=str(jobs // at_once)), ThreadPoolExecutor(at_once) as pool:
            ext.extra_objects = list(chain(*pool.map(self.compile_kernels, plan.isa_flags())))
        super().build_extension(ext)

    def compile_kernels(self, isa: str) -> list[str]:
        flags = [*COMMON_FLAGS, *plan.isa_flags()[isa], f"-DTOKENFUSION_ISA={isa}"]
        folder = os.path.join(self.build_temp, isa)
        return self.compiler.compile(KERNEL_SOURCES, output_dir=folder, extra_postargs=flags)


setup(ext_modules=[Extension("tokenfusion._C", HOST_SOURCES)], cmdclass={"build_ext": BuildKernels})
