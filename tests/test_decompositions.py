"Forward decompositions against the gradient, against formulas written out with plain matrices, and what they refuse"
from functools import partial
from pathlib import Path

import pytest, timm, torch, torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import GluMlp
from timm.models import VisionTransformer
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from libragrad_nb.decompositions import PASSES, Run, Way, between, passes, readers, sources
from libragrad_nb.explain import explain
from libragrad_nb.gradient_maps import methods

GOLDEN = load_file(Path(__file__).parent/'golden'/'vit_official.safetensors')
IMAGE, LABEL = GOLDEN['image'].double(), GOLDEN['label']
MIXER = dict(img_size=64, num_blocks=2, embed_dim=32)
VIT = dict(depth=2, embed_dim=32, num_heads=2)
FAMILIES = { # name: (arguments, image size)
    'registers and LayerScale': ('vit_small_patch14_reg4_dinov2', dict(VIT, img_size=(56, 84)), (56, 84)),
    'deit3': ('deit3_small_patch16_224', dict(VIT, img_size=64), (64, 64)),
    'clip, norm in front': ('vit_base_patch32_clip_224', dict(VIT, img_size=(96, 128)), (96, 128)),
    'clip, quick gelu': ('vit_base_patch32_clip_quickgelu_224', dict(VIT, img_size=96), (96, 96)),
    'eva02: rope, packed swiglu, average pooling': ('eva02_tiny_patch14_224', dict(VIT, img_size=56), (56, 56)),
    'eva02: swiglu with a norm inside': ('eva02_base_patch14_448', dict(VIT, img_size=56), (56, 56)),
    'siglip: map pooling': ('vit_base_patch16_siglip_224', dict(VIT, img_size=64), (64, 64)),
    'average pooling': ('vit_base_patch16_siglip_gap_224', dict(VIT, img_size=64), (64, 64)),
    'beit: relative positions': ('beitv2_base_patch16_224', dict(VIT, img_size=64), (64, 64)),
    'cait: talking heads, class attention': ('cait_xxs24_224', dict(VIT, img_size=64), (64, 64)),
    'mixer': (MlpMixer, dict(MIXER), (64, 64)),
    'gmixer': (MlpMixer, dict(MIXER, mlp_ratio=(1., 4.), mlp_layer=GluMlp, act_layer=nn.SiLU), (64, 64)),
    'windows': ('swin_tiny_patch4_window7_224', dict(img_size=32, window_size=4, embed_dim=24, depths=(1, 1, 1, 1)), (32, 32)),
}


def build(name):
    "The model in float64 with random constants, and two images"
    name, kwargs, size = FAMILIES[name]
    torch.manual_seed(0)
    make = name if callable(name) else partial(timm.create_model, name)
    model = make(num_classes=5, **kwargs).eval().double()
    for key, p in model.named_parameters():
        if p.ndim < 2 or 'token' in key or 'pos_embed' in key or key.startswith('head'): p.data += .1*torch.randn_like(p)
    return model, torch.randn(2, 3, *size).double()


def golden(fused=True):
    m = VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=4, num_heads=3, num_classes=10).double().eval()
    m.load_state_dict({k.removeprefix('weight/'): v for k, v in GOLDEN.items() if k.startswith('weight/') and '.attn.value.' not in k})
    for block in m.blocks: block.attn.fused_attn = fused
    return m


def same(model, images, target=None, block=0, rules='libra', bound=1e-12, of='logit', **options):
    "Assert that DecompX is Input x Gradient: token by token, and the constants"
    ours = explain(model, images, target, 'decompx', of=of, block=block, progress=False, **options)
    theirs = explain(model, images, target, 'input_x_gradient', rules, of, block=block)
    size = theirs.map.abs().max()
    assert size > 1e-4
    for name in ('map', 'prefix', 'unplaced', 'completeness_error', 'score'):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=bound*max(1, size.item()))
    return ours


# DecompX is Libra's Input x Gradient

@pytest.mark.parametrize('block', [0, 2, -1])
@pytest.mark.parametrize('fused', [True, False])
def test_golden(fused, block):
    ours = same(golden(fused), IMAGE, LABEL, block)
    tokens = torch.cat([ours.prefix, ours.map.flatten(1)], 1)
    torch.testing.assert_close(tokens, GOLDEN[f'LX1/S0/blocks__{block % 4}__CAT_s:sum'], rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', FAMILIES)
def test_families(name):
    model, images = build(name)
    ours = same(model, images)
    assert (ours.completeness_error.abs() < 1e-12).all()


@pytest.mark.parametrize('name', ['eva02: rope, packed swiglu, average pooling', 'mixer', 'siglip: map pooling'])
def test_taylor_and_last_block(name):
    model, images = build(name)
    if 'swiglu' not in name: same(model, images, rules='libra_taylor', activation='taylor')
    same(model, images, block=-1)


def test_explicit_attention_with_rope():
    model, images = build('eva02: rope, packed swiglu, average pooling')
    for block in model.blocks: block.attn.fused_attn = False
    same(model, images)


def test_parts_add_up_after_every_operation():
    model, images = build('registers and LayerScale')
    run = Run(model, images, None, 'libra', 'logit')
    start, = run.states[:1]
    ends = [t for call, _, _ in between(run.tape.calls, start.h, run.ends) for t in call.outs]
    with torch.no_grad():
        way = Way(run.tape.calls, start.h, ends)
        for parts, rest, whole in zip(way(torch.cat(list(sources(start, 1000, False)))), way(0*start.h, constants=True), ends):
            torch.testing.assert_close(parts.sum(0) + rest, whole, rtol=1e-12, atol=1e-12)
    assert len(ends) > 30


def test_targets():
    model, images = build('deit3')
    same(model, images, lambda out: out[:, 1] - 2*out[:, 3])
    same(model, images, torch.tensor([1, 4]))
    prob = same(model, images, of='probability')
    assert prob.completeness_error.abs().max() > 1e-3
    listed = explain(model, images, [0, 3], ['decompx', 'input_x_gradient'], progress=False)
    for one in listed: torch.testing.assert_close(one['decompx'].map, one['input_x_gradient'].map, rtol=0, atol=1e-12)


def test_plus_is_the_sum_over_blocks():
    model, images = build('deit3')
    plus, zero, one = (explain(model, images, method=f'decompx@{b}', progress=False) for b in ('plus', 0, 1))
    torch.testing.assert_close(plus.map, zero.map + one.map)
    torch.testing.assert_close(plus.unplaced, zero.unplaced + one.unplaced)


@pytest.mark.parametrize('method', ['decompx', 'globenc', 'alti'])
def test_batches_change_nothing(method):
    model, images = build('registers and LayerScale')
    both = explain(model, images, 1, method, progress=False)
    for i in range(2):
        for size in (1, 7): 
            one = explain(model, images[i:i+1], 1, method, progress=False, batch_size=size)
            torch.testing.assert_close(one.map, both.map[i:i+1], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(one.prefix, both.prefix[i:i+1], rtol=1e-12, atol=1e-14)


def test_float32_and_bfloat16():
    model, images = build('deit3')
    full = explain(model, images, 1, 'decompx', progress=False)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, .05)): # LayerScale is 1e-6 here: taking biases away again would cost all digits
        low = explain(model.to(dtype), images.to(dtype), 1, 'decompx', progress=False)
        assert low.map.dtype == torch.float32
        assert (low.map - full.map).norm() < bound*full.map.norm()


def test_inference_mode():
    model, images = build('deit3')
    with torch.inference_mode(): inside = explain(model, images.clone(), 1, 'decompx', progress=False, activation='taylor')
    torch.testing.assert_close(inside.map, explain(model, images, 1, 'decompx', progress=False, activation='taylor').map)


def test_hugging_face():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    for kind in ('ViT', 'Dinov2'):
        config = getattr(transformers, f'{kind}Config')(image_size=32, patch_size=16, **{k: v for k, v in small.items() if (kind, k) != ('Dinov2', 'intermediate_size')})
        vit = getattr(transformers, f'{kind}ForImageClassification')(config).eval().double()
        same(vit, torch.randn(2, 3, 32, 32).double(), 1)
        for method in ('globenc', 'alti'): assert explain(vit, torch.randn(1, 3, 32, 32).double(), 1, method, progress=False).map.any()
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, **small)
    llama = transformers.LlamaForCausalLM(config).eval().double()  # shared keys and values, RMSNorm written out, in float32
    same(llama, torch.randint(5, 50, (2, 6)), 1, bound=1e-6)
    config = transformers.BertConfig(vocab_size=50, **small)
    bert = transformers.BertForTokenClassification(config).eval().double()
    same(bert, torch.randint(5, 50, (2, 6)), lambda out: out.logits[:, 1, 0])


class Encoder(nn.Module):
    "torch's own transformer layers"
    def __init__(self, block):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Conv2d(3, 8, 4, 4), nn.Sequential(block(), block()), nn.Linear(8, 3)
    def forward(self, x): return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))


class Named(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, **kwargs)
    def forward(self, x): y = self.norm(x); return x + self.attn(y, y, y)[0]


@pytest.mark.parametrize('block', [partial(nn.TransformerEncoderLayer, 8, 2, 16, batch_first=True, norm_first=True),
                                   partial(nn.TransformerEncoderLayer, 8, 2, 16, batch_first=True, activation='gelu'),
                                   partial(Named, batch_first=True), partial(Named, batch_first=True, bias=False)])
def test_layers_of_torch(block):
    torch.manual_seed(0)
    model = Encoder(block).double().eval()
    for p in model.parameters():
        if p.ndim < 2: p.data += .1*torch.randn_like(p)
    same(model, torch.randn(2, 3, 8, 8).double(), 1)


def test_multihead_options_are_refused():
    torch.manual_seed(0)
    model = Encoder(partial(Named, batch_first=True, add_bias_kv=True)).double().eval()
    with pytest.raises(NotImplementedError, match='no rule for MultiheadAttention with'):
        explain(model, torch.randn(1, 3, 8, 8).double(), 1, 'decompx', progress=False)


# GlobEnc and ALTI, written out

def parts_of_block(block, h):
    "Parts [B, to, from, C] of r + LN2(r), and the whole; plain matrices"
    B, N, C = h.shape
    H = block.attn.num_heads
    qkv = block.norm1(h)@block.attn.qkv.weight.T + block.attn.qkv.bias
    q, k = (t.view(B, N, H, C//H).transpose(1, 2) for t in qkv.split(C, -1)[:2])
    A = (q@k.mT/(C//H)**.5).softmax(-1)
    one = torch.eye(N).double()[:, :, None]*h[:, None]  # [B, from, token, C]
    def norm(m, p, x): return (p - p.mean(-1, keepdim=True))/(x.var(-1, correction=0, keepdim=True) + m.eps).sqrt()[:, None]*m.weight
    v = norm(block.norm1, one, h)@block.attn.qkv.weight[2*C:].T
    mixed = torch.einsum('bhij,bsjhd->bsihd', A, v.view(B, N, N, H, C//H)).flatten(3)
    r, r_parts = h + block.attn(block.norm1(h)), one + mixed@block.attn.proj.weight.T
    return (r_parts + norm(block.norm2, r_parts, r)).transpose(1, 2), r + block.norm2(r)


@pytest.fixture(scope='module')
def by_hand():
    model = golden()
    with torch.no_grad():
        h, found = model.norm_pre(model._pos_embed(model.patch_embed(IMAGE))), []
        for block in model.blocks:
            found.append(parts_of_block(block, h))
            h = block(h)
    return model, found


def tokens(a): return torch.cat([a.prefix, a.map.flatten(1)], 1)


def test_globenc(by_hand):
    model, blocks = by_hand
    lengths = [p.square().sum(-1).sqrt() for p, _ in blocks]
    shares = [m/m.sum(-1, keepdim=True) for m in lengths]
    expected = shares[3]@shares[2]@shares[1]@shares[0]
    def ours(**options): return tokens(explain(model, IMAGE, LABEL, 'globenc', progress=False, **options))
    torch.testing.assert_close(ours(), expected[:, 0], rtol=1e-10, atol=0)
    torch.testing.assert_close(ours(row='class'), expected[:, 0], rtol=1e-10, atol=0)
    torch.testing.assert_close(ours(row=3), expected[:, 3], rtol=1e-10, atol=0)
    torch.testing.assert_close(ours(row='mean'), expected[:, 1:].mean(1), rtol=1e-10, atol=0)
    torch.testing.assert_close(ours(combine='sum', normalise=False), sum(lengths)[:, 0], rtol=1e-10, atol=0)
    raw = torch.eye(17).double()
    for m in lengths: raw = (m + torch.eye(17).double())/2@raw
    torch.testing.assert_close(ours(keep=.5, normalise=False), raw[:, 0], rtol=1e-10, atol=0)


def test_alti(by_hand):
    model, blocks = by_hand
    total = torch.eye(17).double()
    for p, o in blocks:
        m = (o.abs().sum(-1)[..., None] - (o[:, :, None] - p).abs().sum(-1)).relu()
        total = m/m.sum(-1, keepdim=True)@total
    a = explain(model, IMAGE, LABEL, 'alti', progress=False)
    torch.testing.assert_close(tokens(a), total[:, 0], rtol=1e-10, atol=0)
    assert a.completeness_error.isnan().all() and not a.unplaced.any()


@pytest.mark.parametrize('name, read', [('deit3', range(1)), ('eva02: rope, packed swiglu, average pooling', range(1, 17)), ('average pooling', range(16)),
                                        ('siglip: map pooling', range(16)), ('mixer', range(16)), ('registers and LayerScale', range(1))])
def test_which_tokens_the_score_is_read_from(name, read):
    model, images = build(name)
    with torch.no_grad(): weights = readers(Run(model, images, None, 'libra', 'logit'))
    assert all(w.nonzero()[:, 0].tolist() == list(read) for w in weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2).double())
    for method in ('globenc', 'alti'): assert explain(model, images, method=method, progress=False).map.isfinite().all()


# What is refused, and what is left behind

class Block(nn.Module):
    "A block with an operation that nobody knows, or that works in place"
    def __init__(self, how): super().__init__(); self.norm, self.mix, self.how = nn.LayerNorm(8), nn.Linear(8, 8), how
    def forward(self, x):
        if self.how == 'in place': x += .5
        y = self.mix(self.norm(x))
        if self.how == 'tan': return x + y.tan()
        if self.how == 'in place': z = F.gelu(y)*1; z += x; z.mul_(.5).add_(x, alpha=.1); z -= 1; return z
        if self.how == 'buffer': z = torch.ones_like(x); z += y; return x + F.gelu(z)
        if self.how == 'setitem': y = y.clone(); y[:, 0] = x[:, 0]; return x + y
        if self.how == 'view written': z = y*1; out = x + z; z.view(-1).mul_(2); return out
        return x + F.gelu(y)


class Tiny(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.head = nn.Conv2d(3, 8, 4, 4), nn.Sequential(Block(how), Block(how)), nn.Linear(8, 3)
    def forward(self, x): return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))


def tiny(how): return Tiny(how).double().eval(), torch.randn(1, 3, 8, 8).double()


@pytest.mark.parametrize('how, message', [('tan', 'no rule says how parts go through tan'), ('setitem', 'what .* works on is overwritten'),
                                          ('view written', 'what .* works on is overwritten')])
def test_unknown_operations(how, message):
    model, images = tiny(how)
    with pytest.raises(NotImplementedError, match=message): explain(model, images, 0, 'decompx', progress=False)


@pytest.mark.parametrize('how', ['plain', 'in place', 'buffer'])
def test_own_models(how):
    model, images = tiny(how)
    for block in (0, 1): same(model, images, 0, block)
    with pytest.raises(NotImplementedError, match='block 0 is not built as'): explain(model, images, 0, 'globenc')


def test_wrong_rules():
    model, images = tiny('plain')
    before = PASSES.copy()
    try:
        @passes(F.gelu)
        def half(call, places): return lambda part: [part/2], []
        with pytest.raises(RuntimeError, match='the rule for gelu gives another output'): explain(model, images, 0, 'decompx', progress=False)
        @passes(F.gelu)
        def itself(call, places): return lambda part: call({places[0]: part}), []
        with pytest.raises(RuntimeError, match='do not add up'): explain(model, images, 0, 'decompx', progress=False)
    finally: PASSES.update(before)
    same(model, images, 0)


@pytest.mark.parametrize('method, options, error, message', [
    ('decompx', dict(rules='plain'), NotImplementedError, 'brings its rules along'),
    ('decompx', dict(block=7), ValueError, 'there is no block 7: this model has blocks 0 to 3'),
    ('decompx', dict(activation='zo'), ValueError, "choose 'secant' or 'taylor'"),
    ('decompx', dict(batch_size=0), ValueError, 'batch_size must be 1 or more'),
    ('decompx', dict(row=0), TypeError, 'no option'),
    ('globenc', dict(combine='product'), ValueError, "choose 'rollout' or 'sum'"),
    ('globenc', dict(keep=2), ValueError, 'between 0 and 1'),
    ('alti', dict(row='last'), ValueError, 'row must be'),
    ('alti', dict(row=17), ValueError, 'row must be'),
    ('alti', dict(batch_size=-1), ValueError, 'batch_size'),
])
def test_errors(method, options, error, message):
    with pytest.raises(error, match=message): explain(golden(), IMAGE, LABEL, method, **{'progress': False, **options})


def test_no_class_token():
    model, images = build('average pooling')
    with pytest.raises(ValueError, match="where the model has prefix tokens"): explain(model, images, method='alti', row='class')


@pytest.mark.parametrize('name', ['windows'])
def test_tokens_that_change(name):
    model, images = build(name)
    with pytest.raises(NotImplementedError, match='tokens change'): explain(model, images, method='globenc', progress=False)


def test_parallel_and_post_norm_blocks():
    torch.manual_seed(0)
    for block_fn in (timm.models.vision_transformer.ParallelScalingBlock, timm.models.vision_transformer.ResPostBlock):
        model = VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=3, block_fn=block_fn).eval().double()
        images = torch.randn(1, 3, 32, 32).double()
        with pytest.raises(NotImplementedError, match='not built as'): explain(model, images, method='alti', progress=False)
        same(model, images, 0)


def test_a_model_without_token_states():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.head = nn.Linear(48, 3)
        def forward(self, x): return self.head(x.flatten(1))
    with pytest.raises(NotImplementedError, match='starts at token states'): explain(Net().eval(), torch.randn(1, 3, 4, 4), method='decompx')


@pytest.mark.parametrize('method', ['decompx', 'globenc', 'alti'])
def test_nothing_is_left_behind(method):
    model = golden()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    def hooks(): return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    explain(model, IMAGE, LABEL, method, progress=False)
    assert not any(hooks()) and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    def fails(*args): raise ArithmeticError('in the middle')
    handle = model.blocks[1].register_forward_hook(fails)
    with pytest.raises(ArithmeticError): explain(model, IMAGE, LABEL, method, progress=False)
    handle.remove()
    assert not any(hooks())
    with torch.no_grad(): assert torch.equal(model(IMAGE), golden()(IMAGE))


def test_registered():
    assert methods['decompx'].unit == 'score' and methods['globenc'].unit == methods['alti'].unit == ''
    assert all(methods[n].runs and methods[n].paper and methods[n].formula for n in ('decompx', 'globenc', 'alti'))
