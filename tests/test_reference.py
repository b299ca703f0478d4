"The reference is complete: every public name has a docstring, and every parameter a comment that says what it is"
import importlib, inspect, pkgutil

import pytest
from fastcore.docments import docments

import libragrad_nb
from libragrad_nb.core import COMPOSITES, CONSTANTS, LIBRA
from libragrad_nb.gradient_maps import Method, methods

ENGINE = 'core affine activations attention layernorm gating shortcuts'.split() # every line counts there: a docstring may name a parameter instead
QUESTION = ['model', 'images', 'target', 'rules', 'of'] # what every method that runs the model is asked
MODULES = sorted(m.name for m in pkgutil.iter_modules(libragrad_nb.__path__) if not m.name.startswith('_'))
HANDLERS = [*LIBRA.values(), *COMPOSITES.values(), *CONSTANTS.values()]

def public(module):
    "Name and object of everything in `__all__` that can be called"
    m = importlib.import_module(f'libragrad_nb.{module}')
    return {name: o for name in m.__all__ if callable(o := getattr(m, name))}

def comments(o):
    "{parameter: what stands beside it}, also of the dataclasses that `o` builds on"
    bases = [c for c in reversed(inspect.getmro(o)) if c is not object] if inspect.isclass(o) else [inspect.unwrap(o)]
    return {k: v for c in bases for k, v in docments(c, returns=False, args_kwargs=True).items() if v}

def silent(module, o):
    "The parameters of which nothing is said, but for `self` and what is passed on"
    if module in ENGINE and any(o is h for h in HANDLERS): return [] # they are those of the torch function that it stands in for
    known, doc = comments(o), inspect.getdoc(o) or ''
    if any(m.runs and o is m.f for m in methods.values()) and 'of' in known: known |= dict.fromkeys(QUESTION, known['of']) # said once, for the five of them
    passed = {inspect.Parameter.VAR_POSITIONAL: 'args', inspect.Parameter.VAR_KEYWORD: 'kwargs'}
    try: asked = inspect.signature(o).parameters.values()
    except ValueError: return [] # an exception, whose arguments are those of Exception
    return [p.name for p in asked if p.name not in known and passed.get(p.kind) != p.name
            and not (module in ENGINE and f'`{p.name}`' in doc)]

@pytest.mark.parametrize('module', MODULES)
def test_every_public_name_is_explained(module):
    found = public(module)
    assert not [name for name, o in found.items() if not o.__doc__ or o.__doc__.startswith(f'{name}(')], 'no docstring' # a dataclass makes up one
    assert not {name: said for name, o in found.items() if (said := silent(module, o))}, 'parameters without a comment'

def test_what_is_missing_is_found():
    def f(
        a, # this one
        b, *args, **kwargs): "A function, and `b`"
    def g(a, b, *more): "Nothing is said of them"
    def h(model, images, target, rules, of, # as for `explain`
          steps): "It runs the model"
    assert 'model' in silent('path_maps', h)
    methods['h'] = Method('h', h, runs=True)
    try: assert silent('path_maps', h) == ['steps']
    finally: del methods['h']
    assert silent('trace', f) == ['b'] and silent('core', f) == [] and silent('trace', g) == ['a', 'b', 'more']
