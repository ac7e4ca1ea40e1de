"""nn.ConvTranspose2d in a decoder, whose result becomes one operator with the concatenation that follows."""

import torch
from torch import nn

from tokenfusion.kernels.checks import symbolic
from tokenfusion.kernels.upconv.arguments import SCALES
from tokenfusion.kernels.upconv.concat.op import OPERATOR
from tokenfusion.layers import settled
from tokenfusion.layers.deferred import defer, only_runs
from tokenfusion.layers.drop_in import DropIn, why_not_part

_LEAST_WORTHWHILE = 1 << 16  # elements of a result; with fewer, deferring it takes longer than the concatenation saves


class ConvTranspose2d(DropIn, nn.ConvTranspose2d):
    """A transposed convolution whose kernel is its stride, computed when its result is asked for.

    Takes and holds what nn.ConvTranspose2d does. Where a kernel runs, the result is a tensor that does not exist yet:
    torch.cat of it with a skip connection runs upconv_concat, and anything else computes it (see `deferred.py`), at
    the latest the return of the model that was fused. Where none runs, where it is that model itself or outside of that
    model's forward, for small results, with hooks, sharded by FSDP, under torch.compile, tracing, function transforms
    and modes, the convolution runs at once. An inference tensor is copied, since it does not tell of changes.
    """

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        k = module.kernel_size[0]
        if module.kernel_size != (k, k) or module.stride != (k, k):
            return f"it has kernel {module.kernel_size} and stride {module.stride}, expected k x k with stride k"
        if k not in SCALES:
            return f"it has kernel {module.kernel_size}, expected one of {', '.join(map(str, SCALES))}"
        expected = (("padding", (0, 0)), ("output_padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1))
        for name, value in (*expected, ("padding_mode", "zeros")):
            if getattr(module, name) != value:
                return f"it has {name} {getattr(module, name)}, expected {value}"
        reason = why_not_part(module, "it", nn.ConvTranspose2d, ConvTranspose2d)
        weight = module._parameters.get("weight")
        if reason is None and (weight is None or weight.size() != (module.in_channels, module.out_channels, k, k)):
            got = "no parameter" if weight is None else list(weight.shape)
            reason = f"it has weight {got}, expected [{module.in_channels}, {module.out_channels}, {k}, {k}]"
        return reason

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """[B, Cin, h, w] -> [B, Cout, k h, k w]."""
        if torch.jit.is_scripting():
            return self.plain_forward(input, output_size)
        at_once = settled.settles(self) or "_is_fsdp_managed_module" in vars(self)  # which takes the weight away
        at_once = at_once or output_size is not None or not only_runs() or not settled.may_defer()
        if at_once or not self.fuses() or not self._is_served(input):
            if output_size is not None and symbolic(input):  # whose padding only a call can tell
                return self.as_leaf((input,), {"output_size": output_size})
            return super().forward(input, output_size)
        if input.is_inference():  # it does not tell of changes; a copy costs less than the concatenation saves
            input = input.clone()
        return defer(input, self.weight, self.bias)

    def _is_served(self, x: torch.Tensor) -> bool:
        weight = self.weight
        if type(x) is not torch.Tensor or x.dim() != 4 or x.numel() == 0 or x.shape[1] != self.in_channels:
            return False
        if x.numel() // self.in_channels * self.out_channels * self.kernel_size[0] ** 2 < _LEAST_WORTHWHILE:
            return False
        if x.device != weight.device or weight.is_inference():
            return False
        if x.is_inference() and not torch.is_inference_mode_enabled():
            return False
        if x.dtype != weight.dtype and not (torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64):
            return False
        return OPERATOR.select(x, weight).backend != "reference"
