"Models that users brought, and what went wrong with them once"
import copy, warnings

import pytest, timm, torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from libragrad_nb import explain, ledger
from libragrad_nb.trace import as_function, trace

transformers = pytest.importorskip('transformers')


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def noisy(model):
    for p in model.parameters():
        if p.ndim < 2: nn.init.normal_(p, std=.3)
    return model.double().eval()


class Parallel(nn.Module):
    "Two branches beside each other, the larger of them a list of blocks"
    def __init__(self, C=8):
        super().__init__()
        self.patch = nn.Conv2d(3, C, 8, 8)
        self.a = nn.ModuleList(nn.Linear(C, C) for _ in range(3))
        self.m = nn.ModuleList(nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 2*C), nn.GELU(), nn.Linear(2*C, C)) for _ in range(3))
        self.head = nn.Linear(C, 5)
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for a, m in zip(self.a, self.m): x = x + a(x) + m(x)
        return self.head(x.mean(1))


def test_branches_beside_the_blocks():
    model, x = noisy(Parallel()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    t, = trace(model, x)
    assert len(t.grids) == 3
    for block in (None, 0, 1, 2): assert t.completeness_error(block).abs().max() < 1e-12


def test_blocks_that_overwrite_their_input():
    class InPlace(Parallel):
        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            for a, m in zip(self.a, self.m):
                x += a(x)
                x.add_(m(x))
            return self.head(x.mean(1))
    model, x = noisy(InPlace()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    t, = trace(model, x)
    for block in (None, *range(len(t.grids))): assert t.completeness_error(block).abs().max() < 1e-12


def test_encoder_with_a_shared_embedding():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model, ids = noisy(transformers.T5EncoderModel(config)), torch.randint(0, 50, (2, 6))
    a = explain(model, ids, target=lambda out: out.last_hidden_state[:, -1, 0])
    assert a.map.shape == (2, 1, 6)
    f, e = as_function(model, ids)
    assert e.shape == (2, 6, 16) and torch.equal(f(e).last_hidden_state, model(ids).last_hidden_state)
    assert not ledger(f, e, lambda out: out.last_hidden_state[:, -1, 0], parts=model).leaks()


def test_no_embedding_for_these_ids():
    class Words(nn.Module):
        def forward(self, ids): return ids.double()[:, :3]
    with pytest.raises(ValueError, match='no embedding'): as_function(Words().eval(), torch.zeros(2, 4).long())


def test_a_cache_is_not_written_to():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    model, ids = noisy(transformers.GPT2LMHeadModel(config)), torch.randint(0, 50, (1, 8))
    with torch.no_grad(): past = model(ids[:, :5], use_cache=True).past_key_values
    given = dict(input_ids=ids[:, 5:], past_key_values=past)
    scores = [explain(model, given).score.item() for _ in range(3)]
    assert scores[0] == scores[1] == scores[2] and past.get_seq_length() == 5


def test_reentrant_checkpoints_are_refused_in_plain_words():
    model = noisy(Parallel())
    class Checkpointed(nn.Module):
        def __init__(self): super().__init__(); self.model = model
        def forward(self, x): return checkpoint(self.model, x, use_reentrant=True)
    with pytest.raises(ValueError, match='recomputes its blocks'): explain(Checkpointed().eval(), torch.randn(1, 3, 32, 32, dtype=torch.float64))


def test_the_warning_does_not_blame_an_operation_that_is_innocent():
    "Two images and two texts: a constant of the texts cannot be told from one of the images by its shape"
    class Pairs(nn.Module):
        def __init__(self): super().__init__(); self.image, self.text = nn.Conv2d(3, 4, 32), nn.Parameter(torch.randn(2, 4))
        def forward(self, x): return (self.text@self.image(x).flatten(1).T - 10).T
    model, x = noisy(Pairs()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with pytest.warns(UserWarning, match='No operation leaks.*explain the images one at a time') as said: explain(model, x, target=0)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert explain(model, x[:1], target=0).completeness_error.abs() < 1e-12  # the advice helps


def test_compiled_models():
    "The wrapper of torch.compile passes on attributes, so it looks like a model that lists features"
    model, x = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=2).eval(), torch.randn(2, 3, 64, 64)
    compiled, stock = (explain(m, x, target=3) for m in (torch.compile(model, backend='eager'), model))
    assert compiled.method == 'fullgrad_plus' and torch.equal(compiled.map, stock.map)
