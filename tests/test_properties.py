"What must hold of every map for any weights, any head, any scene"
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from timm.models import Eva, MlpMixer, VisionTransformer

from libragrad_nb import explain, libra
from libragrad_nb.gradient_maps import find_method, methods
from libragrad_nb.tokens import contrast
from libragrad_nb.trace import trace

some = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LINEAR = ['input_x_gradient', 'fullgrad', 'fullgrad_plus', 'skip_plus', 'pixel_x_gradient', 'grad_cam@plus', 'xgrad_cam', 'xgrad_cam_plus', 'attention_x_gradient',
          'mean_attention_x_gradient', 'att_cat', 'attn_cam']
TRACED = [n for n, m in methods.items() if not m.runs]


@st.composite
def vision_transformers(draw):
    head = draw(st.sampled_from([{}, dict(reg_tokens=2), dict(global_pool='avg'), dict(global_pool='avg', class_token=False), dict(global_pool='map', class_token=False)]))
    shape = dict(img_size=24, patch_size=8, embed_dim=draw(st.sampled_from([8, 18, 24])), depth=draw(st.integers(1, 4)), num_heads=2, num_classes=4)
    extra = draw(st.sampled_from([{}, dict(init_values=.3), dict(pre_norm=True), dict(qk_norm=True), dict(act_layer='silu'), dict(act_layer='quick_gelu')]))
    return VisionTransformer(**shape, **head, **extra)

def others():
    small = dict(img_size=24, patch_size=8, num_classes=4)
    return st.sampled_from([lambda: Eva(**small, embed_dim=24, depth=2, num_heads=2, qkv_bias=True, swiglu_mlp=True, use_rot_pos_emb=True),
                            lambda: MlpMixer(**small, embed_dim=20, num_blocks=3)]).map(lambda make: make())

def with_weights(model, seed, size):
    "Random numbers of this size in every parameter"
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data = size*torch.randn(p.shape, generator=g)
    return model.double().eval(), torch.randn(3, 3, 24, 24, generator=g, dtype=torch.float64)

models = dict(seed=st.integers(0, 10**6), size=st.sampled_from([.05, .3, 1.]))

def same(a, b, scale=1.): torch.testing.assert_close(a, b, rtol=0, atol=1e-11*max(1., float(scale)))


@some
@given(model=vision_transformers() | others(), **models)
def test_complete_at_every_block(model, seed, size):
    model, x = with_weights(model, seed, size)
    t, = trace(model, x, 1)
    assert len(t.grids) > 0
    for block in (None, *range(len(t.grids))):
        here = t.pixels.flatten(1) if block is None else t.input_x_gradient[block]
        placed, unplaced = t.constants_from(block)
        turnover = here.abs().sum(-1) + placed.abs().sum(-1) + unplaced.abs()
        assert (t.completeness_error(block).abs() <= 1e-12*turnover.clamp_min(1.)).all()


@some
@given(model=vision_transformers(), a=st.floats(-3, 3), b=st.floats(-3, 3), rules=st.sampled_from(['libra', 'plain']), **models)
def test_linear_in_the_target(model, a, b, rules, seed, size):
    "The map of a*z_0 + b*z_2 is a times the one of z_0 plus b times the one of z_2"
    model, x = with_weights(model, seed, size)
    first, second, both = explain(model, x, [0, 2, lambda z: a*z[:, 0] + b*z[:, 2]], LINEAR, rules)
    for name in LINEAR:
        scale = max(m[name].map.abs().max() for m in (first, second))
        same(both[name].map, a*first[name].map + b*second[name].map, 10*scale)
        same(both[name].unplaced, a*first[name].unplaced + b*second[name].unplaced, 10*scale)


@some
@given(model=vision_transformers(), rules=st.sampled_from(['libra', 'plain']), **models)
def test_contrast_is_the_difference(model, rules, seed, size):
    model, x = with_weights(model, seed, size)
    others = torch.tensor([3, 0, 2])
    one, other, apart = explain(model, x, [1, others, contrast(1, others)], LINEAR, rules)
    for name in LINEAR: same(apart[name].map, one[name].map - other[name].map, 10*max(m[name].map.abs().max() for m in (one, other)))


@some
@given(model=vision_transformers(), rules=st.sampled_from(['libra', 'plain', 'attnlrp']), **models)
def test_plus_is_the_sum_over_blocks(model, rules, seed, size):
    model, x = with_weights(model, seed, size)
    L = len(model.blocks)
    for name in (n for n in TRACED if 'block' in methods[n].options):
        keys = [*(f'{name}@{i}' for i in range(L)), f'{name}@plus', f'{name}@skip_plus', f'{name}@-1']
        *each, plus, skip, last = explain(model, x, 1, keys, rules).values()
        scale = sum(m.map.abs().max() for m in each)
        same(plus.map, sum(m.map for m in each), scale); same(skip.map, sum(m.map for m in each[L//2:]), scale); same(last.map, each[-1].map)


@some
@given(model=vision_transformers() | others(), order=st.permutations(range(3)), **models)
def test_images_do_not_know_of_each_other(model, order, seed, size):
    model, x = with_weights(model, seed, size)
    names = [n for n in TRACED if isinstance(model, (VisionTransformer, Eva)) or not methods[n].attention]
    whole, mixed = explain(model, x, 1, names), explain(model, x[order], 1, names)
    alone = explain(model, x[1:2], 1, names)
    for n in names:
        scale = whole[n].map.abs().max()
        same(mixed[n].map, whole[n].map[order], scale); same(alone[n].map, whole[n].map[1:2], scale)


@some
@given(model=vision_transformers() | others(), **models)
def test_forward_is_untouched(model, seed, size):
    model, x = with_weights(model, seed, size)
    stock = model.requires_grad_(False)(x)  # torch takes other kernels for weights that require grad, see 00
    model.requires_grad_(True)
    names = [n for n in TRACED if isinstance(model, (VisionTransformer, Eva)) or not methods[n].attention]
    found = explain(model, x, 2, names)
    for a in found.values(): assert torch.equal(a.score, stock[:, 2])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and all(p.requires_grad for p in model.parameters())
