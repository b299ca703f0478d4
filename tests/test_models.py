"Completeness on stock timm models with random weights and noisy biases: the pixels, and the account at every block"
import gc

import pytest, timm, torch
from torch import nn

from libragrad_nb.core import completeness_error, libra
from libragrad_nb.explain import explain
from libragrad_nb.trace import trace

NAMES = '''vit_tiny_patch16_224 deit3_small_patch16_224 vit_small_patch14_reg4_dinov2 eva02_tiny_patch14_224 beitv2_base_patch16_224
    flexivit_small vit_base_patch16_siglip_224 vit_base_patch32_clip_224 mixer_s32_224 gmixer_12_224'''.split()
SMALLER = {'vit_small_patch14_reg4_dinov2': dict(img_size=224), 'eva02_tiny_patch14_224': dict(img_size=112)}


@pytest.fixture(scope='module', params=NAMES)
def model(request):
    torch.manual_seed(0)
    m = timm.create_model(request.param, num_classes=10, **SMALLER.get(request.param, {})).eval()
    for name, p in m.named_parameters():
        if any(s in name for s in ('bias', 'token', 'pos_embed')): nn.init.normal_(p, std=.2)
        if name == 'head.weight': nn.init.normal_(p, std=.05)  # timm starts a Mixer's head at zero
    yield m
    del m; gc.collect()


def images(model, batch=1):
    size = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or (224, 224)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def relative(error, t): return (error.abs()/t.score.abs()).max().item()


def test_forward_is_untouched(model):
    x = images(model)
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            with torch.no_grad(): stock = model(x)
            with libra(model): ours = model(x.clone().requires_grad_())
        assert torch.equal(stock, ours)


def test_float32(model):
    x = images(model)
    t, = trace(model, x)
    assert relative(t.completeness_error(), t) <= 1e-5
    assert relative(trace(model, x, rules='plain')[0].completeness_error(), t) > 1e-3  # else the model would prove nothing


def test_float64(model):
    model.double()
    try:
        x = images(model, batch=2).double()
        t, = trace(model, x)
        for block in range(len(t.input_x_gradient)): assert relative(t.completeness_error(block), t) <= 1e-12
        assert abs(completeness_error(model, x)) <= 1e-12
        a = explain(model, x)
        torch.testing.assert_close(a.map.sum((1, 2)) + a.prefix.sum(1) + a.unplaced, a.score, rtol=1e-11, atol=0)
    finally: model.float()
