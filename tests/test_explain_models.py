"One small model of each family, with random weights: the account of every block, the shape of the map, the forward untouched"
import pytest, timm, torch
from torch import nn

from libragrad_nb.core import libra
from libragrad_nb.explain import explain
from libragrad_nb.trace import trace

transformers = pytest.importorskip('transformers')
VIT = dict(depth=2, embed_dim=32, num_heads=2)
FAMILIES = { # name: (arguments, image size, grid of the map, prefix tokens); images are not square where the model takes them
    'vit_tiny_patch16_224': (dict(VIT, dynamic_img_size=True), (96, 64), (6, 4), 1),
    'eva02_tiny_patch14_224': (dict(VIT, dynamic_img_size=True), (56, 84), (4, 6), 1),
    'beitv2_base_patch16_224': (dict(VIT, img_size=(64, 96)), (64, 96), (4, 6), 1),
    'deit_tiny_distilled_patch16_224': (dict(VIT, img_size=(64, 96)), (64, 96), (4, 6), 2),
    'cait_xxs24_224': (dict(VIT, img_size=64), (64, 64), (4, 4), 0),
    'vit_small_patch14_reg4_dinov2': (dict(VIT, img_size=(56, 84)), (56, 84), (4, 6), 5),
    'naflexvit_base_patch16_gap': (VIT, (64, 96), (4, 6), 4),
    'vit_base_patch16_siglip_224': (dict(VIT, img_size=(64, 96)), (64, 96), (4, 6), 0),
    'vit_base_patch32_clip_224': (dict(VIT, img_size=(96, 128)), (96, 128), (3, 4), 1),
    'mixer_s32_224': (dict(img_size=128), (128, 128), (4, 4), 0),
    'resmlp_12_224': (dict(img_size=64), (64, 64), (4, 4), 0),
    'gmlp_ti16_224': (dict(img_size=64), (64, 64), (4, 4), 0),
    'poolformer_s12': ({}, (64, 96), (16, 24), 0),
    'swin_tiny_patch4_window7_224': (dict(img_size=(64, 96), window_size=4, embed_dim=24, depths=(2, 2, 2, 2)), (64, 96), (16, 24), 0),
    'swinv2_tiny_window8_256': (dict(img_size=64, window_size=4, embed_dim=24, depths=(2, 2, 2, 2)), (64, 64), (16, 16), 0),
    'davit_tiny': (dict(depths=(1, 1, 1, 1), embed_dims=(24, 48, 96, 192)), (64, 96), (16, 24), 0),
    'convnext_atto': ({}, (64, 96), (16, 24), 0),
    'maxvit_tiny_rw_224': (dict(img_size=128, embed_dim=(32, 32, 64, 64), stem_width=8), (128, 128), (64, 64), 0),
    'coatnet_nano_rw_224': (dict(img_size=64, embed_dim=(32, 32, 64, 64), stem_width=(8, 8)), (64, 64), (32, 32), 0),
    'hiera_tiny_224': (dict(img_size=(64, 96), embed_dim=24), (64, 96), (16, 24), 0),
    'xcit_nano_12_p16_224': ({}, (64, 96), (4, 6), 0),
    'efficientformer_l1': ({}, (224, 224), (56, 56), 0),
    'mobilevit_xxs': ({}, (128, 192), (64, 96), 0),
    'levit_128s': ({}, (224, 224), (14, 14), 0),
    'tiny_vit_5m_224': ({}, (64, 96), (16, 24), 0),
    'resnet18': ({}, (64, 96), (32, 48), 0),
    'convmixer_768_32': ({}, (28, 42), (4, 6), 0),
    'pvt_v2_b0': ({}, (64, 96), (16, 24), 0),
    'twins_svt_small': (dict(img_size=64, depths=(1, 1, 1, 1), embed_dims=(32, 64, 128, 256)), (64, 64), (16, 16), 0),
    'mvitv2_tiny': (dict(img_size=64), (64, 64), (16, 16), 0),
    'crossvit_tiny_240': ({}, (240, 240), None, 0),             # two branches: no state holds everything
}


def noisy(model):
    "Random constants, so that leaving one out of the account shows"
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim < 2 or 'token' in name or 'pos_embed' in name: p.data += .1*torch.randn(p.shape, generator=g)
        elif name.startswith('head'): p.data = .1*torch.randn(p.shape, generator=g)
    return model.eval().double()


def accounts(model, inputs, bound=1e-9, **kwargs):
    "The trace, after checking every account: pixels with all constants, and each block"
    t, = trace(model, inputs, **kwargs)
    for block in [None, *range(len(t.grids))]:
        here = t.pixels.flatten(1) if block is None else t.input_x_gradient[block]
        size = torch.maximum(t.score.abs(), here.abs().sum(-1))
        assert (t.completeness_error(block).abs() <= bound*size).all(), block
    return t


@pytest.mark.parametrize('name', FAMILIES)
def test_timm(name):
    kwargs, size, grid, prefix = FAMILIES[name]
    torch.manual_seed(0)
    model = noisy(timm.create_model(name, num_classes=5, **kwargs))
    x = torch.randn(2, 3, *size, dtype=torch.double)
    t = accounts(model, x)
    assert (t.grid, t.prefix) == (grid, prefix)
    a = explain(model, x)
    assert a.map.shape == (2, *(grid or size)) and a.method == ('fullgrad_plus' if grid else 'pixel_x_gradient')
    torch.testing.assert_close(a.map.sum((1, 2)) + a.prefix.sum(1) + a.unplaced, a.score, rtol=1e-9, atol=1e-9*a.map.abs().sum().item())
    stock = model.requires_grad_(False)(x.clone().requires_grad_())  # without gradients torch may choose other kernels
    with libra(model): assert torch.equal(model(x.clone().requires_grad_()), stock)
    assert torch.equal(t.score, stock.gather(1, t.target[:, None])[:, 0])


def bare(model):
    "No constants: where a picture is black, early token states are zero"
    for name, p in model.named_parameters():
        if p.ndim < 2 and not name.endswith(('weight', 'gamma')) or 'token' in name or 'pos_embed' in name: p.data.zero_()
        elif name.startswith('head'): p.data = .1*torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return model.eval().double()


@pytest.mark.parametrize('name', '''vit_tiny_patch16_224 vit_small_patch14_reg4_dinov2 swin_tiny_patch4_window7_224 davit_tiny convnext_atto hiera_tiny_224
    tiny_vit_5m_224 pvt_v2_b0 poolformer_s12'''.split())
def test_tokens_are_where_the_picture_is(name):
    kwargs, size, grid, prefix = FAMILIES[name]
    torch.manual_seed(0)
    model = bare(timm.create_model(name, num_classes=5, **kwargs))
    x = torch.zeros(2, 3, *size, dtype=torch.double)
    H, W = size[0]//4, size[1]//4
    x[0, :, H:2*H, -W:] = torch.randn(3, H, W).double(); x[1, :, -H:, :W] = torch.randn(3, H, W).double()
    t, = trace(model, x)
    first = t.input_x_gradient[0][:, prefix:].view(2, *grid).abs()
    seen = nn.functional.adaptive_avg_pool2d(x.abs().sum(1), grid)
    near = nn.functional.max_pool2d(seen, 5, 1, 2) > 0   # stems may overlap
    assert (first.flatten(1).sum(1) > 0).all() and (first[~near] < 1e-6*first.max()).all()
    assert not (first[[1, 0]][~near] < 1e-6*first.max()).all()


# Hugging Face, built from a configuration: nothing is downloaded

SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
IDS = torch.tensor([[5, 3, 7, 1, 9, 2, 6], [8, 2, 2, 4, 1, 3, 0]])
MASK = torch.tensor([[1]*7, [1]*5 + [0]*2])


def hf(kind, config, **changes):
    torch.manual_seed(0)
    return noisy(getattr(transformers, kind)(getattr(transformers, config)(**changes)))


@pytest.mark.parametrize('kind, config, changes, grid, prefix', [
    ('ViTForImageClassification', 'ViTConfig', dict(image_size=(48, 64), patch_size=16, num_labels=5), (3, 4), 1),
    ('Dinov2ForImageClassification', 'Dinov2Config', dict(image_size=64, patch_size=16, num_labels=5), (3, 4), 1),
    ('Dinov2WithRegistersForImageClassification', 'Dinov2WithRegistersConfig', dict(image_size=64, patch_size=16, num_labels=5), (3, 4), 5),
    ('CLIPForImageClassification', 'CLIPConfig', dict(vision_config=dict(SMALL, image_size=64, patch_size=16), text_config=SMALL, num_labels=5), (4, 4), 1),
    ('SiglipForImageClassification', 'SiglipConfig', dict(vision_config=dict(SMALL, image_size=64, patch_size=16), text_config=SMALL, num_labels=5), (4, 4), 0),
])
def test_hugging_face_vision(kind, config, changes, grid, prefix):
    model = hf(kind, config, **({} if 'vision_config' in changes else SMALL), **changes)
    size = (48, 64) if grid == (3, 4) else (64, 64)
    x = torch.randn(2, 3, *size, dtype=torch.double)
    t = accounts(model, dict(pixel_values=x))
    assert (t.grid, t.prefix, len(t.grids)) == (grid, prefix, 3)
    assert explain(model, x).map.shape == (2, *grid)
    stock = model.requires_grad_(False)(x.clone().requires_grad_()).logits
    assert torch.equal(t.score, stock.gather(1, t.target[:, None])[:, 0])


@pytest.mark.parametrize('kind', ['CLIPVisionModel', 'SiglipVisionModel'])
def test_feature_models_need_a_function(kind):
    model = hf(kind, kind.replace('Model', 'Config'), **SMALL, image_size=64, patch_size=16)
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    with pytest.raises(ValueError, match='last_hidden_state, pooler_output'): explain(model, x)
    assert accounts(model, x, target=lambda o: o.pooler_output[:, 3]).grid == (4, 4)


@pytest.mark.parametrize('kind, config, changes', [
    ('BertForSequenceClassification', 'BertConfig', dict(vocab_size=12, num_labels=3)),
    ('GPT2LMHeadModel', 'GPT2Config', dict(vocab_size=12, n_embd=32, n_layer=3, n_head=2)),
    ('LlamaForCausalLM', 'LlamaConfig', dict(vocab_size=12, num_key_value_heads=1)),
])
def test_text(kind, config, changes):
    small = {} if 'n_embd' in changes else SMALL
    model = hf(kind, config, **small, **changes)
    given = transformers.BatchEncoding(dict(input_ids=IDS, attention_mask=MASK))
    bound = 1e-6 if kind.startswith('Llama') else 1e-9  # its RMSNorm computes in float32
    t = accounts(model, given, bound)
    assert (t.grid, t.prefix, len(t.grids)) == ((1, 7), 0, 3)
    logits = model.requires_grad_(False)(**given).logits.detach()
    if logits.ndim == 3: logits = logits[[0, 1], [6, 4]]  # the last word that the mask attends to
    torch.testing.assert_close(t.score, logits.max(-1)[0], rtol=1e-12, atol=0)
    a = explain(model, given)
    assert a.map.shape == (2, 1, 7) and torch.equal(a.rgb, IDS) and a.map[1, 0, 5:].abs().sum() <= 1e-12*a.map[1].abs().sum()
    a.show(); a.show(labels=[list('abcdefg')]*2)
    with pytest.raises(ValueError, match='labels must be 2 lists of 7'): a.show(labels=['abc'])
    assert explain(model, IDS, method='pixel_x_gradient').map.shape == (2, 1, 7)
    accounts(model, IDS, bound, target=2)


def test_tokens_behind_the_patches_are_no_prefix():
    "YOLOS keeps its detection tokens at the end: the account of tokens is given up rather than shifted"
    model = hf('YolosForObjectDetection', 'YolosConfig', **SMALL, image_size=(48, 64), patch_size=16, num_detection_tokens=4, num_labels=3)
    x = torch.randn(1, 3, 48, 64, dtype=torch.double)
    t = accounts(model, x, target=lambda o: o.logits[:, 0, 1])
    assert t.grid is None
    assert explain(model, x, target=lambda o: o.logits[:, 0, 1]).map.shape == (1, 48, 64)


def test_a_score_that_depends_on_nothing_is_no_leak():
    "A head of zeros, as timm makes some: one warning that says so, and no share of 0/0"
    model = timm.create_model('vit_tiny_patch16_224', **VIT, img_size=32, num_classes=3).eval()
    nn.init.zeros_(model.head.weight); nn.init.zeros_(model.head.bias)
    with pytest.warns(UserWarning) as said: explain(model, torch.randn(2, 3, 32, 32), target=1)
    assert len(said) == 1 and 'zero everywhere' in str(said[0].message)
