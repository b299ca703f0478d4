"The books balance for whole models and for odd ones, and `ledger` says so where it cannot keep them"
import copy, gc

import numpy as np, pytest, timm, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from libragrad_nb import ledger, libra, only, water_level
from libragrad_nb.core import LIBRA, CONSTANTS, completeness_error
from libragrad_nb.ledger import Book, _Held
from libragrad_nb.zoo import load

F64 = torch.float64


def noisy(name, **kw):
    "A timm model with random weights and no constant at zero"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kw).eval()
    for p in model.parameters():
        if p.ndim < 2 or not p.any(): nn.init.normal_(p, std=.2)
    return model


class Toy(nn.Module):
    "[B, 4, 6] -> [B, 3] with something odd in between"
    def __init__(self, odd):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.odd = nn.Linear(6, 6), nn.Linear(6, 3), odd
    def forward(self, x): return self.b(self.odd(self.a(x))).mean(1)


def toy(odd): return Toy(odd).to(F64).eval()


@pytest.fixture
def x(): return torch.randn(2, 4, 6, dtype=F64, generator=torch.Generator().manual_seed(1))


def kinds(sheet): return {r.operation for r in sheet.leaks()}


# --- whole models: `ledger` raises where its books do not balance, so running it is half of each test

@pytest.mark.parametrize('name, size', [
    ('vit_tiny_patch16_224', 224), ('eva02_tiny_patch14_224', 224), ('resnet18', 64), ('efficientnet_b0', 64), ('mobilenetv3_small_050', 64),
    ('convnext_atto', 64), ('swin_tiny_patch4_window7_224', 224), ('xcit_nano_12_p16_224', 224), ('coatnet_nano_rw_224', 224)])
def test_models(name, size):
    model, x = noisy(name).double(), torch.randn(2, 3, size, size, dtype=F64)
    with torch.no_grad(): stock = model(x)
    plain, balanced = (ledger(model, x, 3, rules) for rules in ('plain', 'libra'))
    assert np.isclose(plain.score, stock[:, 3].sum().item(), rtol=1e-12)
    assert not balanced.leaks() and abs(balanced.completeness_error) < 1e-12*balanced.size
    if name != 'resnet18': assert plain.leaks()
    f = lambda x: model(x)[:, 3].sum()[None]
    for sheet in (plain, balanced):
        relative = completeness_error(f, x, torch.ones(1), rules=sheet.rules)
        assert np.isclose(sheet.completeness_error/abs(sheet.score), relative, atol=1e-10*sheet.size/abs(sheet.score))


@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-5), (torch.bfloat16, .1)])
def test_other_precisions(dtype, bound):
    model, x = noisy('vit_tiny_patch16_224').to(dtype), torch.randn(1, 3, 224, 224, dtype=dtype)
    sheet = ledger(model, x, 3)
    assert not sheet.leaks() and abs(sheet.completeness_error) < bound*sheet.size


def test_autocast():
    model, x = load('vit_digits'), torch.randn(1, 3, 64, 64)
    with torch.autocast('cpu', torch.bfloat16):
        with torch.no_grad(): stock = model(x)[0, 3]
        assert ledger(model, x, 3).score == stock.item()


def test_presets_and_own_tables():
    model, x = load('vit_digits').double(), torch.randn(1, 3, 64, 64, dtype=F64)
    assert kinds(ledger(model, x, 3, only('layernorm'))) == {'gelu', 'scaled_dot_product_attention'}
    assert kinds(ledger(model, x, 3, 'alilrp')) == {'gelu'}
    assert kinds(ledger(model, x, 3, {F.gelu: LIBRA[F.gelu]})) == {'layer_norm', 'scaled_dot_product_attention'}


# --- it leaves no trace

def test_leaves_model_and_caller_alone(x):
    model = toy(nn.GELU())
    before, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad(): sheet = ledger(model, x, 0)
    with torch.inference_mode(): assert ledger(model, x.clone(), 0).score == sheet.score
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not x.requires_grad and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_after_an_exception(x):
    def broken(h): raise KeyError('no')
    model = toy(broken)
    with pytest.raises(KeyError): ledger(model, x, 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    y = F.gelu(x.requires_grad_())
    assert 'Gelu' in y.grad_fn.name()  # no mode is left on


def test_a_value_is_let_go_when_it_is_booked(x, monkeypatch):
    "The books hold one value for each edge, and every entry of the backward pass frees its own"
    def held(): return sum(type(o) is _Held and o.value is not None for o in gc.get_objects())
    counts, post = [], Book.post
    def spy(*args):
        post(*args)
        counts.append(held())
    monkeypatch.setattr(Book, 'post', spy)
    before = held()
    ledger(toy(lambda h: h.sigmoid()*h + h.tanh()), x, 0)
    assert counts == [before + n for n in range(len(counts))][::-1] and len(counts) > 8


# --- odd code

def rms_by_hand(h):
    v = h.clone()
    v.pow_(2)
    return h*torch.rsqrt(v.mean(-1, keepdim=True) + 1e-6)

def buffer(h):
    out = torch.ones(2, 5, 6, dtype=h.dtype)
    out[:, :2], out[:, 3:] = h[:, :2], h[:, 2:]
    out[:, 1].mul_(3)
    return out

def unpack(h):
    a, b = h
    c, *_ = torch.stack([a, b]).sigmoid().mul(h).split(2, 1)
    return c.transpose(0, 1).reshape(2, 2, 6)

def overlapping(h):
    h = h*1
    v, w = h[:, 1:3], h[:, 2:]
    v.mul_(3.)
    w += v.clone()
    return h

def module_list(h): return sum(torch.unbind(h, 1)).unsqueeze(1).expand(-1, 4, -1).contiguous().to(h.dtype)

def flags(h):
    h = F.relu(F.hardtanh(h + 0, -1., 1., True), inplace=True)
    return F.silu(F.dropout(h, .5, False, True), inplace=True)

def integers(h):
    where = h.argmax(-1, keepdim=True)
    return h.gather(-1, where) + h.scatter(-1, where, 0.).cumsum(-1) + h*where

def complex_numbers(h): return torch.fft.ifft(torch.fft.fft(h, dim=1)*(2 + 1j), dim=1).real


@pytest.mark.parametrize('odd', [rms_by_hand, buffer, unpack, overlapping, module_list, flags, integers, complex_numbers],
                         ids=lambda f: f.__name__)
def test_odd_code(odd, x):
    model = toy(odd)
    with torch.no_grad(): stock = model(x)[:, 0].sum().item()
    for rules in ('plain', 'libra'):
        sheet = ledger(model, x, 0, rules)
        assert np.isclose(sheet.score, stock, rtol=1e-13)
    assert not sheet.leaks() and abs(sheet.completeness_error) < 1e-12*sheet.size


def test_a_module_used_twice_has_two_rows(x):
    act = nn.Tanh()
    model = toy(nn.Sequential(act, nn.Linear(6, 6), act))
    sheet = ledger(model, x, 0, 'plain')
    rows = [r for r in sheet.rows if r.operation == 'tanh']
    assert len(rows) == 2 and rows[0].residual != rows[1].residual


def test_in_place_in_name_only(x):
    "Dropout in place changes nothing in evaluation mode, and autograd may still need what it was given"
    sheet = ledger(toy(lambda h: F.dropout(h.softmax(-1), 0., False, True)*h), x, 0, 'plain')
    assert kinds(sheet) == {'softmax', 'mul'}


def test_paths_and_blocks():
    model = load('mixer_digits')
    sheet = ledger(model, torch.randn(1, 3, 64, 64), 3, 'plain')
    gelu = [r for r in sheet.rows if r.operation == 'gelu']
    assert gelu[0].module.startswith('blocks.0.') and {r.block for r in gelu} == {f'blocks.{i}' for i in range(len(model.blocks))}
    assert set(sheet.by('module').index) >= {r.module for r in gelu}


# --- opaque code

class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x*x.sigmoid()
    @staticmethod
    def backward(ctx, g):
        s = ctx.saved_tensors[0].sigmoid()
        return g*(s + ctx.saved_tensors[0]*s*(1 - s))

class Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y): ctx.save_for_backward(x, y); return x*y, x + y
    @staticmethod
    def backward(ctx, g, h): return g*ctx.saved_tensors[1] + h, g*ctx.saved_tensors[0] + h

class Scripted(nn.Module):
    def forward(self, x): return x*x.sigmoid()

@torch.library.custom_op('libragrad_nb_tests::swish', mutates_args=())
def swish(x: torch.Tensor) -> torch.Tensor: return x*x.sigmoid()
def _setup(ctx, inputs, output): ctx.save_for_backward(inputs[0])
swish.register_autograd(Gate.backward, setup_context=_setup)


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('kind', ['function', 'scripted', 'custom op', 'two outputs', 'in place afterwards'])
def test_opaque_code_is_the_only_leak(kind, x):
    odd = {'function': Gate.apply, 'custom op': swish, 'two outputs': lambda h: sum(Pair.apply(h, h*2)),
           'in place afterwards': lambda h: Gate.apply(h).mul_(2) + h}.get(kind) or torch.jit.script(Scripted())
    model = toy(odd)
    sheet = ledger(model, x, 0)
    (leak,) = sheet.leaks()
    assert leak.opaque and (kind != 'custom op' or leak.operation == 'swish')
    assert np.isclose(leak.residual, sheet.completeness_error)


def test_a_module_that_is_scripted_whole_is_opaque(x):
    model = torch.jit.script(nn.Sequential(nn.Linear(6, 3), nn.Flatten(1)).to(F64).eval())
    sheet = ledger(model, x, 0)
    assert any(r.opaque for r in sheet.rows)


# --- checkpoints, broken numbers, unusable outputs

def test_checkpoints(x):
    inner = nn.Sequential(nn.Linear(6, 6), nn.GELU()).to(F64)
    for kind in (False, True):
        with pytest.raises(ValueError, match='recomputes'): ledger(toy(lambda h: checkpoint(inner, h, use_reentrant=kind)), x, 0)


@pytest.mark.parametrize('odd, says', [
    (lambda h: h/(h*0), 'the first infinity came out of div and the first NaN came out of linear in b'), (lambda h: (h - 100).log() + 1, 'NaN came out of log'),
    (lambda h: (h*1e3).sinh()**2 + 1, 'infinity came out of pow|infinity came out of sinh'), (lambda h: (h*0).abs().sqrt(), 'below sqrt')])
def test_numbers_that_are_not_finite(odd, says, x):
    with pytest.raises(ValueError, match=says): ledger(toy(odd), x, 0, 'plain')


def test_minus_infinity_in_a_mask_is_no_news(x):
    def masked(h): return (h@h.mT).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(-1)@h
    assert not ledger(toy(masked), x, 0).leaks()


def test_outputs_that_have_no_class(x):
    with pytest.raises(ValueError, match='pass a function'): ledger(nn.Linear(6, 3).double().eval(), x, 0)
    sheet = ledger(nn.Linear(6, 3).double().eval(), x, lambda y: y[:, -1, 0])
    assert not sheet.leaks()
    with pytest.raises(ValueError, match='no gradient'): ledger(toy(lambda h: h.detach()), x, 0)
    with pytest.raises(ValueError, match='training mode'): ledger(Toy(nn.GELU()).double(), x, 0)
    with pytest.raises(ValueError, match='cannot group'): sheet.by('colour')


# --- warnings, and operations without a rule

def test_warns_once_where_gradient_comes_through_an_operation_without_a_rule(x, recwarn):
    def logs(h): return h.sigmoid().mul(h).abs().add(1).log() + (h**2 + 1).log()
    model = toy(logs)
    with libra(model): model(x.clone().requires_grad_()).sum().backward()
    assert len(recwarn) == 1 and 'log has no balanced rule' in str(recwarn[0].message)
    with libra(model): model(x.clone().requires_grad_())  # no gradient, no warning
    with libra(model, rules='plain'): model(x.clone().requires_grad_()).sum().backward()
    assert len(recwarn) == 1


def test_unknown(x):
    def logs(h): return (h**2 + 1).log() + h.cumprod(1)
    table = libra.unknown(toy(logs), x)
    assert set(table.index) == {'log', 'cumprod'} and not len(libra.unknown(toy(nn.GELU()), x))


# --- found by users

def test_lets_go_of_the_graph(x):
    "The careful book of opaque code dies with the call, and so does all that it held"
    before = []
    for _ in range(3):
        ledger(toy(Gate.apply), x, 0)
        gc.collect()
        before.append(sum(type(o).__name__ == 'Book' for o in gc.get_objects()))
    assert before == [0, 0, 0]


def test_in_place_on_what_einsum_returns(x):
    def scaled(h):
        a = torch.einsum('bnd,bmd->bnm', h, h)
        a *= .5
        return a.softmax(-1)@h
    sheet = ledger(toy(scaled), x, 0)
    assert not sheet.leaks() and not any(r.opaque for r in sheet.rows)


def test_backward_hooks_of_the_caller(x):
    model = toy(nn.GELU())
    seen = []
    model.a.register_full_backward_hook(lambda *_: seen.append(1))
    assert not ledger(model, x, 0).leaks() and seen


def test_a_leaf_that_is_not_the_input_is_named(x):
    extra = torch.ones(6, dtype=F64, requires_grad=True)
    sheet = ledger(toy(lambda h: h + extra), x, 0)
    (leak,) = sheet.leaks()
    assert leak.operation == 'leaf tensor' and np.isclose(leak.residual, sheet.completeness_error) and extra.grad is None


def test_compiled_models(x):
    model = toy(nn.GELU())
    compiled = torch.compile(model, backend='aot_eager')
    assert ledger(compiled, x, 0).score == ledger(model, x, 0).score


@pytest.mark.parametrize('target', [99, -1, 1.5, torch.tensor([0, 1, 2])])
def test_targets_that_are_no_class(target, x):
    with pytest.raises(ValueError, match='no class'): ledger(toy(nn.GELU()), x, target)


def test_other_mistakes(x):
    model = toy(nn.GELU())
    with pytest.raises(TypeError, match='rules must be'): ledger(model, x, 0, rules=None)
    with pytest.raises(ValueError, match='batch is empty'): ledger(model, x[:0], 0)
    with pytest.raises(TypeError, match='as_function'): ledger(model, torch.zeros(2, 4).long(), 0)
    with pytest.raises(ValueError, match='no ledger'): water_level()


def test_unknown_of_a_model_that_returns_several_things(x):
    class Several(nn.Module):
        def forward(self, x): return dict(a=x.cumprod(1), b=[x.sum(), x*2])
    assert list(libra.unknown(Several().eval(), x).index) == ['cumprod']
