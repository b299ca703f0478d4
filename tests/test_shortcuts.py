"What an explanation costs, by counts and not by the clock; and where the shortcuts must step aside"
import pytest, torch, torch.nn.functional as F
from timm.models import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from libragrad_nb import completeness_error, explain, ledger, libra
from libragrad_nb.attention import fused_attention
from libragrad_nb.core import LIBRA, Tally


def small(**kwargs):
    torch.manual_seed(0)
    model = VisionTransformer(**{**dict(img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=10), **kwargs}).eval()
    for name, p in model.named_parameters():
        if name.endswith('bias') or name.startswith('head'): nn.init.normal_(p, std=.1)
    return model


@pytest.fixture(scope='module')
def x(): return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def plain_gradient(model, x, target=3):
    frozen, x = model.requires_grad_(False), x.clone().requires_grad_()
    try: return torch.autograd.grad(frozen(x)[:, target].sum(), x)[0]
    finally: model.requires_grad_(True)


class Work(TorchDispatchMode):
    "Multiplications in matrix products, and calls of attention kernels"
    def __init__(self): super().__init__(); self.products, self.attention, self.by_shape = 0, [], []
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out, name = op(*args, **(kwargs or {})), op.overloadpacket.__name__
        if name in ('mm', 'bmm', 'addmm'):
            a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.products += a.numel()*b.shape[-1]
        if 'attention' in name: self.attention.append(name)
        return out


def work(run):
    with Work() as found: run()
    return found


def test_an_explanation_multiplies_less_than_a_plain_gradient(x):
    model, tokens, C, L = small(), 4*65, 96, 4
    plain, ours = work(lambda: plain_gradient(model, x)), work(lambda: explain(model, x, 3))
    saved = L*2*tokens*C*C                  # queries and keys of every block
    head = 4*(10 - 1)*C                     # one class of ten
    made = 4*64*3*64*C + L*tokens*C*13 + tokens*C*9  # pixels of the patch embedding, and biases: at most this
    assert plain.products - saved - head <= ours.products <= plain.products - saved + made
    assert ours.products < .95*plain.products
    assert not [n for n in ours.attention if 'backward' in n] and len(ours.attention) == 2*L
    assert len([n for n in plain.attention if 'backward' in n]) == L


def test_ten_targets_share_a_forward_pass(x):
    model = small()
    one, ten = (work(lambda: explain(model, x[:1], t)) for t in (3, list(range(10))))
    assert ten.products < .6*10*one.products and ten.attention.count(ten.attention[0]) == 4 + 10*4


def saved_bytes(run):
    "Bytes that autograd keeps for the backward pass, every piece of memory once"
    seen = {}
    def pack(t): seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); kept.append(t); return t
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): run()
    return sum(seen.values())


def test_the_graph_is_no_larger_than_a_plain_one(x):
    model = small()
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    def ours():
        with libra(model, tally=Tally()): return model(x.clone().requires_grad_())
    def plain(): return model.requires_grad_(False)(x.clone().requires_grad_())
    try: assert saved_bytes(ours) <= 1.02*saved_bytes(plain)
    finally: model.requires_grad_(True)
    assert weights


def test_the_ledger_still_sees_every_projection(x):
    model = small(depth=2).double()
    sheet = ledger(model, x[:1].double(), 3)
    assert not sheet.leaks()
    rows = sheet.by('operation')
    assert rows.loc['linear', 'calls'] == 2*4 + 1 and rows.loc['linear', 'constants'] != 0


def cut(x, weight, bias, how):
    "Attention whose values are a piece of a projection, taken by `how`"
    out = F.linear(x, weight, bias)
    v = how(out)
    return F.scaled_dot_product_attention(v.detach(), v.detach(), v)


def heads(out): return out.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)[2]
HOW = dict(slice=lambda o: o[..., 16:], chunk=lambda o: o.chunk(3, -1)[2], heads=heads, interleaved=lambda o: o[..., ::3], some_tokens=lambda o: o[:, 1:, 16:],
           reversed_tokens=lambda o: o[:, torch.arange(4, -1, -1), 16:], all_of_it=lambda o: o, changed=lambda o: (o[..., 16:]*2), written=lambda o: o.mul_(2.)[..., 16:],
           transposed=lambda o: o[..., 16:].mT, first_image_twice=lambda o: o[:1, :, 16:].expand(2, -1, -1), relu=lambda o: o[..., 16:].relu_())


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('bias', [True, False])
def test_any_cut_has_the_gradient_and_the_account_of_the_long_way(how, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(24, 8, dtype=torch.float64)
    b = torch.randn(24, dtype=torch.float64) if bias else None
    def f(x): return cut(x, weight, b, HOW[how])
    slow = {**LIBRA, F.scaled_dot_product_attention: fused_attention, F.linear: LIBRA[F.bilinear]}
    found = {}
    for name, rules in (('fast', 'libra'), ('slow', slow)):
        z = x.clone().requires_grad_()
        with libra(f, rules): y = f(z)
        found[name] = torch.autograd.grad(y, z, y.detach())[0], completeness_error(f, x, rules=rules)
    torch.testing.assert_close(found['fast'][0], found['slow'][0], atol=1e-12, rtol=1e-10)
    assert abs(found['fast'][1]) < 1e-12 and abs(found['slow'][1]) < 1e-12


def test_gradients_of_what_lies_between_are_whole():
    "At a projection that somebody kept, by a hook on it, on a view of it or on its node: those of the long way"
    torch.manual_seed(0)
    x, weight, w = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), torch.randn(24, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    def found(rules):
        seen = []
        with libra(rules=rules):
            out = F.linear(x, weight)
            out.register_hook(seen.append); out.grad_fn.register_prehook(lambda gs: seen.append(gs[0]))
            m = out.unflatten(-1, (3, 8)); m.register_hook(seen.append); m.retain_grad()
            v = m[:, :, 2]
            y = F.scaled_dot_product_attention(v.detach()[:, None], v.detach()[:, None], v[:, None])[:, 0] + v
        kept, g = torch.autograd.grad((y*w).sum(), [out, x], retain_graph=True)
        (y*w).sum().backward(inputs=[m])
        return [kept, g, m.grad, *seen]
    slow = {**LIBRA, F.scaled_dot_product_attention: fused_attention, F.linear: LIBRA[F.bilinear]}
    for a, b in zip(found('libra'), found(slow), strict=True): torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_batched_gradients_and_vjp():
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(24, 8)
    with libra(): y = F.linear(x, weight)
    many = torch.randn(3, *y.shape)
    torch.testing.assert_close(torch.autograd.grad(y, x, many, is_grads_batched=True)[0], many@weight)
    def f(x):
        with libra(): return F.linear(x, weight)
    y, back = torch.func.vjp(f, x.detach())
    torch.testing.assert_close(back(many[0])[0], many[0]@weight)


def test_autocast_gives_what_torch_gives():
    q = torch.randn(1, 2, 5, 8)
    v = torch.randn(1, 2, 5, 8, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        stock = F.scaled_dot_product_attention(q, q, v)
        with libra(): ours = F.scaled_dot_product_attention(q, q, v)
    assert ours.dtype == stock.dtype and torch.equal(ours, stock)


def test_inputs_out_of_the_ordinary():
    weight = torch.randn(24, 8)
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], requires_grad=True)
    sparse = torch.randn(4, 8).relu().to_sparse().requires_grad_()
    with libra():
        assert F.linear(nested, weight).is_nested
        assert F.linear(sparse, weight).shape == (4, 24)
        assert F.linear(torch.randn(8, requires_grad=True), weight).shape == (24,)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 0, 8, requires_grad=True)).shape == (1, 2, 0, 8)


def test_complex_weights():
    conv, x = nn.Conv2d(3, 5, 8).to(torch.complex128), torch.randn(2, 3, 16, 16, dtype=torch.complex128, requires_grad=True)
    lin = nn.Linear(16, 4).to(torch.complex128)
    def f(x): return lin(F.conv2d(x, conv.weight, conv.bias, 8).flatten(1)[:, :16])
    with libra(f): y = f(x)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(f(x), x, g)[0])


def test_values_with_a_gradient_from_elsewhere_add_it():
    "The projection is also read by something that is no attention"
    torch.manual_seed(0)
    x, weight, b = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(24, 8, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    def f(x):
        out = F.linear(x, weight, b)
        v = out[..., 16:]
        return F.scaled_dot_product_attention(v.detach(), v.detach(), v) + v + out[..., :8]
    assert abs(completeness_error(f, x)) < 1e-12


@pytest.mark.parametrize('stride', [8, (8, 8), [8, 8], 4])
@pytest.mark.parametrize('size', [(32, 48), (33, 48)])
def test_patch_embeddings(stride, size):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, 8).double(), torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    def f(x): return F.conv2d(x, conv.weight, conv.bias, stride)
    with libra(f): y = f(x)
    assert torch.equal(y, f(x))
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(f(x), x, g)[0])
    assert abs(completeness_error(f, x)) < 1e-12


def test_twice_differentiable():
    "Gradients of a balanced gradient, as in training on explanations"
    torch.manual_seed(0)
    q, g = torch.randn(2, 1, 2, 5, 8, dtype=torch.float64)
    v = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    with libra(): y = F.scaled_dot_product_attention(q, q, v)
    w = g.clone().requires_grad_()
    first, = torch.autograd.grad(y, v, w, create_graph=True)
    A = (q@q.mT/8**.5).softmax(-1)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), w)[0], A.sum(-1, keepdim=True).expand_as(w))


def test_a_gradient_of_zeros_may_be_differentiated():
    "The transposed map, by two backward passes, from a gradient that is zero"
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(24, 8)
    with libra(): y = F.linear(x, weight)
    v = torch.zeros_like(y, requires_grad=True)
    g, = torch.autograd.grad(y, x, v, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g, v, x.detach())[0], x.detach()@weight.T)
