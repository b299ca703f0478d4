"Black-box methods: the same answers however they are asked, and clear words where they cannot be"
import sys

import pytest, torch
from torch import nn

pytest.importorskip('captum')

from libragrad_nb import explain
from libragrad_nb.black_box import Game
from libragrad_nb.gradient_maps import methods
from libragrad_nb.tokens import contrast

F64 = torch.float64
SAMPLED = dict(shapley_sampling=3, kernel_shap=60, lime=60)
ALL = dict(occlusion=None, **SAMPLED)


class Tiny(nn.Module):
    "[B, 3, 12, 12] -> [B, 4], with a 3 x 3 grid that it announces nowhere"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.rows = nn.Linear(48, 6), nn.Linear(54, 4), []
    def forward(self, x):
        self.rows.append(len(x))
        tokens = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 9, 48)
        return (3*self.b(self.a(tokens).relu().flatten(1))).sin()  # patches that depend on each other


@pytest.fixture
def model(): return Tiny().to(F64).eval()

@pytest.fixture
def x(): return torch.randn(3, 3, 12, 12, dtype=F64, generator=torch.Generator().manual_seed(1))


def run(model, x, name, target=None, **options):
    if ALL[name] and 'samples' not in options: options['samples'] = ALL[name]
    return explain(model, x, target, method=name, **{**dict(patches=(3, 3), progress=False), **options})


def covered(x, r, c, window=1, by=0.):
    x = x.clone()
    x[:, :, 4*r:4*(r + window), 4*c:4*(c + window)] = by
    return x


# --- occlusion

def test_occlusion_is_the_naive_loop(model, x):
    a = run(model, x, 'occlusion', 2)
    with torch.no_grad(): drops = [model(x)[:, 2] - model(covered(x, r, c))[:, 2] for r in range(3) for c in range(3)]
    assert torch.allclose(a.map.flatten(1), torch.stack(drops, 1), atol=1e-6)  # captum adds up in float32
    with torch.no_grad(): assert torch.equal(a.unplaced, model(0*x)[:, 2])


def test_occlusion_with_a_window_is_the_mean_over_windows(model, x):
    a = run(model, x, 'occlusion', 2, window=2, baseline=.5)
    total, count = torch.zeros(3, 3, 3, dtype=F64), torch.zeros(3, 3)
    for r in range(2):
        for c in range(2):
            with torch.no_grad(): drop = model(x)[:, 2] - model(covered(x, r, c, 2, .5))[:, 2]
            total[:, r:r+2, c:c+2] += drop[:, None, None]
            count[r:r+2, c:c+2] += 1
    assert torch.allclose(a.map, total/count, atol=1e-6)


def test_baselines(model, x):
    colour = torch.tensor([.1, .2, .3], dtype=F64).view(3, 1, 1)
    other = torch.randn_like(x)
    with torch.no_grad():
        assert torch.allclose(run(model, x, 'occlusion', 0, baseline=colour).unplaced, model(colour.expand_as(x))[:, 0])
        assert torch.allclose(run(model, x, 'occlusion', 0, baseline=other).unplaced, model(other)[:, 0])


# --- Shapley values

def exact(model, x, target):
    "All orders, by the subsets: 2**9 forward passes"
    from math import comb
    subsets = torch.arange(512)[:, None].bitwise_right_shift(torch.arange(9)) & 1
    game = Game(model, x, target, patches=(3, 3))
    worth, size = game(subsets.view(-1, 3, 3).float()), subsets.sum(1)
    def share(t):
        without = (subsets[:, t] == 0).nonzero()[:, 0]
        weight = torch.tensor([1/(9*comb(8, int(k))) for k in size[without]], dtype=F64)
        return ((worth[without + 2**t] - worth[without])*weight[:, None]).sum(0)
    return torch.stack([share(t) for t in range(9)], 1)


@pytest.mark.parametrize('samples', [1, 4])
def test_efficiency_is_exact_for_sampled_orders(samples, model, x):
    a = run(model, x, 'shapley_sampling', 1, samples=samples)
    assert a.completeness_error.abs().max() < 1e-6  # float32 of captum
    with torch.no_grad(): assert torch.allclose(a.map.sum((1, 2)), (model(x) - model(0*x))[:, 1], atol=1e-6)


@pytest.mark.parametrize('name, samples', [('shapley_sampling', 400), ('kernel_shap', 1000)])
def test_both_tend_to_the_shapley_values(name, samples, model, x):
    truth = exact(model, x[:1], 1)
    off = [(run(model, x[:1], name, 1, samples=n).map.flatten(1) - truth).abs().max() for n in (samples//50, samples)]
    assert off[1] < .1*truth.abs().max() and off[1] < off[0]


@pytest.mark.filterwarnings('ignore:the lime map is zero')
def test_lime_reports_its_own_misfit(model, x):
    a, b = (run(model, x[:1], 'lime', 1, samples=400, alpha=alpha) for alpha in (1e-6, 10.))
    assert a.completeness_error.abs() < b.completeness_error.abs() and not b.map.any() and a.map.all()


def test_a_linear_model_has_one_answer():
    class Linear(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.arange(1., 5).to(F64))
        def forward(self, x): return (x.mean(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((3, 4)).flatten(1)*self.w)
    def total(out): return out.sum(1) + 7
    x = torch.rand(2, 3, 4, 4, dtype=F64) + .5
    truth = Linear().eval()(x).detach()
    for name in ('occlusion', 'shapley_sampling', 'kernel_shap'):
        a = run(Linear().eval(), x, name, total, patches=(2, 2))
        assert torch.allclose(a.map.flatten(1), truth, atol=1e-3), name
        assert torch.allclose(a.unplaced, torch.full((2,), 7., dtype=F64)) and a.target is None


# --- how it is asked makes no difference

@pytest.mark.parametrize('name', ALL)
def test_batch_size(name, model, x):
    a, b, c = (run(model, x, name, 1, batch_size=n) for n in (1, 7, 1000))
    assert torch.allclose(a.map, b.map, atol=1e-6) and torch.allclose(a.map, c.map, atol=1e-6)


def test_batch_size_is_the_size_of_the_batches(model, x):
    run(model, x, 'kernel_shap', 1, batch_size=7)
    assert max(model.rows) == 6 and len(model.rows) > 10  # two coalitions of three images


@pytest.mark.parametrize('name', ALL)
def test_an_image_does_not_depend_on_its_neighbours(name, model, x):
    a = run(model, x, name, torch.tensor([3, 1, 0]))
    for i, t in enumerate((3, 1, 0)):
        alone = run(model, x[i:i+1], name, t)
        assert torch.allclose(a.map[i], alone.map[0], atol=1e-6) and torch.allclose(a.unplaced[i], alone.unplaced[0], atol=1e-6)


@pytest.mark.parametrize('name', SAMPLED)
def test_seeds_and_the_dice_of_the_caller(name, model, x):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    a, b, c = (run(model, x, name, 1, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a.map, b.map) and not torch.allclose(a.map, c.map, atol=1e-3)


def test_the_dice_are_put_back_after_an_exception(model, x):
    game = Game(model, x, patches=(3, 3))
    model.a.register_forward_hook(lambda *_: 1/0)
    state = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError): run(model, x, 'kernel_shap', 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError): game(torch.zeros(1, 3, 3))


def test_no_coalition_is_asked_twice(model, x):
    game = Game(model, x, 0, patches=(3, 3))
    shown = torch.tensor([[1.]*9, [0.]*9, [0.]*9, [1.]*8 + [0.]]).view(4, 3, 3)
    first = game(shown)
    assert sum(model.rows) == 9 and torch.equal(first[1], first[2]) and torch.equal(game(shown), first) and sum(model.rows) == 9


# --- targets

@pytest.mark.parametrize('name', ALL)
def test_targets(name, model, x):
    with torch.no_grad(): best = model(x).argmax(1)
    assert best.unique().numel() > 1
    predicted, given = run(model, x, name), run(model, x, name, best)
    assert torch.equal(predicted.target, best) and torch.allclose(predicted.map, given.map)
    by_function = run(model, x, name, lambda out: out[torch.arange(3), best])  # it knows which image is which
    assert torch.allclose(by_function.map, given.map, atol=1e-6) and by_function.target is None
    several = run(model, x, name, [0, 1])
    assert torch.allclose(several[1].map, run(model, x, name, 1).map)


def test_contrasts(model, x):
    one, other = torch.tensor([3, 1, 0]), 2
    a, b, c = (run(model, x, 'shapley_sampling', t) for t in (contrast(one, other), one, other))
    assert torch.allclose(a.map, b.map - c.map, atol=1e-6)


def test_probability(model, x):
    a = explain(model, x, 1, method='shapley_sampling', of='probability', samples=2, patches=(3, 3), progress=False)
    with torch.no_grad(): assert torch.allclose(a.map.sum((1, 2)), (model(x).softmax(1) - model(0*x).softmax(1))[:, 1], atol=1e-6)


# --- models of which nothing but answers can be had

def test_no_gradient_is_needed(x):
    class Opaque(nn.Module):
        num_classes = 2
        def forward(self, x): return torch.from_numpy(x.detach().numpy().reshape(len(x), 2, -1).max(2))
    a = run(Opaque().eval(), x, 'occlusion', 0)
    assert a.map.any()
    assert not any(t.requires_grad for t in (a.map, a.score, a.unplaced))


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_scripted_models(x):
    class Few(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Conv2d(3, 2, 12)
        def forward(self, x): return self.a(x).flatten(1).sin()
    model = Few().to(F64).eval()
    assert torch.equal(run(torch.jit.script(model), x, 'occlusion', 1).map, run(model, x, 'occlusion', 1).map)


def test_arguments_by_name(model, x):
    class Named(nn.Module):
        def __init__(self): super().__init__(); self.model = model
        def forward(self, pixel_values, scale=1.): return dict(logits=self.model(pixel_values)*scale)
    def logits(out): return out['logits'][:, 1]
    a = run(Named().eval(), dict(pixel_values=x, scale=2.), 'occlusion', logits)
    assert torch.allclose(a.map, 2*run(model, x, 'occlusion', 1).map, atol=1e-6)


def test_precisions_and_surroundings(model, x):
    stock = run(model, x, 'occlusion', 1)
    with torch.inference_mode(): assert torch.allclose(run(model, x, 'occlusion', 1).map, stock.map)
    with torch.autocast('cpu', torch.bfloat16):
        low = run(model.float(), x.float(), 'occlusion', 1)
    assert low.score.dtype == torch.float32 and torch.allclose(low.map.double(), stock.map, atol=.1)
    half = run(model.bfloat16(), x.bfloat16(), 'shapley_sampling', 1)
    assert half.score.dtype == torch.float32 and half.completeness_error.abs().max() < 1e-5


def test_rules_make_no_difference(model, x):
    plain, libra = (explain(model, x, 1, method='occlusion', rules=rules, patches=(3, 3), progress=False) for rules in (None, 'libra'))
    assert torch.equal(plain.map, libra.map) and (plain.rules, libra.rules) == ('plain', 'libra')


def test_progress(model, x, capsys):
    run(model, x, 'kernel_shap', 1, progress=True)
    assert 'KernelSHAP: 100%' in capsys.readouterr().err
    run(model, x, 'kernel_shap', 1, progress=False)
    assert not capsys.readouterr().err


# --- what is refused, in words

def test_without_captum(model, x, monkeypatch):
    for name in [m for m in sys.modules if m.split('.')[0] == 'captum']: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'captum', None)
    for name in ALL:
        with pytest.raises(ImportError, match=r"pip install 'libragrad_nb\[black_box\]'"): run(model, x, name, 1)


def test_captum_is_not_imported_with_the_package():
    import subprocess
    code = 'import sys, libragrad_nb, libragrad_nb.black_box; assert "captum" not in sys.modules and "lime" in libragrad_nb.methods'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('options, says', [
    (dict(patches=3), 'rows, columns'), (dict(patches=(3, 13)), 'rows, columns'),
    (dict(patches=(1, 1)), 'at least two'), (dict(patches=(3, 0)), 'rows, columns'), (dict(patches=(3., 3)), 'rows, columns'),
    (dict(baseline=torch.zeros(5)), 'the baseline must be'), (dict(baseline='grey'), 'the baseline must be'),
    (dict(batch_size=0), 'batch_size'), (dict(batch_size=2.5), 'batch_size')])
@pytest.mark.parametrize('name', ['occlusion', 'lime'])
def test_mistakes(name, options, says, model, x):
    with pytest.raises(ValueError, match=says): run(model, x, name, 1, **options)


def test_a_model_without_a_grid(model, x):
    with pytest.raises(NotImplementedError, match=r'patches=\(8, 8\).*pixel_x_gradient'): run(model, x, 'occlusion', 1, patches=None)


def test_mistakes_of_one_method(model, x):
    for window in (0, 4, 1.5):
        with pytest.raises(ValueError, match='window must be 1 to 3'): run(model, x, 'occlusion', 1, window=window)
    for name, least in dict(shapley_sampling=1, kernel_shap=2, lime=2).items():
        with pytest.raises(ValueError, match=f'samples must be {least}'): run(model, x, name, 1, samples=least - 1)
    with pytest.raises(TypeError, match='no option'): run(model, x, 'occlusion', 1, samples=3)


def test_mistakes_that_every_method_refuses(model, x):
    with pytest.raises(ValueError, match='out of range'): run(model, x, 'lime', 9)
    with pytest.raises(ValueError, match='training mode'): run(model.train(), x, 'lime', 1)
    with pytest.raises(ValueError, match='returned 1 scores for 3'): run(model.eval(), x, 'lime', lambda out: out[:1, 0])
    with pytest.raises(ValueError, match=r'\[B, 3, H, W\]'): run(model, x[0], 'lime', 1)


def test_text_is_refused():
    class Words(nn.Module):
        def __init__(self): super().__init__(); self.e = nn.Embedding(9, 4)
        def forward(self, ids): return self.e(ids).sum(1)
    with pytest.raises(NotImplementedError, match='this is text'): run(Words().eval(), torch.ones(1, 5).long(), 'occlusion', 1, patches=None)


def test_registry():
    for name in ALL:
        m = methods[name]
        assert m.runs and m.unit == 'score' and m.rules == 'plain' and m.paper and m.formula and {'patches', 'baseline', 'batch_size', 'progress'} <= set(m.options)
