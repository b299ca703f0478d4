"Activation patching against a naive loop over patches, on every kind of model"
import kinds, pytest, torch
from kinds import noisy, vit

from libragrad_nb import explain, methods
from libragrad_nb.patching import caap, middle
from libragrad_nb.restart import Rest
from libragrad_nb.tokens import on_grid

DEPTH = dict(vit=4, registers=4, siglip=4, mixer=4, eva02=4, swin=(1, 4), convnext=(1, 4, 1, 1), hiera=(1, 4, 1, 1))
RANGE = dict(swin=(2, 4), convnext=(2, 4), hiera=(2, 4))
QUIET = dict(progress=False)


@pytest.fixture(scope='module', params=DEPTH)
def case(request):
    return *kinds.case(request.param, DEPTH[request.param], swin=28), RANGE.get(request.param, (1, 3))


def loop(model, x, neutral, target, a, b, of):
    "One patch, one image, one run of the model at a time, with hooks that know nothing of `Rest`"
    source, blocks = Rest(model, x, target, of), []
    def score(x):
        with torch.no_grad(): y = model(x)
        return (y.softmax(-1) if of == 'probability' else y)[0, target]
    with torch.no_grad():  # which modules are blocks a to b - 1: those whose inputs are the states
        place = {m: i for i, ((m, _), _) in enumerate(source.places)}
    state, out = source.states[a], torch.zeros(len(x), source.states[a].n, dtype=x.dtype)
    for n in range(len(x)):
        for p in range(state.prefix, state.n):
            def put(m, args):
                i = place[m]
                if not a <= i < b: return None
                h = args[0].clone()
                if len(state.axes) == 1: h[:, p] = source.inputs[i][n:n+1, p]
                else:
                    row, col = divmod(p, state.grid[1])
                    at = (slice(None), row, col) if state.axes == (1, 2) else (slice(None), slice(None), row, col)
                    h[at] = source.inputs[i][n:n+1][at]
                return (h, *args[1:])
            handles = [m.register_forward_pre_hook(put) for m in place]
            out[n, p] = score(neutral[n:n+1])
            for h in handles: h.remove()
            out[n, p] -= score(neutral[n:n+1])
    return on_grid(out, state, state.grid, state.prefix)


@pytest.mark.parametrize('of', ['probability', 'logit'])
def test_agrees_with_a_loop(case, of):
    model, x, (a, b) = case
    q, tokens, unplaced = caap(model, x, 1, blocks=(a, b), score=of, batch_size=14, **QUIET)
    torch.testing.assert_close(tokens, loop(model, x, 0*x, 1, a, b, of), rtol=1e-9, atol=1e-12)
    assert tokens[:, q.prefix:].abs().min() > 0 and not tokens[:, :q.prefix].any()
    with torch.no_grad(): empty = model(0*x); empty = (empty.softmax(-1) if of == 'probability' else empty)[:, 1]
    torch.testing.assert_close(unplaced, empty, rtol=1e-12, atol=0)


def test_other_neutral_images():
    torch.manual_seed(0)
    model, x = noisy(vit(4)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    one = torch.randn(3, 32, 32, dtype=torch.float64)
    for neutral in (one, one.expand(2, -1, -1, -1), .5):
        _, tokens, _ = caap(model, x, 1, neutral=neutral, **QUIET)
        full = torch.as_tensor(neutral, dtype=x.dtype).expand_as(x).clone()
        torch.testing.assert_close(tokens, loop(model, x, full, 1, *middle(4), 'probability'), rtol=1e-9, atol=1e-12)
    assert not caap(model, x, 1, neutral=x, **QUIET)[1].abs().max() > 1e-12  # the scene in itself changes nothing


def test_all_of_it_is_the_source():
    "Where every token is replaced at a later block, class token and all, the source's score is back"
    torch.manual_seed(0)
    model, x = noisy(vit(4)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    source, empty = Rest(model, x, 1), Rest(model, 0*x, 1, block=1)
    with torch.no_grad(): back = empty(empty.h, lambda i, h, rows: source.inputs[i] if i == 3 else h)
    torch.testing.assert_close(back, source.score, rtol=1e-12, atol=0)
    assert not torch.allclose(empty.score, source.score)


def test_batches_targets_and_explain():
    torch.manual_seed(0)
    model, x = noisy(vit(4)), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    whole = explain(model, x, [1, None], 'caap', **QUIET)
    for a, target in zip(whole, (1, None)):
        for batch_size in (1, 7, 1000):
            torch.testing.assert_close(explain(model, x, target, 'caap', batch_size=batch_size, **QUIET).map, a.map, rtol=1e-9, atol=1e-12)
        for i in range(3): torch.testing.assert_close(explain(model, x[i:i+1], target, 'caap', **QUIET).map[0], a.map[i], rtol=1e-9, atol=1e-12)
    with torch.no_grad(): torch.testing.assert_close(whole[0].score, model(x).softmax(-1)[:, 1])
    same = explain(model, x, 1, 'caap', of='probability', blocks=range(1, 3), **QUIET)
    assert torch.equal(same.map, whole[0].map) and same.map.shape == (3, 4, 4) and same.prefix.shape == (3, 1)
    torch.testing.assert_close(same.score - same.unplaced - same.map.sum((1, 2)), same.completeness_error)


def test_functions_and_labels_of_their_own():
    torch.manual_seed(0)
    model, x = noisy(vit(4)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([2, 3])
    parts = [caap(model, x, t, score='logit', **QUIET)[1] for t in (1, labels)]
    difference = caap(model, x, lambda o: o[:, 1] - o[torch.arange(2), labels], **QUIET)[1]
    torch.testing.assert_close(difference, parts[0] - parts[1], rtol=1e-9, atol=1e-12)


def test_text_and_dictionaries():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    model, ids = noisy(transformers.GPT2LMHeadModel(config)), torch.randint(2, 50, (2, 6))
    a = explain(model, dict(input_ids=ids), 3, 'caap', neutral=torch.zeros(6).long(), blocks=(0, 1), score='logit', **QUIET)
    with torch.no_grad():
        for p in range(6):
            one = torch.zeros_like(ids); one[:, p] = ids[:, p]
            expected = model(one).logits[:, -1, 3] - model(0*ids).logits[:, -1, 3]
            torch.testing.assert_close(a.map[:, 0, p], expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match='a tensor of token ids'): explain(model, ids, 3, 'caap')


def test_no_gradient_is_left_behind():
    torch.manual_seed(0)
    model, x = noisy(vit(4)), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    model.set_grad_checkpointing(True)  # no gradients, so no harm
    tokens = caap(model, x, 1, **QUIET)[1]
    assert not tokens.requires_grad and tokens.any()
    with torch.inference_mode(): torch.testing.assert_close(caap(model, x, 1, **QUIET)[1].clone(), tokens)
    assert not any(m._forward_pre_hooks for m in model.modules()) and methods['caap'].unit == 'score'


@pytest.mark.parametrize('options, words', [
    (dict(blocks=(2, 2)), 'blocks 0 to 3'), (dict(blocks=(0, 5)), 'blocks 0 to 3'), (dict(blocks=(-1, 2)), 'blocks 0 to 3'), (dict(blocks=3), 'must be a pair'),
    (dict(blocks=range(0, 4, 2)), 'must be a pair'), (dict(blocks=(1., 2.)), 'no range of blocks'), (dict(neutral='black'), "unknown neutral input 'black'"),
    (dict(neutral=torch.zeros(3, 5, 5)), r'pass one like \[3, 32, 32\]'), (dict(score='loss'), "'logit' or 'probability'"), (dict(batch_size=0), 'at least one'),
    (dict(score='logit', of='probability'), 'contradict'), (dict(target=lambda o: o[:, 0], score='probability'), 'is for classes')])
def test_errors(options, words):
    model, x = noisy(vit(4)), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=words): explain(model, x, method='caap', **options)


def test_tokens_that_do_not_keep_their_places():
    torch.manual_seed(0)
    for name, blocks in (('swin', (0, 2)), ('hiera', (0, 3)), ('convnext', (0, 3))):
        model, x = kinds.case(name, DEPTH[name], swin=28)
        with pytest.raises(NotImplementedError, match='do not keep their places'): caap(model, x, 1, blocks=blocks)
