"Every method of the registry on every kind of model that it claims: it draws a map, or says what to use instead"
import gc, weakref
import pytest, torch
from timm.models import Eva, MlpMixer, SwinTransformer, VisionTransformer

from libragrad_nb import explain
from libragrad_nb.explain import Attribution
from libragrad_nb.gradient_maps import methods

SMALL = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=2, num_classes=5)
MODELS = {
    'vit': lambda: VisionTransformer(**SMALL, depth=3),
    'eva02': lambda: Eva(**SMALL, depth=2, qkv_bias=True, swiglu_mlp=True, use_rot_pos_emb=True, global_pool='avg'),
    'siglip': lambda: VisionTransformer(**SMALL, depth=2, global_pool='map', class_token=False),
    'mixer': lambda: MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=24, num_classes=5),
    'swin': lambda: SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 4), num_classes=5),
}
ATTENTION = {n for n, m in methods.items() if m.attention}
REFUSED = {'mixer': ATTENTION, 'swin': ATTENTION | {'globenc', 'alti', 'caap'}}  # no attention; attention in windows, and blocks with other tokens
QUICK = dict(steps=3, samples=4, progress=False)


@pytest.fixture(scope='module', params=MODELS)
def case(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for p in model.parameters(): p.data = p.data + .2*torch.randn_like(p)
    return request.param, model.eval(), torch.randn(3, 3, 32, 32)


def quick(name): return {k: v for k, v in QUICK.items() if k in methods[name].options}


@pytest.mark.parametrize('name', methods)
@pytest.mark.filterwarnings('ignore:.*zero everywhere')
def test_it_draws_or_says_why_not(case, name):
    kind, model, x = case
    if name in REFUSED.get(kind, ()):
        with pytest.raises(NotImplementedError, match='attention|block') as e: explain(model, x, 1, name, **quick(name))
        assert len(str(e.value)) > 60
        return
    a = explain(model, x, 1, name, **quick(name))
    grid = (32, 32) if methods[name].pixels else (8, 8) if kind == 'swin' else (4, 4)
    assert isinstance(a, Attribution) and a.map.shape == (3, *grid) and a.map.isfinite().all()
    assert torch.allclose(a.score, model(x)[:, 1], atol=1e-4) or name == 'caap'  # which explains a probability
    assert a.prefix.shape[1] in (0, int(kind in ('vit', 'eva02'))) and len(a.unplaced) == 3
    if methods[name].unit:
        whole = a.map.flatten(1).sum(1) + a.prefix.sum(1) + a.unplaced + a.completeness_error
        assert torch.allclose(whole, a.score, rtol=1e-4, atol=1e-4)
    else: assert a.completeness_error.isnan().all()
    assert repr(a) and (kind != 'vit' or a._repr_html_())


def test_what_adds_up(case):
    "Under Libra these have no error, and with plain gradients they do"
    kind, model, x = case
    for name in ('input_x_gradient', 'pixel_x_gradient', 'fullgrad', 'fullgrad_plus', 'skip_plus'):
        balanced, plain = explain(model, x, 1, name), explain(model, x, 1, name, 'plain')
        assert balanced.completeness_error.abs().max() < 1e-4*balanced.score.abs().max()
        assert plain.completeness_error.abs().max() > 1e-2*plain.score.abs().max()
    for name in ('decompx', 'shapley_sampling'):
        assert explain(model, x, 1, name, **quick(name)).completeness_error.abs().max() < 1e-4


def test_patching_within_a_stage_of_a_hierarchical_model(case):
    kind, model, x = case
    a = explain(model, x, 1, 'caap', blocks=(0, 2), progress=False)
    assert a.map.any() and a.map.isfinite().all()


def test_every_method_says_where_it_comes_from():
    assert all(m.paper and m.formula and (m.f.__doc__ or '') for m in methods.values())
    assert all(m.unit in ('score', '') and m.rules in ('libra', 'plain') for m in methods.values())

def test_no_rules_at_all_is_plain():
    "An empty dictionary is a set of rules, not a missing one"
    torch.manual_seed(0)
    vit, images = MODELS['vit']().eval(), torch.randn(2, 3, 32, 32)
    for m in ('input_x_gradient', 'legrad'):
        empty, plain, libra = (explain(vit, images, 3, m, rules=r).map for r in ({}, 'plain', 'libra'))
        assert torch.equal(empty, plain) and not torch.allclose(empty, libra)

class Mark(torch.autograd.Function):
    "Its node lives as long as the graph that it is part of"
    nodes = []
    @staticmethod
    def forward(ctx, x): Mark.nodes.append(weakref.ref(ctx)); return x.clone()
    @staticmethod
    def backward(ctx, g): return g

@pytest.mark.parametrize('name', methods)
def test_no_graph_outlives_its_explanation(name):
    "A graph whose hooks hold it is never freed: memory would grow with every call"
    torch.manual_seed(0)
    vit = MODELS['vit']().eval()
    vit.patch_embed.register_forward_hook(lambda m, args, out: Mark.apply(out))
    Mark.nodes.clear()
    explain(vit, torch.randn(1, 3, 32, 32), 3, name, **{k: v for k, v in QUICK.items() if k in methods[name].options})
    gc.collect()
    assert Mark.nodes and not any(n() is not None for n in Mark.nodes)
