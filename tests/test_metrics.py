"Metrics: answers known by hand, what theory says of a random map, clear words where a question means nothing, and Quantus"
import itertools, math, sys, warnings

import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from kinds import case
from libragrad_nb import explain
from libragrad_nb.adapters import as_quantus
from libragrad_nb.metrics import FRACTIONS, average_precision, completeness, enlarge, faithfulness, iou, pixel_accuracy, pointing_game
from libragrad_nb.removal import Removal, how_many, ranks, removable, without
from libragrad_nb.zoo import load, scenes

LOADED = 'quantus' in sys.modules
seeds = st.integers(0, 10**6)


def rand(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Votes(nn.Module):
    "Patches of 4 x 4 pixels; scores [B, 3] are linear in the patches that are there, so every curve can be added up"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cut = nn.Conv2d(1, 3, 4, 4, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3, bias=False)) for _ in range(2))
        self.calls = []
    def tokens(self, x):
        h = self.cut(x).flatten(2).mT
        for block in self.blocks: h = block(h)
        return h
    def forward(self, x):
        self.calls.append(len(x))
        return self.tokens(x).sum(1)


@pytest.fixture
def votes(): return Votes().double().eval()

@pytest.fixture
def x(): return torch.randn(5, 1, 12, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))  # 3 x 4 patches


def by_hand(model, x, m, t, fractions=FRACTIONS):
    "Log-probabilities [2, K, B], one patch after the other"
    tokens, out = model.tokens(x), []
    for sign in (-1, 1):
        for r in fractions:
            k = int(round(r*12, 6))
            rows = [sorted(range(12), key=lambda p: sign*m[b].flatten()[p].item())[k:] for b in range(len(x))]  # sorted is stable
            out.append([tokens[b, rows[b]].sum(0).log_softmax(-1)[t[b]].item() for b in range(len(x))])
    return torch.tensor(out, dtype=torch.double).view(2, len(fractions), len(x))


# --- faithfulness

@pytest.mark.parametrize('drop', [None, False])
def test_curves_by_hand(votes, x, drop):
    t = torch.tensor([0, 1, 2, 0, 1])
    maps = dict(a=rand(5, 3, 4), ties=(rand(5, 3, 4, seed=1)*3).floor())
    f = faithfulness(votes, x, maps, t, drop=drop, batch_size=7)
    assert f.names == ['a', 'ties'] and f.fractions == FRACTIONS and f.dropped == (drop is None) and f.right.dtype == torch.bool
    for m, name in enumerate(maps):
        torch.testing.assert_close(f.log_probability[:, :, m], by_hand(votes, x, maps[name], t), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(f.probability, f.log_probability.exp())
    torch.testing.assert_close(f.aopc, f.probability[:, :1] - f.probability)
    torch.testing.assert_close(f.log_odds, f.log_probability[:, :1] - f.log_probability)
    assert torch.equal(f.right[0, 0, 0], votes(x).argmax(-1) == t) and torch.equal(f.accuracy, f.right.double().mean(-1))
    torch.testing.assert_close(f.srg(), (f.probability[1] - f.probability[0]).mean(0))
    torch.testing.assert_close(f.srg('aopc'), f.srg())
    y = f.probability
    torch.testing.assert_close(f.area(), .1*(y.sum(1) - (y[:, 0] + y[:, -1])/2))
    torch.testing.assert_close(f.srg(by='area'), f.area()[1] - f.area()[0])


def test_forwards_are_shared(votes, x):
    faithfulness(votes, x, rand(5, 3, 4), 0)
    start = len(votes.calls); faithfulness(votes, x, rand(5, 3, 4), 0, drop=False)
    alone = sum(votes.calls[start:])
    start = len(votes.calls); faithfulness(votes, x, {k: rand(5, 3, 4, seed=k) for k in range(3)}, 0, drop=False)
    assert sum(votes.calls[start:]) - alone == 2*9*2*5 and max(votes.calls) <= 30  # the whole images are asked once


def test_batches_do_not_matter(votes, x):
    a, b = (faithfulness(votes, x, rand(5, 3, 4), 0, batch_size=n) for n in (1, 256))
    torch.testing.assert_close(a.log_probability, b.log_probability)
    assert all(n == 1 for n in votes.calls[1:10])


@settings(deadline=None, max_examples=15)
@given(seeds, st.integers(1, 5))
def test_upside_down_changes_the_curves_over(seed, levels):
    model = Votes().double().eval()
    x, m = torch.randn(3, 1, 12, 16, dtype=torch.double), (rand(3, 3, 4, seed=seed)*levels).floor()  # with ties
    f = faithfulness(model, x, dict(m=m, minus=-m, flat=0*m), 1)
    torch.testing.assert_close(f.log_probability[:, :, 0], f.log_probability[:, :, 1].flip(0))
    torch.testing.assert_close(f.srg()[0], -f.srg()[1])
    assert f.srg()[2].abs().max() < 1e-14  # the same order twice


def test_a_random_map_gains_nothing(votes):
    x = torch.randn(200, 1, 12, 16, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    gain = faithfulness(votes, x, rand(200, 3, 4), 1).srg()[0]
    assert gain.mean().abs() < 3.5*gain.std()/200**.5 and gain.std() > .01


def test_the_predicted_class_is_that_of_the_whole_image(votes, x):
    f = faithfulness(votes, x, rand(5, 3, 4))
    assert torch.equal(f.target, votes(x).argmax(-1)) and f.right[:, 0].all() and not f.right.all()


def test_log_odds_where_the_probability_is_zero(votes, x):
    with torch.no_grad(): votes.cut.weight *= 1e4
    f = faithfulness(votes.float(), x.float(), rand(5, 3, 4), 0)
    assert (f.probability == 0).any() and f.log_odds.isfinite().all() and f.log_odds.abs().max() > 200


@pytest.mark.parametrize('P', [10, 30, 49, 64, 90, 196, 576])
def test_shares_are_counted_without_rounding(P):
    assert [how_many(r, torch.tensor(P)).item() for r in FRACTIONS] == [k*P//10 for k in range(10)]


def test_ranks_of_what_may_not_go():
    turn = ranks(torch.tensor([[[5., 1, 9, 3]]]), torch.tensor([[True, True, False, True]])).squeeze()
    assert turn.tolist() == [[0, 2, 3, 1], [2, 0, 3, 1]]


@pytest.mark.parametrize('kind, depth, dropped', [('vit', 2, True), ('registers', 2, True), ('siglip', 2, True), ('mixer', 2, False), ('eva02', 2, False),
                                                  ('swin', (2, 2), False), ('convnext', (2, 2, 2, 2), False), ('hiera', (1, 1, 2, 1), False)])
def test_kinds_of_models(kind, depth, dropped):
    model, x = case(kind, depth)
    r = Removal(model, x)
    f = faithfulness(model, x, rand(2, *r.state.grid).double(), 1, fractions=(0, .5))
    assert f.dropped == r.drop == dropped
    with torch.no_grad(): torch.testing.assert_close(f.log_probability[0, 0, 0], model(x).log_softmax(-1)[:, 1])
    assert (f.probability[:, 1] != f.probability[:, 0]).all()
    if not dropped:
        with pytest.raises(ValueError, match='needs all its tokens'): faithfulness(model, x, rand(2, *r.state.grid), drop=True)


def test_dropping_is_what_it_says():
    "Against a hand-written forward pass of timm's blocks"
    model, x = case('registers', 2)
    m = rand(2, 4, 4)
    f = faithfulness(model, x, m, 1, fractions=(.25,))
    kept = m.flatten(1).argsort(1)[:, :12] + 5  # class token and four registers in front
    with torch.no_grad():
        h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        h = torch.stack([torch.cat([t[:5], t[k]]) for t, k in zip(h, kept)])
        logits = model.forward_head(model.norm(model.blocks(h)))
    torch.testing.assert_close(f.log_probability[0, 1, 0], logits.log_softmax(-1)[:, 1])


def test_zeroing_is_where_the_map_says():
    "Hiera keeps its tokens in an order of its own: covering one patch there moves the tokens of that patch"
    model, x = case('hiera', (1, 1, 2, 1))
    r, seen = Removal(model, x), []
    gone = torch.zeros(2, *r.state.grid, dtype=torch.bool); gone[:, 3, 10] = True
    h = torch.ones(2, r.state.n, 4)
    rows = without(h, gone.flatten(1), r.state, False)[..., 0] == 0
    place = model.reroll(torch.arange(r.state.n).view(1, -1, 1), 0)[0, ..., 0][3, 10]
    assert rows.nonzero().tolist() == [[0, place], [1, place]]


# --- texts

def llama(kind='LlamaForCausalLM', **more):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, **more)
    return getattr(transformers, kind)(config).eval().double()

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 2], [1, 4, 3, 8, 10, 0, 0]])
PADDED = dict(input_ids=IDS, attention_mask=(IDS > 0).long())


def test_words_of_a_llama():
    model = llama()
    can = removable(Removal(model, PADDED))
    assert can.int().tolist() == [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]]  # no padding, and not the word that asks
    f = faithfulness(model, PADDED, dict(a=explain(model, PADDED).map, b=rand(2, 1, 7)), fractions=(0, .5))
    assert not f.dropped and f.right[:, 0].all() and (f.probability[:, 1] != f.probability[:, 0]).all()
    order = rand(2, 1, 7)[1, 0, :4].argsort(descending=True)
    h = model.get_input_embeddings()(IDS[1:, :5]).detach()
    h[0, order[:2]] = 0  # half of four, without the padding
    with torch.no_grad(): by_hand = model(inputs_embeds=h).logits[0, -1].log_softmax(-1)[f.target[1]]
    torch.testing.assert_close(f.log_probability[0, 1, 1, 1], by_hand, rtol=1e-6, atol=0)  # its RMSNorm computes in float32


def test_words_that_stay():
    model, keep = llama(), torch.zeros(2, 7, dtype=torch.bool)
    keep[:, 0] = True
    assert removable(Removal(model, PADDED), None, keep).sum(1).tolist() == [5, 3]
    assert faithfulness(model, PADDED, rand(2, 1, 7), keep=keep).probability.shape == (2, 10, 1, 2)
    with pytest.raises(ValueError, match='booleans'): faithfulness(model, PADDED, rand(2, 1, 7), keep=keep[:1])
    keep[:] = True
    with pytest.raises(ValueError, match='no token'): faithfulness(model, PADDED, rand(2, 1, 7), keep=keep)


def test_the_class_token_of_bert_stays():
    transformers = pytest.importorskip('transformers')
    config = transformers.BertConfig(vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    assert removable(Removal(model, IDS)).int().tolist() == [[0, 1, 1, 1, 1, 1, 1]]*2


# --- questions that mean nothing

def test_words_for_wrong_questions(votes, x):
    m = rand(5, 3, 4)
    for match, kind, more in [('only classes', ValueError, dict(target=lambda o: o[:, 0])), ('only classes', ValueError, dict(target=[0, 1])),
                              ('out of range', ValueError, dict(target=3)), ('stay below 1', ValueError, dict(target=0, fractions=(0, .5, 1))),
                              ('stay below 1', ValueError, dict(target=0, fractions=(.5, .2))), ('texts', ValueError, dict(target=0, keep=m > .5))]:
        with pytest.raises(kind, match=match): faithfulness(votes, x, m, **more)
    with pytest.raises(ValueError, match=r'spread\(map, \(3, 4\)\)'): faithfulness(votes, x, rand(5, 12, 16), 0)
    with pytest.raises(ValueError, match='NaN'): faithfulness(votes, x, m*math.nan, 0)
    with pytest.raises(ValueError, match=r'map\[None\]'): faithfulness(votes, x, m[0], 0)
    with pytest.raises(ValueError, match='no maps'): faithfulness(votes, x, {}, 0)
    f = faithfulness(votes, x, m, 0)
    with pytest.raises(ValueError, match='no score'): f.mean('lift')
    with pytest.raises(ValueError, match='mean'): f.srg(by='median')


def test_one_output_has_no_probability(votes, x):
    class One(nn.Module):
        def __init__(self): super().__init__(); self.inner = votes
        def forward(self, x): return self.inner(x)[:, :1]
    with pytest.raises(ValueError, match='softmax needs two'): faithfulness(One().eval(), x, rand(5, 3, 4), 0)


def test_models_without_tokens():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    with pytest.raises(NotImplementedError, match='no token states'): faithfulness(model, torch.randn(2, 3, 4, 4), rand(2, 2, 2), 0)


def test_nothing_is_left_behind(votes, x):
    before = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in votes.modules()]
    faithfulness(votes, x, rand(5, 3, 4), 0)
    assert before == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in votes.modules()]


def test_tables_and_pictures(votes, x):
    f = faithfulness(votes, x, {'a': rand(5, 3, 4), 'b': rand(5, 3, 4, seed=1)}, 0)
    table = f.table(('probability', 'log_odds'))
    assert table.shape == (2, 8) and list(table.index) == ['a', 'b']
    assert table['probability', 'SRG']['b'] == pytest.approx(f.srg()[1].mean().item())
    assert '<table' in f._repr_html_() and len(f.plot('accuracy').axes) == 2 and '2 maps, 5 images' in repr(f)


# --- completeness

def test_completeness_by_hand():
    model, x = case('vit', 3)
    c = completeness(model, x, torch.tensor([1, 4]), ('plain', 'libra'), batch_size=1)
    assert c.fullgrad.shape == (2, 4, 2) and c.fullgrad[1].abs().max() < 1e-10 < 1e-3 < c.fullgrad[0].abs().max()
    whole = x.clone().requires_grad_()
    score = model(whole).gather(1, torch.tensor([[1], [4]]))[:, 0]
    g, = torch.autograd.grad(score.sum(), whole)
    torch.testing.assert_close(c.score, score.detach())
    torch.testing.assert_close(c.input_x_gradient[0, 0], (score - (g*whole).sum((1, 2, 3))).detach())
    a = explain(model, x, torch.tensor([1, 4]), 'fullgrad@2', 'plain')
    torch.testing.assert_close(c.fullgrad[0, 3], a.completeness_error)
    assert c.table()['fullgrad', 'plain'].tolist() == pytest.approx(c.fullgrad[0].abs().mean(-1).tolist())
    assert len(c.plot().axes) == 2 and '<table' in c._repr_html_()
    with pytest.raises(ValueError, match='one target at a time'): completeness(model, x, [1, 4])


# --- on the object

def expected_ap(k, n):
    h = sum(1/i for i in range(1, n + 1))
    return (h + (k - 1)/(n - 1)*(n - h))/n


@pytest.mark.parametrize('k, n', [(1, 4), (2, 5), (4, 5), (4, 4)])
def test_average_precision_of_all_rankings(k, n):
    every = torch.tensor(list(itertools.permutations(range(n))), dtype=torch.double).view(-1, 1, n)
    masks = (torch.arange(n) < k).expand(len(every), 1, n)
    assert average_precision(every, masks).double().mean().item() == pytest.approx(expected_ap(k, n), abs=1e-6)


def noise(B=60, side=24, p=.3):
    masks = rand(B, side, side, seed=1) < p
    return rand(B, side, side, seed=2), masks, masks.double().mean((1, 2))

def agrees(found, theory):
    d = found.double() - theory
    assert d.mean().abs() < 3.5*d.std()/len(d)**.5 and d.std() > 0


def test_what_a_random_map_scores():
    maps, masks, share = noise()
    agrees(average_precision(maps, masks), torch.tensor([expected_ap(int(m.sum()), m.numel()) for m in masks]))
    agrees(pointing_game(maps, masks), share)
    for t, overlap, right in zip((.1, .5, .8), iou(maps, masks, (.1, .5, .8)), pixel_accuracy(maps, masks, (.1, .5, .8))):
        q = 1 - t  # share of a uniform map above t
        agrees(right, q*share + t*(1 - share))
        # q*share of all pixels over q + share - q*share of them, a ratio of means: right to the order of one over the pixels
        d = overlap.double() - q*share/(q + share - q*share)
        assert d.mean().abs() < 3.5*d.std()/len(d)**.5 + 1/masks[0].numel()


@settings(deadline=None, max_examples=25)
@given(seeds, st.floats(.1, 10), st.floats(-5, 5))
def test_scale_and_shift_do_not_matter(seed, scale, shift):
    m, masks = rand(3, 6, 6, seed=seed).double(), rand(3, 12, 12, seed=seed + 1) > .6
    for score in (average_precision, pointing_game, iou, pixel_accuracy):
        torch.testing.assert_close(score(scale*m + shift, masks), score(m, masks), atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_ignored_pixels_might_as_well_not_be_there(seed):
    m, masks = rand(2, 6, 8, seed=seed), rand(2, 6, 8, seed=seed + 1) > .5
    masks[:, :, 0] |= ~masks[:, :, :4].any((1, 2))[:, None]
    ignore = (torch.arange(8) > 3).expand(2, 6, 8)
    m[:, 0, 0], m[:, 1, 0] = 0, 1  # the same scale on both
    for score in (average_precision, pointing_game, iou, pixel_accuracy):
        torch.testing.assert_close(score(m, masks, ignore=ignore), score(m[..., :4], masks[..., :4]))


def test_perfect_flat_and_hopeless_maps():
    masks = rand(4, 8, 8) > .7
    share = masks.double().mean((1, 2))
    for flat in (torch.zeros(4, 2, 2), torch.full((4, 2, 2), .3), torch.full((4, 2, 2), -1e6)):
        torch.testing.assert_close(average_precision(flat, masks).double(), share, atol=1e-6, rtol=0)
        torch.testing.assert_close(pointing_game(flat, masks), share)
        assert (iou(flat, masks) == 0).all()
        torch.testing.assert_close(pixel_accuracy(flat, masks), (1 - share).expand(5, 4))
    assert all((score(masks.float(), masks) == 1).all() for score in (average_precision, pointing_game, iou, pixel_accuracy))
    assert (iou(1 - masks.float(), masks) == 0).all() and (pointing_game(1 - masks.float(), masks) == 0).all()
    torch.testing.assert_close(average_precision(1 - masks.float(), masks).double(), share, atol=1e-6, rtol=0)  # all of it is found in the last step


def test_ties_share_the_point():
    m = torch.zeros(1, 2, 4); m[0, 0, :3] = 1
    assert pointing_game(m, torch.tensor([[[True, False, False, True], [False]*4]])).item() == pytest.approx(1/3)
    assert pointing_game(m, torch.tensor([[[True, False, False, True], [False]*4]]), m.bool() & (torch.arange(4) == 1)) == .5


def test_average_precision_is_sklearns():
    from sklearn.metrics import average_precision_score
    m, masks = rand(2, 4, 4), rand(2, 16, 16) > .8
    fine = F.interpolate(m[:, None].double(), (16, 16), mode='bicubic')[:, 0]
    assert torch.equal(enlarge(m.double(), (16, 16)), fine)
    known = [average_precision_score(k.flatten().numpy(), f.flatten().numpy()) for k, f in zip(masks, fine)]
    assert average_precision(m, masks).tolist() == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize('score', [average_precision, iou, pixel_accuracy, pointing_game])
def test_words_for_wrong_masks(score):
    m, masks = rand(2, 4, 4), torch.ones(2, 8, 8, dtype=torch.bool)
    empty, none = masks.clone(), torch.zeros_like(masks)
    empty[1] = False
    for match, kind, args, more in [('m > 127', TypeError, (m, masks.byte()*255), {}), ('booleans', TypeError, (m, masks.numpy()), {}), ('2 maps, and masks', ValueError, (m, masks[:1]), {}),
                                    ('image 1 is empty', ValueError, (m, empty), {}), ('image 0 is ignored', ValueError, (m, masks), dict(ignore=masks)),
                                    ('ignore is', ValueError, (m, masks), dict(ignore=none[:, :4])), ('booleans', TypeError, (m, masks), dict(ignore=none.byte())),
                                    ('NaN', ValueError, (m*math.nan, masks), {}), (r'map\[None\]', ValueError, (m[0], masks), {}),
                                    ('at least as fine', ValueError, (rand(2, 9, 9), masks), {})]:
        with pytest.raises(kind, match=match): score(*args, **more)


# --- Quantus

def test_importing_does_not_need_quantus():
    assert not LOADED  # when this file was read


@pytest.fixture(scope='module')
def asked():
    s = scenes(6, digits=2, seed=3)
    return load('vit_digits'), s, s.images.numpy(), s.labels[:, 0].numpy(), s.masks[:, :1].numpy()


def test_adapter_gives_the_map(asked):
    vit, s, x, y, _ = asked
    a = explain(vit, s.images, s.labels[:, 0], 'input_x_gradient', 'plain').map
    f = as_quantus('input_x_gradient', 'plain')
    found = f(vit, x.astype(np.float64), y, device='cpu')  # as some metrics disturb images
    assert isinstance(found, np.ndarray) and found.shape == (6, 1, 64, 64)
    np.testing.assert_allclose(found[:, 0], F.interpolate(a[:, None], (64, 64), mode='bicubic')[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(as_quantus('input_x_gradient', 'plain', smooth=False)(vit, x, y).sum((1, 2, 3)), a.sum((1, 2)), rtol=1e-4)
    np.testing.assert_array_equal(as_quantus()(vit, x, y, method='input_x_gradient', rules='plain'), f(vit, x, y))
    assert as_quantus('pixel_x_gradient')(vit, x[:1], y[:1]).shape == (1, 1, 64, 64)


def test_metrics_of_quantus(asked):
    quantus = pytest.importorskip('quantus')
    vit, s, x, y, masks = asked
    quiet, signed = dict(disable_warnings=True), dict(disable_warnings=True, abs=False, normalise=False)
    def knows_nothing(model, inputs, targets, **more):
        noise = torch.randn(len(inputs), 1, 8, 8, generator=torch.Generator().manual_seed(len(inputs)))
        return F.interpolate(noise, inputs.shape[-2:], mode='bicubic').numpy()
    def mean(metric, f):
        np.random.seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            values = np.asarray(metric(vit, x, y, s_batch=masks, explain_func=f, device='cpu'), float)
        assert values.shape == (6,) and np.isfinite(values).all()
        return values.mean()
    for metric in (quantus.AttributionLocalisation(positive_attributions=True, **signed), quantus.RelevanceRankAccuracy(**signed)):
        assert mean(metric, as_quantus()) > 2*mean(metric, knows_nothing)
    correlation = quantus.FaithfulnessCorrelation(nr_runs=6, subset_size=512, return_aggregate=False, **signed)
    assert -1 <= mean(correlation, as_quantus()) <= 1
    assert 0 < mean(quantus.Sparseness(**quiet), as_quantus()) < 1
    assert 0 < mean(quantus.MaxSensitivity(nr_samples=2, lower_bound=.02, **quiet), as_quantus())


def test_shuffled_weights_change_the_map(asked):
    quantus = pytest.importorskip('quantus')
    vit, _, x, y, _ = asked
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    sanity = quantus.MPRT(similarity_func=quantus.correlation_pearson, skip_layers=True, abs=False, normalise=False, disable_warnings=True, seed=0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        alike = sanity(vit, x[:2], y[:2], explain_func=as_quantus(), device='cpu')
    values = np.array(list(alike.values()), float)
    assert np.isfinite(values).all() and values[-1].mean() < .5
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())
