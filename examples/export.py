"""Exports a model for torch.export and ONNX, checks what the files compute, and pushes it to a hub.

    python examples/export.py finetuned/best --out exported
    python examples/export.py finetuned/best --push OWNER/NAME

The files need no tokenfusion. Batches may be of any size. --push writes no files unless --out is named, too.
"""

import argparse
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from timm.models import push_to_hf_hub
from timm.utils.onnx import onnx_forward
from torch import nn

from predict import load
from tokenfusion.cli.display import console, show, table
from tokenfusion.cli.errors import UsageError, first_line
from training import checkpoints
from training.errors import reported

_TOLERANCE = 1e-3  # of the largest output


def export(model: nn.Module, folder: Path, images: torch.Tensor) -> dict[str, tuple[Path, torch.Tensor]]:
    """The files by their format, and what each gives for the images."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        how = "pip install onnx onnxscript onnxruntime"
        raise UsageError(f"ONNX needs {error.name}, which is not installed: {how}") from None
    exported, onnx = folder / "model.pt2", folder / "model.onnx"
    try:
        program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        checkpoints.replace(exported, lambda path: torch.export.save(program, path))
        checkpoints.replace(onnx, lambda path: torch.onnx.export(program, f=path, external_data=False, verbose=False))
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever the exporters raise)
        raise UsageError(f"MODEL: PyTorch cannot export it: {first_line(error)}") from None
    return {
        "torch.export": (exported, torch.export.load(exported).module()(images)),
        "ONNX": (onnx, torch.from_numpy(onnx_forward(onnx, images))),
    }


def push(model: nn.Module, folder: Path, repository: str) -> str:
    """By timm's own function; returns the address."""
    config = checkpoints.load(folder)[1]
    described = {"model_config": {name: config[name] for name in ("label_names", "tied")}}
    described["model_args"] = config["model_args"]
    try:
        return str(push_to_hf_hub(model, repository, **described, safe_serialization=True))
    except Exception as error:  # noqa: BLE001  (whatever the hub's client raises)
        raise UsageError(f"--push: {repository}: {first_line(error)}") from None


def write(model: nn.Module, folder: Path) -> None:
    """
    Raises:
        UsageError: a file computes something else than the model.
    """
    config = resolve_model_data_config(model)
    images = torch.randn(3, *config["input_size"], generator=torch.Generator().manual_seed(0))
    expected, rows, wrong = model(images), [], []
    for name, (path, got) in export(model, folder, images).items():
        difference = ((got - expected).abs().max() / expected.abs().max()).item()
        rows.append((name, str(path), f"{path.stat().st_size / 1e6:.1f}", f"{difference:.1e}"))
        wrong += [name] if not difference <= _TOLERANCE else []
    columns = ("format", "file", "MB", "largest difference of an output")
    show(console(), table("Exported", columns, rows, numbers=columns[2:]))
    if wrong:
        raise UsageError(f"{' and '.join(wrong)}: the file computes something else")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder such as finetuned/best, or a name")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the files (default: exported)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="a repository of huggingface.co; made where there is none")
    args = parser.parse_args(arguments)
    if args.push and not Path(args.model).is_dir():
        raise UsageError(f"--push: got the model {args.model}, expected a folder such as finetuned/best")

    model, _ = load(args.model)
    if args.out or not args.push:
        write(model, args.out or Path("exported"))
    if args.push:
        console().print(push(model, Path(args.model), args.push))


if __name__ == "__main__":
    reported(main)
