"Parity in float64 with maps that the LibraGrad authors' own code returned on a small random ViT (tests/golden)"
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file
from timm.models import VisionTransformer

from libragrad_nb.gradient_maps import methods
from libragrad_nb.trace import trace

GOLDEN = load_file(Path(__file__).parent/'golden'/'vit_official.safetensors')
BRANDS = {'LX1': 'libra', 'NG': 'plain'}
SCORES = {'S0': 'logit', 'S1': 'probability'}
DEPTH = 4


@pytest.fixture(scope='module')
def model():
    m = VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=DEPTH, num_heads=3, num_classes=10).double().eval()
    m.load_state_dict({k.removeprefix('weight/'): v for k, v in GOLDEN.items() if k.startswith('weight/') and '.attn.value.' not in k})
    return m


@pytest.fixture(scope='module', params=[(b, s) for b in BRANDS for s in SCORES], ids='-'.join)
def run(request, model):
    brand, score = request.param
    t, = trace(model, GOLDEN['image'].double(), GOLDEN['label'], BRANDS[brand], SCORES[score])
    return t, lambda key: GOLDEN[f'{brand}/{score}/{key}']


def official(tokens, unplaced):
    "The authors put the head's bias, which has no place, on the class token"
    return torch.cat([tokens[:, :1] + unplaced[:, None], tokens[:, 1:]], 1)


def close(a, b): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_forward(model):
    with torch.no_grad(): close(model(GOLDEN['image'].double()), GOLDEN['logits'])


def test_target(run):
    t, golden = run
    close(t.score, golden('target').view_as(t.score))


@pytest.mark.parametrize('block', range(DEPTH))
def test_input_x_gradient(run, block):
    t, golden = run
    close(t.input_x_gradient[block], golden(f'blocks__{block}__CAT_s:sum'))


@pytest.mark.parametrize('block', range(DEPTH))
def test_fullgrad(run, block):
    t, golden = run
    placed, unplaced = t.constants_from(block)
    close(official(t.input_x_gradient[block] + placed, unplaced), golden(f'blocks__{block}__FGrad_s:sum'))


# the authors sum over blocks where our default averages: their map is ours times the number of blocks
@pytest.mark.parametrize('name, key, factor', [
    ('fullgrad_plus', 'FGrad_s:sum_sum', DEPTH),
    ('skip_plus', f'FGrad_s:sum_sum_f{DEPTH//2}', DEPTH//2),
    ('fullgrad_plus_once', 'CAT_s:sum_sum_FGrad_s:sum', 1),
    ('skip_plus_once', f'CAT_s:sum_sum_f{DEPTH//2}_FGrad_s:sum', 1),
])
def test_fullgrad_plus(run, name, key, factor):
    t, golden = run
    tokens, unplaced = methods[name](t)
    close(official(factor*tokens, factor*unplaced), golden(key))
