"Models, inputs and callers that are out of the ordinary: explained like the stock model, or refused in a sentence, and left as they were"
import copy, warnings
from dataclasses import dataclass

import pytest, torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations

from kinds import vit
from libragrad_nb import explain, ledger, methods
from libragrad_nb.trace import trace
from untouched import untouched

METHODS = ['fullgrad_plus', 'gen_att', 'legrad', 'decompx', 'integrated_gradients', 'smooth_grad', 'caap', 'pixel_x_gradient']
QUICK = dict(steps=2, samples=2, progress=False)
EXACT = dict(rtol=0, atol=1e-10)


def quick(name): return {k: v for k, v in QUICK.items() if k in methods[name].options}
def maps(model, x, names=METHODS): return {n: explain(model, x, 1, n, **quick(n)).map for n in names}
def fresh():
    torch.manual_seed(0)
    model = vit(2)
    for p in model.parameters(): p.data += .2*torch.randn_like(p)
    return model.double().eval()

@pytest.fixture(scope='module')
def images(): return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
@pytest.fixture(scope='module')
def stock(images): return maps(fresh(), images)


class Around(nn.Module):
    "`f(inner, x)` as a model"
    def __init__(self, inner, f): super().__init__(); self.inner, self.f = inner, f
    def forward(self, x): return self.f(self.inner, x)

def around(f): return lambda model: Around(model, f).eval()

class Counting(nn.Module):
    "A buffer that every forward pass writes to"
    def __init__(self, inner): super().__init__(); self.inner = inner; self.register_buffer('n', torch.zeros(()))
    def forward(self, x): self.n += 1; return self.inner(x) + 0*self.n

class Keeping(nn.Module):
    "It remembers what it said last"
    def __init__(self, inner): super().__init__(); self.inner, self.said = inner, None
    def forward(self, x): self.said = self.inner(x); return self.said

def overwriting(inner, x): x *= 2; x.div_(2); y = inner(x); y += 1; y -= 1; return y
def with_grads(model):
    for p in model.parameters(): p.grad = torch.ones_like(p)
    return model
def frozen_below(model): model.patch_embed.requires_grad_(False); model.blocks[0].requires_grad_(False); return model
def weight_norm(model):
    for m in [m for m in model.modules() if isinstance(m, nn.Linear)]: parametrizations.weight_norm(m)
    return model.eval()
def old_weight_norm(model): nn.utils.weight_norm(model.blocks[0].mlp.fc1); return model
def compiled_in_place(model): model.compile(backend='aot_eager'); return model
def warm(model):
    with torch.no_grad(): model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    return model

def hooked(kind):
    "Hooks of the user's own, on a block and on a layer in it"
    def attach(model):
        seen = model.blocks[1], model.blocks[0].mlp.fc1, model.norm
        for m in seen:
            if kind == 'read': m.register_forward_pre_hook(lambda m, args: None); m.register_forward_hook(lambda m, args, out: out.sum().item() and None)
            if kind == 'replace': m.register_forward_pre_hook(lambda m, args: (args[0].clone(), *args[1:])); m.register_forward_hook(lambda m, args, out: out*1)
            if kind == 'view': m.register_forward_hook(lambda m, args, out: out.view(-1).view_as(out))
            if kind == 'kwargs': m.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs), with_kwargs=True)
            if kind == 'backward': m.register_full_backward_hook(lambda m, given, got: None); m.register_full_backward_pre_hook(lambda m, got: None)
            if kind == 'backward replaces': m.register_full_backward_hook(lambda m, given, got: tuple(g if g is None else g.clone() for g in given))
        return model
    return attach

SAME = dict(channels_last=lambda m: m.to(memory_format=torch.channels_last), frozen=lambda m: m.requires_grad_(False), frozen_below=frozen_below, with_grads=with_grads,
            data_parallel=lambda m: nn.DataParallel(m).eval(), compiled=lambda m: torch.compile(m, backend='aot_eager'), compiled_warm=lambda m: warm(torch.compile(m, backend='aot_eager')),
            compiled_in_place=compiled_in_place, weight_norm=weight_norm, old_weight_norm=old_weight_norm, overwriting=around(overwriting), copied=copy.deepcopy,
            functional=around(lambda inner, x: functional_call(inner, dict(inner.named_parameters()), (x,))), no_autocast=around(lambda inner, x: torch.autocast('cpu', enabled=False)(inner)(x)),
            **{f'hooks that {k}': hooked(k) for k in ('read', 'replace', 'view', 'kwargs', 'backward', 'backward replaces')})

@pytest.mark.parametrize('kind', SAME)
def test_explained_like_the_stock_model(kind, images, stock):
    model = SAME[kind](fresh())
    with untouched(model): found = maps(model, images)
    for n in METHODS: torch.testing.assert_close(found[n], stock[n], **EXACT)


@pytest.mark.parametrize('kind', [Counting, Keeping])
def test_a_model_that_changes_itself_in_its_forward_pass(kind, images, stock):
    model = kind(fresh()).eval()
    for _ in range(2):
        found = maps(model, images)
        for n in METHODS: torch.testing.assert_close(found[n], stock[n], **EXACT)


def test_a_buffer_that_follows_the_images_mixes_them(images):
    class Following(Counting):
        def forward(self, x): self.n = self.n.detach() + x.mean(); return self.inner(x) + self.n
    model = Following(fresh()).eval()
    with pytest.raises(NotImplementedError, match='one at a time'): explain(model, images, 1)
    assert explain(model, images[:1], 1, 'pixel_x_gradient').completeness_error.abs() < 1e-10


def test_hooks_that_remove_themselves(images, stock):
    model, called = fresh(), []
    def once(m, args, out): called.append(m); handle.remove()
    handle = model.blocks[1].register_forward_hook(once)
    torch.testing.assert_close(explain(model, images, 1, 'fullgrad_plus').map, stock['fullgrad_plus'], **EXACT)
    assert len(called) == 1 and not model.blocks[1]._forward_hooks


def test_hooks_that_change_the_model_are_part_of_it(images):
    "A steering vector: the account is one of the model as it runs"
    model, steer = fresh(), torch.randn(32, dtype=torch.float64)
    stock = explain(model, images, 1)
    model.blocks[0].register_forward_hook(lambda m, args, out: out + steer)
    with untouched(model): a = explain(model, images, 1)
    assert torch.equal(a.score, model.requires_grad_(False)(images)[:, 1]) and not torch.allclose(a.map, stock.map)
    assert a.completeness_error.abs().max() < 1e-10


# callers and inputs

CALLERS = dict(plain=lambda x: x, requires_grad=lambda x: x.clone().requires_grad_(), not_a_leaf=lambda x: x.clone().requires_grad_()*1, parameter=lambda x: nn.Parameter(x.clone()),
               channels_last=lambda x: x.to(memory_format=torch.channels_last), transposed=lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), strided=lambda x: x.repeat_interleave(2, -1)[..., ::2],
               subclass=lambda x: x.as_subclass(type('Picture', (torch.Tensor,), {})), negated=lambda x: torch._neg_view(-x))

@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.autograd.set_detect_anomaly(True, check_nan=False)], ids=['no_grad', 'inference', 'grad', 'anomaly'])
@pytest.mark.parametrize('kind', CALLERS)
def test_callers_and_inputs(kind, mode, images, stock):
    model, names = fresh(), METHODS if kind == 'plain' else ['fullgrad_plus', 'decompx']
    with mode():
        x = CALLERS[kind](images)
        with untouched(model): found = maps(model, x, names)
    for n in names: torch.testing.assert_close(found[n].as_subclass(torch.Tensor), stock[n], **EXACT)
    assert not x.is_leaf or x.is_inference() or x.grad is None


def test_expanded_images(images, stock):
    model, x = fresh(), images[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(explain(model, x, 1).map, stock['fullgrad_plus'][:1].expand(3, -1, -1), **EXACT)


@pytest.mark.parametrize('dtype, apart, lost', [(torch.float32, 1e-5, 1e-5), (torch.float16, .03, .01), (torch.bfloat16, .2, .05)])
def test_precisions(dtype, apart, lost, images, stock):
    "As near to the map in float64 as the numbers of the dtype allow"
    model, x = fresh().to(dtype), images.to(dtype)
    with untouched(model): found = {n: explain(model, x, 1, n, **quick(n)) for n in METHODS if n != 'caap'}  # a difference of nearly equal probabilities
    for n, a in found.items():
        assert a.map.dtype == torch.float32 and (a.map - stock[n]).abs().max() < apart*stock[n].abs().max(), n
        if n in ('fullgrad_plus', 'decompx', 'pixel_x_gradient'): assert (a.completeness_error/a.score).abs().max() < lost, n


def test_autocast_inside_and_around(images, stock):
    model, x = fresh().float(), images.float()
    with torch.autocast('cpu', torch.bfloat16), untouched(model): around_it = explain(model, x, 1)
    inside = explain(Around(model, lambda inner, x: torch.autocast('cpu', torch.bfloat16)(inner)(x)).eval(), x, 1, 'input_x_gradient', 'plain')
    assert (around_it.map - stock['fullgrad_plus']).abs().max() < .2*stock['fullgrad_plus'].abs().max() and inside.map.isfinite().all()


# outputs

@dataclass
class Logits: logits: torch.Tensor
@dataclass
class Scores: scores: torch.Tensor

OUTPUTS = dict(logits=(Logits, None), dataclass=(Scores, lambda o: o.scores), dict=(lambda y: dict(a=y, b=[y.sum()]), lambda o: o['a']), tuple=(lambda y: (y, 3), lambda o: o[0]))

@pytest.mark.parametrize('kind', OUTPUTS)
def test_outputs(kind, images, stock):
    wrap, unwrap = OUTPUTS[kind]
    model = Around(fresh(), lambda inner, x: wrap(inner(x))).eval()
    target = 1 if unwrap is None else lambda o: unwrap(o)[:, 1]
    for n in METHODS:
        if n != 'caap': torch.testing.assert_close(explain(model, images, target, n, **quick(n)).map, stock[n], **EXACT)  # caap asks for a probability of classes
    assert abs(ledger(model, images, target).completeness_error) < 1e-10


def test_images_by_name(images, stock):
    class Named(nn.Module):
        def __init__(self): super().__init__(); self.inner = fresh()
        def forward(self, *, pixel_values, scale=1): return self.inner(pixel_values)*scale
    model = Named().eval()
    with untouched(model): found = maps(model, dict(pixel_values=images, scale=1))
    for n in METHODS: torch.testing.assert_close(found[n], stock[n], **EXACT)


# weights that are computed, modules that are shared

@pytest.mark.parametrize('change', [parametrizations.orthogonal, parametrizations.spectral_norm, parametrizations.weight_norm, nn.utils.spectral_norm])
def test_weights_that_are_computed(change, images):
    model = fresh()
    change(model.blocks[1].mlp.fc2); change(model.head)
    model.eval()
    expected = model(images).detach()[:, 1]
    for rules in ('libra', 'plain'):
        a = explain(model, images, 1, 'input_x_gradient', rules)
        torch.testing.assert_close(a.score, expected, **EXACT)
        assert (a.completeness_error.abs().max() < 1e-10) == (rules == 'libra')


def test_blocks_that_share_one_module(images):
    "As if each had weights of its own"
    model, twin = vit(3).double().eval(), vit(3).double().eval()
    for p in model.parameters(): nn.init.normal_(p, std=.2)
    model.blocks[1] = model.blocks[2] = model.blocks[0]
    state = {k: v for k, v in model.state_dict().items()}
    twin.load_state_dict(state)
    assert len(trace(model, images, 1)[0].grids) == 3
    for n in ['fullgrad_plus', 'fullgrad_plus_once', 'grad_cam@plus', 'gen_att', 'decompx', 'integrated_gradients', 'caap']:
        torch.testing.assert_close(explain(model, images, 1, n, **quick(n.partition('@')[0])).map, explain(twin, images, 1, n, **quick(n.partition('@')[0])).map, **EXACT)
    with pytest.raises(NotImplementedError, match='blocks that run once'): explain(model, images, 1, 'legrad')


def test_layers_that_share_one_module(images):
    model = fresh()
    model.blocks[1].mlp = model.blocks[0].mlp; model.blocks[1].norm2.weight = model.blocks[0].norm1.weight
    assert explain(model, images, 1).completeness_error.abs().max() < 1e-10


# refused in a sentence

def inference_made():
    with torch.inference_mode(): return fresh()
def partly_meta(): model = fresh(); model.blocks[1].mlp.fc1.to('meta'); return model
def quantised(): return torch.ao.quantization.quantize_dynamic(fresh().float(), {nn.Linear}, dtype=torch.qint8).eval()
def frozen_inside(context): return lambda: Around(fresh(), lambda inner, x: context()(inner)(x)).eval()

REFUSED = dict(meta=(lambda: fresh().to('meta'), 'no weights'), partly_meta=(partly_meta, 'blocks.1.mlp.fc1'), inference=(inference_made, 'inference_mode'), quantised=(quantised, 'quantised'),
               training=(lambda: fresh().train(), 'eval'), data_parallel=(lambda: nn.DataParallel(fresh()), 'eval'), parametrised=(lambda: parametrizations.weight_norm(fresh().head), 'eval'),
               no_grad=(frozen_inside(torch.no_grad), 'no_grad'), inference_inside=(frozen_inside(torch.inference_mode), 'no_grad'), detached=(lambda: Around(fresh(), lambda inner, x: inner(x).detach()).eval(), 'gradient'),
               nothing=(lambda: Around(fresh(), lambda inner, x: None).eval(), 'NoneType'),
               scalar=(lambda: Around(fresh(), lambda inner, x: inner(x).sum()).eval(), r'shape \[\]'), constant=(lambda: Around(fresh(), lambda inner, x: torch.zeros(2, 5)).eval(), 'gradient'))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', REFUSED)
def test_refused_in_a_sentence(kind, images):
    make, says = REFUSED[kind]
    model = make()
    if kind == 'parametrised': model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), model).double(); [m.eval() for m in model]; model.training = False; model[2].parametrizations.train()
    for n in ('fullgrad_plus', 'legrad', 'decompx', 'integrated_gradients', 'pixel_x_gradient'):
        with untouched(model), pytest.raises((TypeError, ValueError, NotImplementedError), match=says) as e: explain(model, images, 1, n, **quick(n))
        assert len(str(e.value)) > 40


def test_black_box_methods_need_no_gradient(images):
    "A quantised model, and weights made under inference_mode"
    pytest.importorskip('captum')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = quantised()
    assert explain(model, images.float(), 1, 'occlusion', progress=False).map.any()
    made = inference_made()
    torch.testing.assert_close(explain(made, images, 1, 'occlusion', progress=False).map, explain(fresh(), images, 1, 'occlusion', progress=False).map, **EXACT)


def test_a_model_that_runs_a_backward_pass_itself():
    "Forces: the gradient of one output is part of another"
    class Forces(nn.Module):
        def __init__(self): super().__init__(); self.patch, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 5)
        def energy(self, x): return self.head(nn.functional.gelu(self.patch(x)).mean((2, 3)))
        def forward(self, x):
            with torch.enable_grad():
                x = x if x.requires_grad else x.clone().requires_grad_()
                y = self.energy(x)
                force, = torch.autograd.grad(y[:, 0].sum(), x, create_graph=True)
            return y + 0*force.square().sum((1, 2, 3))[:, None]
    torch.manual_seed(0)
    model, x = Forces().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with untouched(model): a = explain(model, x, 1, 'pixel_x_gradient')
    torch.testing.assert_close(a.score, model(x)[:, 1].detach())
    stock = explain(Around(model, lambda inner, x: inner.energy(x)).eval(), x, 1, 'pixel_x_gradient')
    torch.testing.assert_close(a.map, stock.map, **EXACT)
    with pytest.raises(NotImplementedError, match='backward pass itself'): ledger(model, x, 1)


@pytest.mark.parametrize('transform', [lambda f: vmap(f), lambda f: grad(lambda x: f(x).sum())], ids=['vmap', 'grad'])
def test_inside_a_transform_of_torch_func(transform, images, stock):
    model = fresh()
    for n in ('fullgrad_plus', 'decompx', 'occlusion'):
        with untouched(model), pytest.raises(TypeError, match='torch.vmap'): transform(lambda x: explain(model, x.view(-1, 3, 32, 32), 1, n, **quick(n)).map)(images)
    torch.testing.assert_close(explain(model, images, 1).map, stock['fullgrad_plus'], **EXACT)


def test_a_patch_embedding_with_sizes_that_are_one_number(images):
    "As in the first Vision Transformers on GitHub"
    class Embed(nn.Module):
        def __init__(self, proj): super().__init__(); self.proj, self.img_size, self.grid_size = proj, 32, 4
        def forward(self, x): return self.proj(x).flatten(2).transpose(1, 2)
    model = fresh()
    stock = explain(model, images, 1).map
    model.patch_embed = Embed(model.patch_embed.proj).eval()
    torch.testing.assert_close(explain(model, images, 1).map, stock, **EXACT)
    with pytest.raises(ValueError, match='takes 32x32'): explain(model, images[..., :16], 1)
