"Everything that a call must leave as it found it: a model, torch, and the library"
import contextlib, warnings

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as _module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from libragrad_nb import core
from libragrad_nb.attention_maps import aliases
from libragrad_nb.gradient_maps import methods


def _tensor(t): return id(t), None if t.is_inference() else t._version, t.requires_grad, t.is_leaf, t.grad_fn, None if t.is_meta else t.detach().clone(), t.grad, t._backward_hooks and list(t._backward_hooks)

def _module_state(m):
    own = {k: v for k, v in vars(m).items() if k not in ('_parameters', '_buffers', '_modules')}
    return {k: list(v.items()) if hasattr(v, 'items') else v for k, v in own.items()}, list(map(id, m._modules.values()))

def of_model(model):
    "Parameters, buffers, flags and every dictionary of hooks"
    parts = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    tensors = {n: _tensor(t) for n, m in parts.items() for n, t in [*m.named_parameters(n, False), *m.named_buffers(n, False)]}
    return {n: _module_state(m) for n, m in parts.items()}, tensors

def of_torch():
    "What one thread can set for all that follows, and what the library keeps"
    hooks = {k: list(v.items()) for k, v in vars(_module).items() if k.startswith('_global_') and hasattr(v, 'items')}
    flags = dict(grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled(), autocast=torch.is_autocast_enabled('cpu'),
                 low=torch.get_autocast_dtype('cpu'), cache=torch.is_autocast_cache_enabled(), dtype=torch.get_default_dtype(), device=torch.get_default_device(),
                 modes=_get_current_function_mode_stack(), dispatch=_get_current_dispatch_mode_stack(), anomaly=torch.is_anomaly_enabled(), threads=torch.get_num_threads(),
                 deterministic=torch.are_deterministic_algorithms_enabled(), saved=getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', lambda _: None)(True),
                 here=core._here.mode, rng=torch.get_rng_state(), filters=list(warnings.filters))
    return dict(hooks=hooks, **flags, tables={n: list(d.items()) for n, d in dict(libra=core.LIBRA, composites=core.COMPOSITES, constants=core.CONSTANTS,
                                                                               sets=core.rule_sets, methods=methods, aliases=aliases).items()})

def differences(a, b, path=''):
    "Where two such records differ"
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor): return [] if a is b or a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) else [path]
    if type(a) is dict and type(b) is dict and a.keys() == b.keys(): return [d for k in a for d in differences(a[k], b[k], f'{path}/{k}')]
    if type(a) in (list, tuple) and type(a) is type(b) and len(a) == len(b): return [d for k, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{path}/{k}')]
    same = a is b or (type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b)
    return [] if same else [f'{path}: {a!r} became {b!r}'[:300]]

@contextlib.contextmanager
def untouched(*models):
    "Assert that the block, whatever happens in it, leaves the models and torch as they were"
    before = [*map(of_model, models)], of_torch()
    try: yield
    finally:
        left = differences(before, ([*map(of_model, models)], of_torch()))
        assert not left, f'left behind: {left[:5]}'
