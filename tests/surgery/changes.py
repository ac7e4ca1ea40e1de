"""What people do to a model and its parts, before and after it is fused. Each returns a model where that is another."""

import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules import module as every
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.surgery.subjects import Subject

calls: list[torch.Tensor] = []  # what hooks were given, in order


def _scaled(value):
    return tree_map_only(torch.Tensor, lambda tensor: 1.1 * tensor, value)


def _noted(value):
    """value scaled, and kept in calls."""
    calls.extend(each.detach().clone() for each in tree_leaves(value) if isinstance(each, torch.Tensor))
    return _scaled(value)


def _seen(value) -> None:
    calls.extend(each.detach().clone() for each in tree_leaves(value) if isinstance(each, torch.Tensor))


def _with_scaled_result(function: Callable) -> Callable:
    return lambda *args, **kwargs: _scaled(function(*args, **kwargs))


# Changes of any part.


def forward_hook(model, part, undo):
    model.get_submodule(part).register_forward_hook(lambda module, args, out: (_seen(args), _noted(out))[1])


def forward_pre_hook(model, part, undo):
    model.get_submodule(part).register_forward_pre_hook(lambda module, args: _noted(args))


def backward_hook(model, part, undo):
    model.get_submodule(part).register_full_backward_hook(lambda module, grads, out: (_seen(out), _noted(grads))[1])


def backward_pre_hook(model, part, undo):
    model.get_submodule(part).register_full_backward_pre_hook(lambda module, grads: _noted(grads))


def forward_on_the_instance(model, part, undo):
    module = model.get_submodule(part)
    module.forward = _with_scaled_result(module.forward)


def forward_of_the_class(model, part, undo):
    kind = type(model.get_submodule(part))
    kind = getattr(kind, "original", kind)
    undo.enter_context(mock.patch.object(kind, "forward", _with_scaled_method(kind)))


def _with_scaled_method(kind: type[nn.Module], name: str = "forward") -> Callable:
    original = getattr(kind, name)

    def method(self, *args, **kwargs):
        return _scaled(original(self, *args, **kwargs))

    return method


def call_of_the_class(model, part, undo):
    kind = type(model.get_submodule(part))
    kind = getattr(kind, "original", kind)
    undo.enter_context(mock.patch.object(kind, "__call__", _with_scaled_method(kind, "__call__")))


def subclass(model, part, undo):
    module = model.get_submodule(part)
    module.__class__ = _subclass(type(module))


@functools.cache
def _subclass(kind: type[nn.Module]) -> type[nn.Module]:
    return type("Other", (kind,), {"forward": _with_scaled_method(kind)})


def accelerate_hook(model, part, undo):
    hooks = pytest.importorskip("accelerate.hooks")

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return _noted(args), kwargs

    hooks.add_hook_to_module(model.get_submodule(part), Hook())


def other_dtype(model, part, undo):
    model.get_submodule(part).to(torch.bfloat16)


def frozen(model, part, undo):
    model.get_submodule(part).requires_grad_(False)


# Changes of linear layers.


def pruned(model, part, undo):
    prune.l1_unstructured(model.get_submodule(part), "weight", amount=0.5)


def weight_norm(model, part, undo):
    parametrizations.weight_norm(model.get_submodule(part))


def old_weight_norm(model, part, undo):
    torch.nn.utils.weight_norm(model.get_submodule(part))


def spectral_norm(model, part, undo):
    torch.manual_seed(1)
    parametrizations.spectral_norm(model.get_submodule(part))


class Halving(torch.Tensor):
    """A tensor with a meaning of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        return 0.5 * out.as_subclass(torch.Tensor) if func in (F.linear, F.conv_transpose2d) else out


def weight_of_a_subclass(model, part, undo):
    module = model.get_submodule(part)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Halving))


def sparse_weight(model, part, undo):
    module = model.get_submodule(part)
    module.weight = nn.Parameter(module.weight.detach().to_sparse(), requires_grad=False)


def bias_of_a_subclass(model, part, undo):
    module = model.get_submodule(part)
    module.bias = nn.Parameter(module.bias.detach().as_subclass(Halving))


def without_bias(model, part, undo):
    model.get_submodule(part).bias = None


def longer_by_its_weight(model, part, undo):
    """As a slice of a pruner leaves it: another number of rows."""
    module = model.get_submodule(part)
    module.weight = nn.Parameter(torch.cat((module.weight, module.weight)).detach())


def weight_is_a_tensor(model, part, undo):
    module = model.get_submodule(part)
    weight = module.weight.detach()
    del module.weight
    module.weight = 1.5 * weight


def tied(model, part, undo):
    owner, _, _ = part.rpartition(".")
    same = [each for each in model.get_submodule(owner).children() if isinstance(each, nn.Linear)]
    module = model.get_submodule(part)
    for other in same:
        if other.weight.shape == module.weight.shape:
            module.weight = other.weight


# Changes of norms, dropout and heads.


def norm_swapped(model, part, undo):
    model.set_submodule(part, nn.Identity())


def norm_of_another_kind(model, part, undo):
    model.set_submodule(part, nn.RMSNorm(model.get_submodule(part).normalized_shape))


def norm_without_parameters(model, part, undo):
    model.set_submodule(part, nn.LayerNorm(model.get_submodule(part).normalized_shape, elementwise_affine=False))


def norm_eps(model, part, undo):
    model.get_submodule(part).eps = 0.3


def dropout(model, part, undo):
    model.get_submodule(part).p = 0.5


def dropout_in_training_alone(model, part, undo):
    model.eval()
    model.get_submodule(part).train().p = 0.5


def alpha_dropout(model, part, undo):
    model.set_submodule(part, nn.AlphaDropout(0.5))


def heads(model, part, undo):
    model.get_submodule(part).num_heads = 2


def heads_and_their_size(model, part, undo):
    module = model.get_submodule(part)
    module.num_heads, module.head_dim = 2, 8


def scale(model, part, undo):
    model.get_submodule(part).scale = 0.9


def own_attention(model, part, undo):
    module = model.get_submodule(part)
    module.fused_attn, module.scale = False, 0.9


def scale_of_each_head(model, part, undo):
    module = model.get_submodule(part)
    module.fused_attn, module.scale = False, nn.Parameter(torch.linspace(0.2, 1.1, 4)[:, None, None])


def pruned_heads(model, part, undo):
    """Half of the heads, as structured pruning leaves them."""
    module = model.get_submodule(part)
    torch.manual_seed(1)
    module.num_heads, module.head_dim = 2, 4
    for name, layer in module.named_children():
        if isinstance(layer, nn.Linear):
            rows, columns = layer.weight.shape
            sizes = (columns // 2, rows) if "proj" in name else (columns, rows // 2)
            module.set_submodule(name, nn.Linear(*sizes, bias=layer.bias is not None))


# Changes of the whole model.


def inputs_of_a_subclass(model, part, undo):
    model.register_forward_pre_hook(lambda module, args: (args[0].as_subclass(Halving),))
    model.register_forward_hook(lambda module, args, out: out.as_subclass(torch.Tensor))


def nothing(model, part, undo):
    pass


class _Functional(nn.Module):
    """The model with other tensors for its parameters."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        tensors = {name: 1.2 * parameter for name, parameter in self.model.named_parameters()}
        return torch.func.functional_call(self.model, tensors, (x,))


def functional_call(model, part, undo):
    return _Functional(model)


class _Twice(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.one = self.other = model

    def forward(self, x):
        return self.one(x) + self.other(0.5 * x)


def used_twice(model, part, undo):
    return _Twice(model)


def pickled(model, part, undo):
    return pickle.loads(pickle.dumps(model))


def averaged(model, part, undo):
    return ModelEmaV3(model).module


def strided_state(model, part, undo):
    state = {name: torch.stack((value, value + 9), dim=-1)[..., 0] for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def bfloat16(model, part, undo):
    return model.to(torch.bfloat16)


class _InBfloat16(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.bfloat16())


def norm_in_float32(model, part, undo):
    model.to(torch.bfloat16).get_submodule(part).float()
    return _InBfloat16(model)


def float64(model, part, undo):
    return model.double()


def channels_last(model, part, undo):
    return model.to(memory_format=torch.channels_last)


def evaluated(model, part, undo):
    model.eval()


def lora(model, part, undo):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=r".*\.(wk|wv|k|v|kv|to_kv|qkv|generate|out_proj)", init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def int8_weights(model, part, undo):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def dynamic_int8(model, part, undo):
    return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)


def offloaded(model, part, undo):
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


def gradients_of_samples(model, part, undo):
    return pytest.importorskip("opacus").GradSampleModule(model, strict=False)


class _Softer(TorchFunctionMode):
    """Attention of another temperature, however it is computed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention or func is torch.Tensor.softmax or func is F.softmax:
            args = (0.5 * args[0], *args[1:])
        return func(*args, **(kwargs or {}))


class _Coarse(TorchDispatchMode):
    """An emulator of products with a fault."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 1.1 * out if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.addmm) else out


def under_a_function_mode(model, part, undo):
    undo.enter_context(_Softer())


def under_a_dispatch_mode(model, part, undo):
    undo.enter_context(_Coarse())


def _of_another_make(name: str, owner=F) -> Callable:
    """A function of torch.nn.functional, or of owner, that somebody put there."""

    def change(model, part, undo):
        function = getattr(owner, name)
        undo.enter_context(mock.patch.object(owner, name, functools.wraps(function)(_with_scaled_result(function))))

    return change


def _call_of_all(name: str) -> Callable:
    def change(model, part, undo):
        undo.enter_context(mock.patch.object(nn.Module, name, _with_scaled_method(nn.Module, name)))

    return change


def _on_all_modules(register: Callable, hook: Callable) -> Callable:
    def change(model, part, undo):
        undo.callback(register(hook).remove)

    return change


@dataclass(frozen=True)
class Change:
    """parts says of which parts of a subject; may_fail: the plain model may raise, and then the fused one does, too.

    copies: whether a model can be copied after the change. unfuses: not where the change holds on to the fused forward
    or class, which unfuse cannot know of.
    """

    apply: Callable
    parts: Callable[[Subject], tuple[str | None, ...]]
    may_fail: bool = False
    copies: bool = True
    unfuses: bool = True
    inference: bool = False
    tolerance: float = 1e-5


def _in_model(name: str | None) -> tuple[str, ...]:
    return () if name is None else (f"module.{name}".rstrip("."),)


def _linears(subject: Subject) -> tuple[str, ...]:
    return tuple(f"module.{name}" for name in subject.linears)


def _weights(subject: Subject) -> tuple[str, ...]:
    return tuple(f"module.{name}" for name in subject.weighted)


def _biases(subject: Subject) -> tuple[str, ...]:
    return tuple(name for name in _weights(subject) if not name.endswith("mlp_c"))


def _true_linears(subject: Subject) -> tuple[str, ...]:
    return tuple(name for name in _linears(subject) if name != "module.up")


def _parts(subject: Subject) -> tuple[str, ...]:
    return subject.parts


def _own_parts(subject: Subject) -> tuple[str, ...]:
    """Those that fuse gives no other class."""
    return tuple(name for name in _linears(subject) if name != "module.up") + _norm(subject) + _dropout(subject)


def _norm(subject: Subject) -> tuple[str, ...]:
    return _in_model(subject.norm)


def _dropout(subject: Subject) -> tuple[str, ...]:
    return _in_model(subject.dropout)


def _attn(subject: Subject) -> tuple[str, ...]:
    return _in_model(subject.attn)


def _model(subject: Subject) -> tuple[str | None]:
    return (None,)


def _with_linears(subject: Subject) -> tuple[str | None, ...]:
    return (None,) if _true_linears(subject) or subject.read else ()


def _called(subject: Subject) -> tuple[str | None, ...]:
    """Where every part with weights is called, which is when they are brought."""
    return () if subject.read else (None,)


CHANGES = {
    "nothing": Change(nothing, _model),
    "forward hook": Change(forward_hook, _parts),
    "forward pre-hook": Change(forward_pre_hook, _parts),
    "backward hook": Change(backward_hook, _parts),
    "backward pre-hook": Change(backward_pre_hook, _parts),
    "forward on the instance": Change(forward_on_the_instance, _parts, unfuses=False),
    "forward of the class": Change(forward_of_the_class, _parts),
    "call of the class": Change(call_of_the_class, _parts),
    "call of all": Change(_call_of_all("__call__"), _model),
    "what calls all": Change(_call_of_all("_call_impl"), _model),
    "subclass": Change(subclass, _own_parts),
    "accelerate's hook": Change(accelerate_hook, _own_parts),
    "other dtype": Change(other_dtype, _own_parts, may_fail=True),
    "frozen": Change(frozen, _own_parts),
    "pruned": Change(pruned, _linears, copies=False),
    "weight_norm": Change(weight_norm, _weights, unfuses=False),
    "old weight_norm": Change(old_weight_norm, _linears, copies=False),
    "spectral_norm": Change(spectral_norm, _weights, unfuses=False),
    "weight of a subclass": Change(weight_of_a_subclass, _weights, copies=False),
    "bias of a subclass": Change(bias_of_a_subclass, _biases, copies=False),
    "sparse weight": Change(sparse_weight, _true_linears, may_fail=True, copies=False, inference=True),
    "without bias": Change(without_bias, _weights),
    "more rows": Change(longer_by_its_weight, _true_linears, may_fail=True),
    "weight is a tensor": Change(weight_is_a_tensor, _weights),
    "tied": Change(tied, _true_linears),
    "norm swapped": Change(norm_swapped, _norm),
    "norm of another kind": Change(norm_of_another_kind, _norm),
    "norm without parameters": Change(norm_without_parameters, _norm),
    "eps": Change(norm_eps, _norm),
    "norm in float32, the rest in bfloat16": Change(norm_in_float32, _norm, tolerance=0.03),
    "dropout": Change(dropout, _dropout),
    "dropout in training alone": Change(dropout_in_training_alone, _dropout),
    "AlphaDropout": Change(alpha_dropout, _dropout),
    "heads": Change(heads, _attn, may_fail=True),
    "heads and their size": Change(heads_and_their_size, _attn, may_fail=True),
    "scale": Change(scale, _attn),
    "own attention": Change(own_attention, _attn),
    "scale of each head": Change(scale_of_each_head, _attn),
    "pruned heads": Change(pruned_heads, _attn, may_fail=True),
    "inputs of a subclass": Change(inputs_of_a_subclass, _model),
    "functional_call": Change(functional_call, _model),
    "used twice": Change(used_twice, _model),
    "pickled": Change(pickled, _model),
    "averaged": Change(averaged, _model),
    "strided state": Change(strided_state, _model),
    "bfloat16": Change(bfloat16, _model, tolerance=0.03),
    "float64": Change(float64, _model),
    "channels_last": Change(channels_last, _model),
    "evaluated": Change(evaluated, _model),
    "LoRA": Change(lora, _with_linears),
    "int8 weights": Change(int8_weights, _with_linears, inference=True),
    "dynamic int8": Change(dynamic_int8, _with_linears, inference=True),
    "offloaded": Change(offloaded, _called, inference=True, unfuses=False),
    "gradients of samples": Change(gradients_of_samples, _with_linears, may_fail=True),
    "a function mode": Change(under_a_function_mode, _attn),
    "a dispatch mode": Change(under_a_dispatch_mode, _attn),
    "F.linear of another make": Change(_of_another_make("linear"), _model),
    "attention of another make": Change(_of_another_make("scaled_dot_product_attention"), _attn),
    "softmax of another make": Change(_of_another_make("softmax", torch.Tensor), _attn),
    "products of another make": Change(_of_another_make("__matmul__", torch.Tensor), _attn),
    "forward hook on all": Change(
        _on_all_modules(every.register_module_forward_hook, lambda module, args, out: _noted(out)), _model
    ),
    "forward pre-hook on all": Change(
        _on_all_modules(every.register_module_forward_pre_hook, lambda module, args: _seen(args)), _model
    ),
    "backward hook on all": Change(
        _on_all_modules(every.register_module_full_backward_hook, lambda module, grads, out: _noted(grads)), _model
    ),
    "backward pre-hook on all": Change(
        _on_all_modules(every.register_module_full_backward_pre_hook, lambda module, out: _noted(out)), _model
    ),
}
