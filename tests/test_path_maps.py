"Path and noise maps against naive loops, on every kind of model"
import kinds, pytest, torch
from kinds import noisy, vit
from torch import nn

from libragrad_nb import explain, libra, methods
from libragrad_nb import path_maps as pm
from libragrad_nb.restart import Rest
from libragrad_nb.trace import as_function, trace

DEPTH = dict(vit=2, registers=2, siglip=2, eva02=2, swin=(1, 2), hiera=(1, 1, 1, 1), mixer=2)
ALL = [n for n in methods if methods[n].runs and methods[n].f.__module__ == pm.__name__]
QUIET = dict(progress=False)


@pytest.fixture(scope='module', params=DEPTH)
def case(request): return kinds.case(request.param, DEPTH[request.param])


def gradient(f, h, rules):
    h = h.detach().requires_grad_()
    with libra(rules=rules): y = f(h)
    return torch.autograd.grad(y.sum(), h)[0]


def same(a, b): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12*b.abs().max().item())


@pytest.mark.parametrize('rules', ['plain', 'libra'])
def test_pixels_agree_with_a_loop_over_the_model(case, rules):
    "No piece of the package but the rules: steps, weights and noise written out"
    model, x = case
    f = lambda x: model(x)[:, 1]
    x0 = .1*torch.randn(3, *x.shape[2:], dtype=torch.float64)
    _, tokens, unplaced = pm.integrated_gradients_pixels(model, x, 1, rules, steps=3, integration='midpoint', baseline=x0, batch_size=4, **QUIET)
    g = sum(gradient(f, x0 + (k + .5)/3*(x - x0), rules) for k in range(3))/3
    same(tokens, ((x - x0)*g).sum(1))
    with torch.no_grad(): same(unplaced, f(x0[None]).expand(2))
    r = torch.Generator().manual_seed(5)
    sigma = .2*torch.stack([i.max() - i.min() for i in x])[:, None, None, None]
    g = sum(gradient(f, x + sigma*torch.randn(x.shape[1:], generator=r).double(), rules) for _ in range(3))/3
    drawn = dict(samples=3, noise=.2, seed=5, batch_size=4, **QUIET)
    same(pm.smooth_grad_pixels(model, x, 1, rules, **drawn)[1], (x*g).sum(1))
    same(pm.smooth_grad_norm_pixels(model, x, 1, rules, **drawn)[1], g.norm(dim=1))


@pytest.mark.parametrize('rules', ['plain', 'libra'])
def test_patches_agree_with_a_loop_over_states(case, rules):
    model, x = case
    f = Rest(model, x, 1)
    q, tokens, unplaced = pm.integrated_gradients(model, x, 1, rules, steps=3, integration='right', batch_size=4, **QUIET)
    same(tokens, f.tokens(f.h*sum(gradient(f, k/3*f.h, rules) for k in (1, 2, 3))/3))
    assert tokens.shape == (2, q.prefix + q.grid[0]*q.grid[1]) and torch.equal(unplaced, f(0*f.h))
    tokens = pm.input_x_gradient_on_path(model, x, 1, rules, steps=3, batch_size=4, **QUIET)[1]
    same(tokens, f.tokens(sum(k/3*f.h*gradient(f, k/3*f.h, rules) for k in (1, 2, 3))/3))
    calm, t = pm.smooth_grad(model, x, 1, rules, samples=2, noise=0, **QUIET)[1], trace(model, x, 1, rules)[0]
    if calm.shape == t.input_x_gradient[0].shape: same(calm, t.input_x_gradient[0])
    same(calm.sum(-1), t.input_x_gradient[0].sum(-1))


def test_the_identity_and_its_judge(case):
    "The error that `explain` reports is the error of the integral, and goes away with steps"
    model, x = case
    def error(steps, **o): return explain(model, x, 1, 'integrated_gradients', steps=steps, baseline='image', integration='gauss_legendre', **QUIET, **o).completeness_error
    few, many = error(2).abs().max(), error(32).abs().max()
    assert many < .2*few and many < .02


@pytest.mark.parametrize('name', ALL)
def test_batch_size_batch_and_targets_change_nothing(name):
    torch.manual_seed(0)
    model, x = noisy(vit(2)), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    count = dict(samples=5) if 'samples' in methods[name].options else dict(steps=5)
    def run(x, target, **o): return explain(model, x, target, name, **count, **QUIET, **o)
    whole = run(x, [1, 2])
    for a, target in zip(whole, (1, 2)):
        assert a.rules == methods[name].rules
        for batch_size in (1, 6, 100): same(run(x, target, batch_size=batch_size).map, a.map)
        for i in range(3): same(run(x[i:i+1], target).map[0], a.map[i])
    assert not torch.allclose(whole[0].map, whole[1].map)
    assert whole[0].completeness_error.isnan().all() == (methods[name].unit == '')


def test_noise_leaves_the_callers_random_state_alone():
    model, x = noisy(vit(2)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    def run(**o): return pm.smooth_grad(model, x, 1, samples=2, **QUIET, **o)[1]
    torch.manual_seed(1); before = torch.random.get_rng_state()
    first = run()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(run(), first) and not torch.allclose(run(seed=1), first)
    norm = pm.smooth_grad_norm(model, x, 1, samples=2, **QUIET)[1]
    assert (norm >= 0).all()


def test_text():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    model, ids = noisy(transformers.GPT2LMHeadModel(config)), torch.randint(2, 50, (2, 6))
    mask = torch.ones(2, 6).long(); mask[1, :2] = 0
    for given in (ids, dict(input_ids=ids, attention_mask=mask)):
        f, e = as_function(model, given)
        g = sum(gradient(lambda e: f(e).logits[:, -1, 3], (k + .5)/4*e, 'plain') for k in range(4))/4
        a = explain(model, given, 3, 'integrated_gradients_pixels', steps=4, integration='midpoint', **QUIET)
        same(a.map[:, 0], (e*g).sum(-1))
        for name in ('integrated_gradients', 'smooth_grad', 'input_x_gradient_on_path'):
            assert explain(model, given, 3, name, **QUIET).map.shape == (2, 1, 6)
        exact = explain(model, given, 3, 'integrated_gradients', steps=60, integration='gauss_legendre', **QUIET)
        assert exact.completeness_error.abs().max() < 1e-3
    with pytest.raises(ValueError, match='unknown baseline'): explain(model, ids, 3, 'integrated_gradients', baseline='image')


def test_dictionaries_functions_and_probabilities():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8, num_labels=5)
    model, x = noisy(transformers.ViTForImageClassification(config)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    many = dict(method='integrated_gradients', baseline='image', steps=5, **QUIET)
    same(explain(model, dict(pixel_values=x), 1, **many).map, explain(model, x, 1, **many).map)
    difference = explain(model, x, lambda o: o.logits[:, 1] - o.logits[torch.arange(2), [2, 3]], **many)
    same(difference.map, explain(model, x, 1, **many).map - explain(model, x, torch.tensor([2, 3]), **many).map)
    assert explain(model, x, 1, of='probability', **{**many, 'steps': 60}).completeness_error.abs().max() < 1e-3


def test_contexts_of_the_caller():
    model, x = noisy(vit(2)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    def run(): return pm.integrated_gradients(model, x, 1, steps=3, **QUIET)[1]
    expected = run()
    for context in (torch.no_grad, torch.inference_mode, libra):
        with context(): same(run(), expected)
    assert all(p.grad is None for p in model.parameters())


def test_progress_only_where_there_is_some(capsys):
    model, x = noisy(vit(2)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    pm.integrated_gradients(model, x, 1, steps=4, batch_size=8); assert not capsys.readouterr().err
    pm.integrated_gradients(model, x, 1, steps=4, batch_size=4, progress=False); assert not capsys.readouterr().err
    pm.integrated_gradients(model, x, 1, steps=4, batch_size=4); assert 'steps' in capsys.readouterr().err


@pytest.mark.parametrize('name, options, words', [
    ('integrated_gradients', dict(steps=0), '1 or more'), ('integrated_gradients', dict(steps=2.5), 'whole number'),
    ('integrated_gradients', dict(integration='simpson'), 'choose one of midpoint'), ('integrated_gradients', dict(integration='trapezoid', steps=1), 'two steps'),
    ('integrated_gradients', dict(baseline='black'), 'unknown baseline'), ('integrated_gradients', dict(baseline=torch.zeros(3)), r'pass a number, or a tensor \[17, 32\]'),
    ('integrated_gradients_pixels', dict(baseline=torch.zeros(5, 1, 1)), r'\[3, 32, 32\]'), ('input_x_gradient_on_path', dict(steps=-1), '1 or more'),
    ('smooth_grad', dict(samples=0), '1 or more'), ('smooth_grad', dict(noise=-.1), '0 or more'), ('smooth_grad', dict(noise=float('nan')), '0 or more'),
    ('smooth_grad', dict(batch_size=0), 'at least one')])
def test_errors(name, options, words):
    model, x = noisy(vit(2)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=words): explain(model, x, 1, name, **options)


def test_models_without_tokens_have_pixel_maps():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    a = explain(model, x, 1, 'integrated_gradients_pixels', **QUIET)
    assert a.map.shape == (2, 4, 4) and a.completeness_error.abs().max() < 1e-3
    with pytest.raises(NotImplementedError, match='a method of pixels'): explain(model, x, 1, 'integrated_gradients')
