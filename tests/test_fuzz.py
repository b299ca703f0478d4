"Whatever goes in: a map that adds up or a refusal in a sentence, and the model, torch and the library as they were"
import contextlib, linecache, math, random, sys, warnings

import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from kinds import vit
from libragrad_nb import completeness_error, explain, ledger, libra, methods
from libragrad_nb.core import LIBRA
from libragrad_nb.explain import Attribution, attribute
from libragrad_nb.gradient_maps import find_method
from libragrad_nb.metrics import faithfulness
from libragrad_nb.tokens import choose
from libragrad_nb.trace import trace
from untouched import untouched

pytest.importorskip('captum')
import captum.attr, sklearn.linear_model, sympy  # which change the filters of warnings when they are imported

REFUSED = (TypeError, ValueError, RuntimeError)  # NotImplementedError is a RuntimeError
QUICK = dict(steps=2, samples=3, progress=False)
TRACED = [n for n, m in methods.items() if not m.runs]
def some(n): return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def small():
    torch.manual_seed(0)
    model = vit(2)
    for p in model.parameters(): p.data += .2*torch.randn_like(p)
    return model.eval()

MODEL, X = small(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
GOOD = explain(MODEL, X, 1)
TRACE, = trace(MODEL, X, 1)
def quick(name): return {k: v for k, v in QUICK.items() if k in find_method(name)[0].options}
def usual(model=MODEL): assert torch.equal(explain(model, X, 1).map, GOOD.map)  # a call without faults, after one with faults


class Mine(Exception): "Of the user's own"

@contextlib.contextmanager
def handled(model=MODEL, *also):
    "Refusals that are allowed, and errors of the user's own, which pass through; nothing is left behind"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with untouched(model):
            try: yield
            except REFUSED as e: assert len(str(e).split()) > 3, e
            except (Mine, *also): pass

def adds_up(a, rules='libra'):
    "Whether an account closes, for those that promise it"
    for one in a.values() if isinstance(a, dict) else a if isinstance(a, list) else [a]:
        if isinstance(one, dict): adds_up(one, rules); continue
        assert isinstance(one, Attribution) and len(one) == len(one.map) == len(one.score)
        if rules in ('libra', None) and one.method in ('fullgrad_plus', 'fullgrad', 'input_x_gradient', 'pixel_x_gradient'):
            size = torch.maximum(one.score.abs(), one.map.flatten(1).abs().sum(1))
            assert (one.completeness_error.abs() <= 1e-3*size).all()


# images

DTYPES = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn]
LAYOUTS = dict(plain=lambda x: x, transposed=lambda x: x.mT, flipped=lambda x: x.flip(-1) if x.ndim else x, strided=lambda x: x[..., ::2] if x.ndim else x, expanded=lambda x: x[:1].expand_as(x) if x.ndim else x,
               channels_last=lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x, requires_grad=lambda x: x.requires_grad_() if x.is_floating_point() else x,
               sparse=lambda x: x.to_sparse(), meta=lambda x: x.to('meta'), numpy=lambda x: x.float().numpy(), list=lambda x: x.tolist(), none=lambda x: None, named=lambda x: dict(pixel_values=x),
               misnamed=lambda x: dict(x=x), nested=lambda x: torch.nested.nested_tensor([x.float()]), nan=lambda x: x*math.nan, inf=lambda x: x*math.inf, huge=lambda x: x*1e30, zeros=lambda x: x*0)
SHAPES = st.sampled_from([(2, 3, 32, 32)]*6 + [(1, 3, 32, 32), (0, 3, 32, 32), (2, 3, 1, 1), (2, 1, 32, 32), (2, 4, 32, 32), (2, 3, 31, 33), (2, 3, 64, 64), (3, 32, 32), (1, 2, 3, 32, 32), (2, 3, 32, 0),
                                                  (2, 7), (7,), (), (0,), (2, 0)])

@st.composite
def pictures(draw):
    x = torch.randn(draw(SHAPES), generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    with contextlib.suppress(*REFUSED): x = x.to(draw(st.sampled_from(DTYPES)))
    try: return LAYOUTS[draw(st.sampled_from(['plain']*6 + list(LAYOUTS)))](x)
    except REFUSED: return x

@some(90)
@given(x=pictures(), name=st.sampled_from([None, *methods]), rules=st.sampled_from([None, 'libra', 'plain', 'attnlrp']))
def test_images(x, name, rules):
    with handled():
        a = explain(MODEL, x, 1, name, rules, **(quick(name) if name else {}))
        adds_up(a, rules if name is None or methods[name].rules == 'libra' else rules or 'plain')
    if isinstance(x, torch.Tensor) and x.is_leaf: assert x.grad is None

class Mean(nn.Module):
    "It takes any picture"
    def forward(self, x): return x.float().mean((-1, -2)).expand(-1, 3)*torch.tensor([1., 2., 3.])

@some(60)
@given(x=pictures(), f=st.sampled_from([MODEL, Mean().eval(), lambda x: x, lambda x: F.gelu(x*1)]), target=st.sampled_from([None, 0, 1, lambda o: o.flatten(1).sum(1)]))
def test_books_on_any_tensor(x, f, target):
    "Errors of the model itself pass through"
    with handled(MODEL, AssertionError, IndexError):
        sheet = ledger(f, x, target)
        assert abs(sheet.completeness_error) <= 1e-2*sheet.size or sheet.leaks()
    with handled(MODEL, AssertionError, IndexError): assert libra.unknown(f, x) is not None
    dense = isinstance(x, torch.Tensor) and not x.is_nested and not x.is_meta and x.layout == torch.strided
    if dense and x.dtype == torch.float32 and x.any():
        with handled(MODEL, AssertionError, IndexError): assert isinstance(completeness_error(f, x), float)


# targets

def no_grad_inside(o): torch.set_grad_enabled(False); return o[:, 1]
def backward_inside(o): o.sum().backward(retain_graph=True); return o[:, 1]
def raises(*args, **kwargs): raise Mine
FUNCTIONS = [lambda o: None, lambda o: 1., lambda o: o, lambda o: o.sum(), lambda o: o[:1, 1], lambda o: o[:0, 1], lambda o: [o[:, 1]], lambda o: o[:, 1].detach(), lambda o: o[:, 1].detach().numpy(), lambda o: o[:, 1]*math.nan,
             lambda o: o[:, 1]*math.inf, lambda o: o.argmax(1), lambda o: o[:, 1] > 0, lambda o: o[:, 1]*1j, lambda o: torch.ones(2, requires_grad=True), lambda o: torch.ones(2, requires_grad=True)*2, lambda o: torch.zeros(2),
             lambda o: o[:, 1].to_sparse(), lambda o: o[:, 1].to('meta'), lambda o: o[:, 1].double(), lambda o: o[:, 1].half(), lambda o: o[:, 1].expand(2), lambda o: o.view(5, 2)[1], lambda o: o[0, :2], lambda: 1, int, nn.Linear(5, 1),
             raises, no_grad_inside, backward_inside, lambda o: o[:, 1], lambda o: o[:, 1]**2 - o[:, 2]]
SIMPLE = [None, 0, 1, 4, 5, -1, 10**30, True, 1., 1.5, math.nan, math.inf, 1j, '1', b'1', '', object(), {1: 2}, {1}, range(2), (), (1,), (1, 2), np.int64(1), np.int64(9), np.float32(1), np.array([1, 2]), np.array([1, None]), np.array([True, False]),
          torch.tensor(1), torch.tensor([1]), torch.tensor([1, 2]), torch.tensor([1, -2]), torch.tensor([[1, 2]]*2), torch.tensor([]), torch.tensor([1., 2.]), torch.tensor([True, False]), torch.tensor([1j, 2]), torch.tensor([1, 2], device='meta'),
          torch.tensor([1, 2]).to_sparse(), torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1, 2]).to(torch.uint16), torch.tensor([1, 2], dtype=torch.int8), nn.Parameter(torch.randn(2))]
one_target = st.sampled_from(FUNCTIONS) | st.sampled_from(SIMPLE)
TARGETS = one_target | st.lists(one_target, max_size=3)

@some(150)
@given(target=TARGETS, name=st.sampled_from([None, *methods, ['fullgrad', 'legrad', 'occlusion']]), of=st.sampled_from(['logit', 'logit', 'probability', 'x', None, 1]))
def test_targets(target, name, of):
    with handled():
        a = explain(MODEL, X, target, name, of=of, **({} if name is None or isinstance(name, list) else quick(name)))
        adds_up(a)
        for one in a if isinstance(a, list) else [a]:
            for m in one.values() if isinstance(one, dict) else [one]: assert m.score.isfinite().all() and m.map.isfinite().all() and len(m) == 2
    usual()

@some(100)
@given(target=TARGETS)
def test_targets_of_other_functions(target):
    def scores(): s, _ = choose(MODEL(X), target); assert s.ndim == 1
    for f in (lambda: ledger(MODEL, X, target), lambda: trace(MODEL, X, target), lambda: faithfulness(MODEL, X, GOOD.map, target, fractions=[.5]), scores):
        with handled(), torch.enable_grad(): f()
    usual()


# rules

def rule_that(act): return {F.layer_norm: lambda op, x, *args, **kwargs: act(op, x, *args, **kwargs)}
def fails_backward(op, x, *a, **k): out = op(x, *a, **k); out.register_hook(raises); return out
ACTS = [raises, lambda op, x, *a, **k: x[..., :1], lambda op, x, *a, **k: x[:1], lambda op, x, *a, **k: op(x.detach(), *a, **k), lambda op, x, *a, **k: op(x, *a, **k)*math.nan, lambda op, x, *a, **k: op(x, *a, **k) + 1,
        lambda op, x, *a, **k: x.mul_(0), lambda op, x, *a, **k: torch.ones_like(x, requires_grad=True), lambda op, x, *a, **k: op(x, *a, **k).double(), fails_backward, lambda op: 1]
NO_RULES = [3, 'nope', b'libra', [1], {'libra'}, (), 1., True]
RULES = [{}, {F.layer_norm: None}, {F.layer_norm: 3}, {None: raises}, {'no.such.Type': raises}, {nn.LayerNorm: raises}, {nn.Linear: raises}, {nn.Linear: lambda out, m, x: None}, {nn.Linear: lambda out, m, x: out[:1]}, {nn.Linear: lambda out, m, x: out.detach()},
         {nn.Linear: lambda out, m: out}, {**LIBRA, nn.Linear: lambda out, m, x: out}, *map(rule_that, ACTS), *({**LIBRA, **rule_that(a)} for a in ACTS)]

@some(120)
@given(rules=st.sampled_from(RULES + NO_RULES), name=st.sampled_from(TRACED + ['legrad', 'decompx', 'integrated_gradients', 'smooth_grad', 'caap', 'occlusion']))
def test_rules(rules, name):
    with handled(): assert isinstance(explain(MODEL, X, 1, name, rules, **quick(name)), Attribution)
    usual()

@some(40)
@given(rules=st.sampled_from(RULES))
def test_rules_of_other_functions(rules):
    def by_hand():
        with libra(MODEL, rules): y = MODEL(X.clone().requires_grad_())
        y.sum().backward()
    for f in (by_hand, lambda: completeness_error(MODEL, X, rules=rules), lambda: ledger(MODEL, X, 1, rules), lambda: libra.unknown(MODEL, X, rules), lambda: trace(MODEL, X, 1, rules)):
        with handled(): f()
    usual()


# methods and options

VALUES = [None, -1, 0, 1, 3, 1.5, 'x', '1', [], {}, (), True, math.nan, math.inf, 1j, b'x', object(), int, torch.tensor(1), torch.tensor([1., 2.]), np.int64(2), np.float64(.5), X, -X[0], range(2), (0, 1), (1, 0), [0, 1]]
ALL_OPTIONS = [(n, o) for n, m in methods.items() for o in m.options]
NAMES = [None, 3, '', '@', 'nope', 'fullgrad@', 'fullgrad@99', 'fullgrad@-1', 'fullgrad@x', 'fullgrad@1.5', 'fullgrad@²', 'fullgrad@--1', 'legrad@1', 'FullGrad+', [], ['fullgrad', 3], ['fullgrad']*2, [None, 'fullgrad'], ('fullgrad', 'gen_att'), {'fullgrad': 1},
         {'fullgrad'}, methods['fullgrad'], (m for m in ['fullgrad']), int, b'fullgrad', torch.tensor(1)]

@some(250)
@given(which=st.sampled_from(ALL_OPTIONS), value=st.sampled_from(VALUES))
def test_options(which, value):
    name, option = which
    with handled():
        a = explain(MODEL, X, 1, name, **{**quick(name), option: value})
        assert a.map.isfinite().all() and a.unplaced.isfinite().all() and len(a) == 2

@some(60)
@given(name=st.sampled_from(NAMES), options=st.dictionaries(st.sampled_from(['block', 'foo', 'steps', 'row', 'self', 'model']), st.sampled_from(VALUES), max_size=2))
def test_names(name, options):
    with handled(): adds_up(explain(MODEL, X, 1, name, **options) if 'model' not in options else explain(MODEL, X, 1, name, foo=1))
    with handled(): adds_up(attribute(MODEL, TRACE, name))

@some(60)
@given(value=st.sampled_from(VALUES + [GOOD.map*math.nan, GOOD.map.half(), GOOD.map[:1], GOOD.map.bool(), GOOD.map*1j, {'a': GOOD.map}, {'a': 1}]), argument=st.sampled_from(['maps', 'fractions', 'batch_size', 'drop', 'keep', 'target', 'images', 'model']))
def test_arguments_of_faithfulness(value, argument):
    if argument == 'fractions' and value is X: return
    with handled():
        f = faithfulness(**{**dict(model=MODEL, images=X, maps=GOOD.map, fractions=[.5]), argument: value})
        assert f.srg().shape == (1, 2) and f.srg().isfinite().all()

@some(40)
@given(value=st.sampled_from(VALUES))
def test_what_is_no_model_and_no_trace(value):
    with handled(): explain(value, X)
    with handled(): attribute(MODEL, value, 'fullgrad')
    with handled(MODEL): ledger(MODEL, X, 1, parts=value)


# faults at any place

class Fault(BaseException): "No `except Exception` holds it"

class Bomb(nn.Module):
    "Passes on what it gets, until it is called for the `at`-th time, or until the gradient comes back from there"
    plan = dict(at=None, back=False, error=Fault, calls=0)
    def forward(self, x):
        plan = self.plan
        plan['calls'] += 1
        if plan['at'] != plan['calls']: return x
        def go_off(*args): raise plan['error']('a fault of the model, made on purpose')
        if not plan['back']: go_off()
        if x.requires_grad: x = x*1; x.register_hook(go_off)
        return x

def mined():
    "The same model with bombs in front of its blocks, in its attention, its MLPs and its head"
    model, bomb = small(), Bomb().eval()
    model.patch_embed.norm = model.blocks[0].attn.proj_drop = model.blocks[1].mlp.norm = model.blocks[1].attn.norm = model.fc_norm = bomb
    return model

MINED = mined()
JOBS = {**{n: (lambda n=n: explain(MINED, X, 1, n, **quick(n))) for n in methods}, 'ledger': lambda: ledger(MINED, X, 1), 'unknown': lambda: libra.unknown(MINED, X), 'trace': lambda: trace(MINED, X, 1),
        'completeness_error': lambda: completeness_error(MINED, X), 'faithfulness': lambda: faithfulness(MINED, X, GOOD.map, 1, fractions=[.5])}

@some(200)
@given(job=st.sampled_from(list(JOBS)), at=st.integers(1, 24), back=st.booleans(), error=st.sampled_from([Fault, KeyboardInterrupt, IndexError, RuntimeError]))
def test_faults_of_the_model(job, at, back, error):
    Bomb.plan.update(at=at, back=back, error=error, calls=0)
    try:
        with untouched(MINED), contextlib.suppress(error): JOBS[job]()
    finally: Bomb.plan.update(at=None, calls=0)
    with untouched(MINED): assert torch.equal(explain(MINED, X, 1).map, GOOD.map)

class Breaking(torch.overrides.TorchFunctionMode):
    "The `at`-th function of torch fails"
    def __init__(self, at): super().__init__(); self.at, self.calls = at, 0
    def __torch_function__(self, op, types, args=(), kwargs=None):
        self.calls += 1
        if self.calls == self.at: raise Fault(op)
        return op(*args, **(kwargs or {}))

@some(80)
@given(job=st.sampled_from(list(JOBS)), at=st.integers(1, 600))
def test_faults_of_torch(job, at):
    with untouched(MINED), contextlib.suppress(Fault), Breaking(at): JOBS[job]()
    assert torch.equal(explain(MINED, X, 1).map, GOOD.map)

def interrupted(job, at):
    "Run `job` and press Ctrl-C at the `at`-th line of the library's own code that runs; whether it came so far"
    lines = 0
    def on_line(frame, event, arg):
        nonlocal lines
        held = event == 'line' and not _leaves_a_with(frame)
        lines += held
        if held and lines == at: raise KeyboardInterrupt
        return on_line
    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: on_line if 'libragrad_nb' in frame.f_globals.get('__name__', '') else None)
    try: job()
    except KeyboardInterrupt: return True
    finally: sys.settrace(before)
    return False

def _leaves_a_with(frame):
    "Python itself has no protection between the last line of a `with` and its exit"
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith('with')

@pytest.mark.parametrize('job', ['fullgrad_plus', 'gen_att', 'token_tm', 'legrad', 'decompx', 'integrated_gradients', 'caap', 'kernel_shap', 'ledger', 'faithfulness'])
def test_interrupts(job):
    "At 25 places in each"
    dice = random.Random(0)
    for at in [*range(1, 6), *(int(math.exp(dice.uniform(math.log(6), math.log(9000)))) for _ in range(20))]:
        with untouched(MINED): interrupted(JOBS[job], at)
    assert torch.equal(explain(MINED, X, 1).map, GOOD.map)
