"Where tokens are, what is refused, and blocks that treat their input badly"
import pytest, timm, torch
from torch import nn

from libragrad_nb.explain import explain
from libragrad_nb.gradient_maps import methods
from libragrad_nb.tokens import State, choose, layout, on_grid, overlap, read_inputs, spread
from libragrad_nb.trace import trace
from libragrad_nb.zoo import load, scenes


@pytest.fixture(scope='module')
def vit(): return load('vit_digits').double()

@pytest.fixture(scope='module')
def images(): return scenes(2, digits=2).images.double()


def closes(t, bound=1e-12):
    for block in [None, *range(len(t.grids))]: assert (t.completeness_error(block).abs() <= bound*t.score.abs()).all(), block


# One grid for all

@pytest.mark.parametrize('m, n', [(1, 1), (4, 2), (7, 3), (3, 7), (14, 4), (56, 7), (5, 1)])
def test_overlap(m, n):
    a = overlap(m, n)
    torch.testing.assert_close(a.sum(0), torch.ones(n).double())
    torch.testing.assert_close(a.sum(1), torch.full((m,), n/m).double())
    i = torch.arange(m*n)  # cells cut into pieces of equal length
    torch.testing.assert_close(a, nn.functional.one_hot(i//n, m).double().T @ nn.functional.one_hot(i//m, n).double()/m)

def test_spread_keeps_sums_and_places():
    v = torch.randn(2, 3, 4).double()
    torch.testing.assert_close(spread(v, (6, 8)), v.repeat_interleave(2, 1).repeat_interleave(2, 2)/4)
    torch.testing.assert_close(spread(spread(v, (7, 9)), (1, 1)).flatten(), v.sum((1, 2)))
    assert torch.equal(on_grid(torch.arange(6.)[None], State((1,), (2, 2), 2), (2, 2), 3)[0], torch.tensor([0., 1, 0, 2, 3, 4, 5]))
    assert torch.equal(on_grid(torch.arange(4.)[None], State((1,), (2, 2), order=torch.tensor([0, 2, 1, 3])), (2, 2), 0)[0], torch.tensor([0., 2, 1, 3]))

def test_a_doubtful_shape_is_no_state():
    levit, resnet = (timm.create_model(name).to('meta') for name in ('levit_128s', 'resnet18'))
    x = torch.empty(1, 3, 256, 256)
    w = layout(resnet, x)
    assert w.state((1, 64, 64, 64)) is None and w.state((1, 64, 64, 64), resnet.layer1[0]).axes == (2, 3)
    assert w.state((1, 64, 64, 32)).axes == (1, 2) and w.state((1, 256, 256, 3)) is None and w.state((1, 10)) is None
    w = layout(levit, torch.empty(1, 3, 224, 224))
    assert [w.state((1, n, 8)).grid for n in (196, 49, 16)] == [(14, 14), (7, 7), (4, 4)] and w.state((1, 50, 8)) is None


# Blocks that overwrite their input, take it by name, or are not all there is

def overwriting(mixer, which):
    for i in which:
        b = mixer.blocks[i]
        def forward(h, b=b):
            h.add_(b.mlp_tokens(b.norm1(h).transpose(1, 2)).transpose(1, 2))
            return h.add_(b.mlp_channels(b.norm2(h)))
        b.forward = forward
    return mixer

@pytest.mark.parametrize('which', [[0], [3], range(6)])
def test_blocks_that_overwrite_their_input(images, which):
    stock, = trace(load('mixer_digits').double(), images)
    model = overwriting(load('mixer_digits').double(), which)
    t, _ = trace(model, images, target=[None, 3])
    closes(t)
    assert torch.equal(t.score, stock.score)
    torch.testing.assert_close(t.input_x_gradient, stock.input_x_gradient, rtol=1e-9, atol=1e-12)

def test_a_model_that_overwrites_its_images(vit, images):
    class Normalising(nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x): return self.model(x.mul_(2).sub_(.5))
    before = images.clone()
    t, = trace(Normalising(vit).eval(), images)
    closes(t)
    assert torch.equal(images, before) and t.grid == (8, 8)

def test_blocks_that_take_their_state_by_name(images):
    model = load('mixer_digits').double()
    expected, = trace(model, images)
    class Named(nn.Module):
        def __init__(self, block): super().__init__(); self.block = block
        def forward(self, scale=1, *, state): return self.block(state)*scale
    blocks = nn.ModuleList(map(Named, model.blocks)).eval()
    model.blocks, model.feature_info = blocks, []
    def forward(x):
        x = model.stem(x)
        for b in blocks: x = b(state=x)
        return model.forward_head(model.norm(x))
    model.forward = forward
    t, = trace(model, images)
    torch.testing.assert_close(t.input_x_gradient, expected.input_x_gradient)

def test_a_branch_around_a_block_is_noticed(vit, images):
    "Its account would not close, so it is none of the states"
    model = load('vit_digits').double()

    class Wide(nn.Module):
        feature_info = [dict(module=f'vit.blocks.{i}') for i in range(6)]
        num_prefix_tokens = 1
        def __init__(self): super().__init__(); self.vit = model
        def forward(self, x):
            v = self.vit
            h0 = v._pos_embed(v.patch_embed(x))
            h = v.blocks[0](h0)
            for b in v.blocks[1:5]: h = b(h)
            return v.forward_head(v.norm(v.blocks[5](h + h0)))
    t, = trace(Wide().eval(), images)
    assert len(t.grids) == 2  # the first and the last; h0 goes around the others
    closes(t)


# Models without a grid

class Plain(nn.Module):
    def __init__(self): super().__init__(); self.f = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    def forward(self, x): return self.f(x)

def test_pixels_where_there_are_no_tokens(images):
    model = Plain().double().eval(); model(images)
    a = explain(model, images)
    assert a.method == 'pixel_x_gradient' and a.map.shape == (2, 64, 64) and a.prefix.shape == (2, 0)
    assert (a.completeness_error.abs() <= 1e-12*a.map.abs().sum((1, 2))).all() and (a.unplaced.abs() > 0).all()
    a.show(); a._repr_html_()
    for name in methods:
        if methods[name].pixels: continue
        with pytest.raises(NotImplementedError, match='pixel_x_gradient'): explain(model, images, method=name)

def test_pixels_where_there_are_tokens(vit, images):
    a = explain(vit, images, method='pixel_x_gradient')
    assert a.map.shape == (2, 64, 64) and (a.completeness_error.abs() <= 1e-12*a.map.abs().sum((1, 2))).all()

def test_one_channel():
    a = explain(nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.Flatten(), nn.Linear(64, 3)).eval(), torch.randn(2, 1, 16, 16))
    assert a.map.shape == (2, 16, 16) and a.rgb.shape == (2, 16, 16, 3)
    a.show()


# Refusals

@pytest.mark.parametrize('error, message, change', [
    (TypeError, 'sparse', lambda x: x.to_sparse()),
    (TypeError, 'on meta', lambda x: x.to('meta')),
    (TypeError, 'complex', lambda x: x*1j),
    (TypeError, 'bool', lambda x: x > 0),
    (ValueError, r'\[1, 2, 3, 64, 64\]', lambda x: x[None]),
    (ValueError, 'for one text', lambda x: torch.arange(4)),
    (ValueError, 'no tokens', lambda x: torch.zeros(2, 0, dtype=torch.long)),
    (ValueError, 'pixel_values', lambda x: dict(image=x)),
    (TypeError, 'torch tensor', lambda x: dict(pixel_values=x.numpy())),
    (ValueError, '1 channels', lambda x: x[:, :1]),
    (ValueError, '64x48', lambda x: x[..., :48]),
    (ValueError, 'empty', lambda x: x[:0]),
    (ValueError, 'empty', lambda x: x[..., :0]),
    (TypeError, 'list', lambda x: list(x)),
])
def test_refused_inputs(vit, images, error, message, change):
    with pytest.raises(error, match=message): explain(vit, change(images))

@pytest.mark.parametrize('target', ['3', {}, {3}, 3j, 10**30, -10**30, 10, -1, 2.5, True, torch.tensor([1, 2, 3]), torch.tensor(1j), [[3, '4']]])
def test_refused_targets(vit, images, target):
    with pytest.raises((TypeError, ValueError), match='target'): explain(vit, images, target)

@pytest.mark.parametrize('kwargs', [dict(method=[]), dict(method=['fullgrad', 'gradcan']), dict(method=[3]), dict(method='gradcan'), dict(method=3), dict(rules=3),
                                    dict(rules='rules'), dict(of='odds'), dict(of=None)])
def test_refused_options(vit, images, kwargs):
    with pytest.raises((TypeError, ValueError), match=next(iter(kwargs)) if 'of' not in kwargs else 'score'): explain(vit, images, **kwargs)

def test_refused_models(vit, images):
    with pytest.raises(TypeError, match='scripted'): explain(torch.jit.trace(load('vit_digits'), images.float(), check_trace=False), images.float())
    ghost = timm.create_model('vit_tiny_patch16_224').to('meta').eval()
    with pytest.raises(ValueError, match='no weights'): explain(ghost, torch.randn(1, 3, 224, 224))
    half = load('vit_digits').double(); half.blocks[2].attn.train()
    with pytest.raises(ValueError, match='blocks.2.attn'): explain(half, images)
    with pytest.raises(ValueError, match='no embedding'): explain(nn.Sequential(nn.Flatten()).eval(), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(TypeError, match='nn.Module'): explain('vit', images)

def test_outputs_without_classes():
    with pytest.raises(ValueError, match='the fields a, b'): choose(dict(a=1, b=2))
    with pytest.raises(ValueError, match='tuple'): choose((1, 2))
    with pytest.raises(ValueError, match=r'\[2, 3, 4\]'): choose(torch.ones(2, 3, 4))

def test_last_word():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert read_inputs(nn.Sequential().eval(), ids).last().tolist() == [2, 2]
    given = dict(input_ids=ids, attention_mask=torch.tensor([[True, True, False], [False, True, True]]))
    assert read_inputs(nn.Sequential().eval(), given).last().tolist() == [1, 2]

def test_custom_rules_keep_their_name(vit, images):
    class Rules(dict): name = 'mine'
    assert trace(vit, images, rules=Rules())[0].rules == 'mine' and trace(vit, images, rules={})[0].rules == 'custom'
