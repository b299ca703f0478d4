"Figures at the edges: empty, flat, lopsided and odd input"
import io
import matplotlib.pyplot as plt, numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from libragrad_nb.colours import THEMES, as_png, brightness, contrast_ratio, heat, ink_on, lines_of, save, signed, smooth, theme, unsigned
from libragrad_nb.explain import Attribution
from libragrad_nb.plot import filmstrip, grid, overlay, pairs, words

def attribution(values, size=(32, 32), method='input_x_gradient', score=1., rules='libra', B=1):
    m = torch.as_tensor(values).float().expand(B, -1, -1)
    s = torch.full((B,), float(score))
    return Attribution(m, torch.zeros(B, 0), torch.zeros(B), s, torch.zeros(B, dtype=torch.long), s - m.sum((1, 2)), s, torch.rand(B, *size, 3), method, rules)

def drawn(fig): return Image.open(io.BytesIO(as_png(fig)))
def texts(fig): return [t.get_text() for t in fig.findobj(plt.Text) if t.get_text()]

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 999))
def test_smooth_stays_between_neighbours(rows, cols, times, seed):
    v = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    fine, size = smooth(v, (rows*times, cols*times)), (rows*times, cols*times)
    near = F.unfold(F.pad(v[None, None], (1,)*4, 'replicate'), 3).view(9, rows, cols)
    low, high = (F.interpolate(t[None, None], size, mode='nearest-exact')[0, 0] for t in (near.amin(0), near.amax(0)))
    assert (fine >= low).all() and (fine <= high).all()

def test_smooth_of_a_flat_map_is_flat(): assert smooth(torch.full((3, 4), -2.), (30, 40)).unique().tolist() == [-2]

@pytest.mark.parametrize('values', [torch.zeros(4, 4), torch.ones(1, 1), torch.randn(2, 9), -torch.rand(4, 4)], ids=['zero', 'one patch', 'lopsided', 'negative'])
@pytest.mark.parametrize('size', [(32, 32), (20, 60)])
def test_any_map_is_drawn(values, size):
    a = attribution(values, size)
    assert drawn(overlay(a)).width > 100 and drawn(grid({'a': a, 'b': a}, scale='all')).width > 300

def test_one_scale_is_one_scale():
    big, small = attribution(torch.eye(4)*10), attribution(torch.eye(4))
    def tops(scale): return sorted(im.norm.vmax for ax in grid({'x': {'big': big}, 'y': {'small': small}}, scale=scale).axes for im in ax.images if im.norm.vmin < 0)
    assert tops('map') == [1, 10] and tops('row') == [1, 10] and tops('all') == [10, 10]

def test_grid_names_and_errors_are_there_and_gaps_stay_empty():
    a = attribution(torch.eye(4)*.2)
    said = texts(grid({'plain': {'ixg': a, 'other': a}, 'libra': {'ixg': a}}, scale='row'))
    assert said.count('ixg') == 1 and {'plain', 'libra', 'other'} <= set(said) and said.count('error 20%') == 3

def test_a_map_without_a_sign_has_colours_of_its_own():
    def cmap(a): return [im.cmap.name for ax in overlay(a).axes for im in ax.images if im.norm.vmin < 0][0]
    assert cmap(attribution(torch.eye(4), method='raw_attention')) == 'unsigned' != cmap(attribution(torch.eye(4)))

def test_opacity_and_limit():
    fig, axes = plt.subplots(1, 2)
    whole, half = (heat(ax, torch.ones(8, 8, 3), torch.eye(2), limit=2, opacity=o) for ax, o in zip(axes, (1, .5)))
    plt.close(fig)
    assert np.allclose(whole.get_alpha(), 2*half.get_alpha()) and whole.norm.vmax == 2

@pytest.mark.filterwarnings('ignore:Glyph')
@pytest.mark.parametrize('labels', [['a'], ['$x_1$', '{', r'\frac', '%'], ['', ' ', '\n'], ['word']*200, ['日本語', 'naïve', '🙂'], ['w'*400]],
                         ids=['one', 'formula', 'blank', 'many', 'letters', 'long'])
def test_any_words_are_drawn(labels):
    fig = words({'plain': torch.randn(len(labels)), 'libra': torch.zeros(len(labels))}, labels)
    assert drawn(fig).width > 300 and fig.get_figheight() < 12

def test_words_share_one_scale():
    fig = words({'a': torch.tensor([1., 0]), 'b': torch.tensor([4., -4])}, ['x', 'y'])
    boxes = [p.get_facecolor() for p in fig.axes[0].patches]
    assert np.allclose(boxes[2], signed()(1.)) and np.allclose(boxes[3], signed()(0.)) and not np.allclose(boxes[0], boxes[2])

def test_no_line_is_longer_than_the_page():
    for *_, left, wide in [(l, x, w) for l, x, w in lines_of(['some', 'words', 'of', 'length']*20, 200)]: assert left + wide <= 200

@pytest.mark.parametrize('name', THEMES)
def test_themes_paint_and_clean_up(name):
    before = dict(plt.rcParams)
    with theme(name): fig = pairs(torch.eye(3), 'abc', 'xyz')
    assert dict(plt.rcParams) == before
    corner = drawn(fig).convert('RGBA').getpixel((0, 0))
    assert corner[3] == 0 if name == 'clear' else np.allclose(corner[:3], [int(THEMES[name][0][i:i+2], 16) for i in (1, 3, 5)], atol=2)

def test_numbers_in_a_matrix_can_be_read():
    fig = pairs(torch.linspace(-1, 1, 12).view(3, 4), 'abc', 'wxyz')
    mesh = fig.axes[0].collections[0]
    for t in fig.axes[0].texts:
        if t.get_text(): assert contrast_ratio(t.get_color(), mesh.cmap(mesh.norm(float(t.get_text())))) > 3

def test_ink():
    assert ink_on('#ffffff') == '#000000' and ink_on('#000000') == '#ffffff' and brightness('w') == 1 and round(contrast_ratio('w', 'k')) == 21

def test_every_kind_of_file(tmp_path):
    for kind in ('png', 'svg', 'pdf'): assert (tmp_path/'deep'/f'a.{kind}').samefile(save(overlay(attribution(torch.eye(3))), tmp_path/'deep'/f'a.{kind}'))
    assert sorted(p.suffix for p in (tmp_path/'deep').iterdir()) == ['.pdf', '.png', '.svg']

def test_no_figure_stays_open():
    a = attribution(torch.eye(4))
    overlay(a), grid({'a': a}), words({'a': [1.]}, ['x']), pairs(torch.eye(2), 'ab', 'cd')
    assert not plt.get_fignums()

def test_grid_says_which_class_where_it_is_one():
    a, b = (attribution(torch.eye(4)) for _ in range(2))
    b.target = b.target + 3
    assert 'target 0' in texts(grid({'x': a, 'y': a})) and not any(t.startswith('target') for t in texts(grid({'x': a, 'y': b})))

def test_words_in_a_matrix_are_no_formulas():
    fig = pairs(torch.eye(2), ['$x', 'a_b$'], ['$', '{$}'])
    assert drawn(fig).width > 300
