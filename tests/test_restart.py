"Models run again from the input of a block: every kind of model, batch and target"
import kinds, pytest, torch
from kinds import noisy, vit
from torch import nn
from torch.utils.checkpoint import checkpoint

from libragrad_nb.core import libra
from libragrad_nb.restart import Rest
from libragrad_nb.trace import trace
from libragrad_nb.zoo import load

DEPTH = dict(vit=3, registers=3, siglip=3, eva02=3, swin=(2, 2), convnext=(1, 1, 2, 1), hiera=(1, 1, 2, 1), mixer=None)


@pytest.fixture(scope='module', params=DEPTH)
def case(request):
    if request.param != 'mixer': return kinds.case(request.param, DEPTH[request.param], convnext=64)
    torch.manual_seed(0)
    return noisy(load('mixer_digits')), torch.randn(2, 3, 64, 64, dtype=torch.float64)


def test_unchanged_states_give_the_stock_score(case):
    model, x = case
    with torch.no_grad(): stock = model(x).amax(-1)
    for block in (None, *range(len(Rest(model, x).inputs))):
        rest = Rest(model, x, block=block)
        with torch.no_grad():
            torch.testing.assert_close(rest(rest.h), stock, rtol=1e-13, atol=1e-13)
            assert rest.together
            torch.testing.assert_close(rest(rest.h.repeat(3, *[1]*(rest.h.ndim - 1))), stock.repeat(3), rtol=1e-12, atol=1e-12)


def test_other_states_are_run_in_step_major_order(case):
    model, x = case
    rest = Rest(model, x, block=-1)
    other = Rest(model, x + 1, block=-1)
    with torch.no_grad():
        both = rest(torch.cat([rest.h, other.h]))
        torch.testing.assert_close(both[2:], model(x + 1).gather(1, rest.target[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    assert (both[2:] - rest.score).abs().min() > 1e-6


@pytest.mark.parametrize('rules', ['plain', 'libra'])
def test_gradients_are_those_of_a_trace(case, rules):
    model, x = case
    t, = trace(model, x, rules=rules)
    for block in range(len(t.grids)):
        rest = Rest(model, x, block=block)
        h = rest.h.clone().requires_grad_()
        with libra(model, rules): score = rest(h)
        g, = torch.autograd.grad(score.sum(), h)
        tokens = rest.tokens(g*h)
        assert rest.grid == t.grids[block]
        if tokens.shape == t.input_x_gradient[block].shape:
            torch.testing.assert_close(tokens, t.input_x_gradient[block], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(tokens.sum(-1), t.input_x_gradient[block].sum(-1), rtol=1e-9, atol=1e-10)


def test_questions_agree_with_a_trace(case):
    model, x = case
    t, q = trace(model, x, target=1, of='probability')[0], Rest(model, x, target=1, of='probability').question('libra')
    torch.testing.assert_close(q.score, t.score, rtol=1e-12, atol=0)
    assert torch.equal(q.target, t.target) and q.rules == t.rules and torch.equal(q.images, x)


transformers = pytest.importorskip('transformers')

def gpt2(**more):
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1, **more)
    return noisy(transformers.GPT2LMHeadModel(config))


def test_hugging_face_images():
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8, num_labels=5)
    model, x = noisy(transformers.ViTForImageClassification(config)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for given in (x, dict(pixel_values=x)):
        for block in (None, 0, 2):
            rest = Rest(model, given, block=block)
            with torch.no_grad():
                assert torch.equal(rest(rest.h), model(x).logits.amax(-1)) and rest.together
                torch.testing.assert_close(rest(torch.cat([rest.h]*3)), rest.score.repeat(3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('block', [None, 0, 2])
def test_text(block):
    torch.manual_seed(0)
    model, ids = gpt2(), torch.randint(2, 50, (2, 7))
    rest = Rest(model, ids, block=block)
    with torch.no_grad():
        assert torch.equal(rest(rest.h), model(ids).logits[:, -1].amax(-1)) and rest.together
        torch.testing.assert_close(rest(torch.cat([rest.h]*3)), rest.score.repeat(3), rtol=1e-12, atol=1e-12)
    assert rest.tokens(rest.h).shape == ((2, 1, 7) if block is None else (2, 7))


@pytest.mark.parametrize('block', [None, 0, 2])
def test_padded_text(block):
    "Each text has a mask of its own, padding in front, so that it matters"
    torch.manual_seed(0)
    model, ids = gpt2(), torch.randint(2, 50, (2, 7))
    mask = torch.ones(2, 7).long(); mask[1, :3] = 0
    rest = Rest(model, dict(input_ids=ids, attention_mask=mask), block=block)
    with torch.no_grad():
        assert torch.equal(rest(torch.cat([rest.h]*2)), rest.score.repeat(2)) and not rest.together
        changed = rest(torch.cat([rest.h, 2*rest.h]))
        assert torch.equal(changed[2:], rest(2*rest.h)) and not torch.allclose(changed[2:], rest.score)


def test_a_cache_that_knows_its_batch():
    torch.manual_seed(0)
    model, ids = gpt2(), torch.randint(2, 50, (1, 8))
    with torch.no_grad(): past = model(ids[:, :5], use_cache=True).past_key_values
    rest = Rest(model, dict(input_ids=ids[:, 5:], past_key_values=past))
    with torch.no_grad(): assert torch.equal(rest(torch.cat([rest.h]*3)), rest.score.repeat(3))
    assert not rest.together and past.get_seq_length() == 5


def test_a_batch_size_fixed_before_the_block():
    class Fixed(nn.Module):
        def __init__(self): super().__init__(); self.vit = vit(3)
        def forward(self, x):
            B = len(x)
            return self.vit(x).view(B, 5)
    model, x = noisy(Fixed()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    rest = Rest(model, x)
    with torch.no_grad(): assert torch.equal(rest(torch.cat([rest.h]*3)), rest.score.repeat(3))
    assert not rest.together


def test_functions_as_targets():
    model, x = noisy(vit(3)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([1, 3])
    anywhere, here = (lambda o: o[:, 1] - o[:, 2]), (lambda o: o[torch.arange(2), labels])
    for target, together in ((anywhere, True), (here, False)):
        rest = Rest(model, x, target)
        with torch.no_grad():
            torch.testing.assert_close(rest(torch.cat([rest.h]*3)), target(model(x)).repeat(3), rtol=1e-12, atol=1e-12)
        assert rest.target is None and rest.together == together


def test_edits_know_their_rows():
    "One run for all states, and one run for each state, of the same edited model"
    model, x = noisy(vit(3)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    more = torch.randn(6, 17, 32, dtype=torch.float64)
    def edit(i, h, rows): return h + i*more[rows]
    wide, narrow = Rest(model, x), Rest(model, x)
    narrow._together = False
    h = torch.cat([wide.h]*3)
    with torch.no_grad():
        torch.testing.assert_close(wide(h, edit), narrow(h, edit), rtol=1e-12, atol=1e-12)
        h = model.blocks[0](h)
        h = model.blocks[1](h + more)
        expected = model.forward_head(model.norm(model.blocks[2](h + 2*more))).gather(1, wide.target.repeat(3)[:, None])[:, 0]
        torch.testing.assert_close(wide(torch.cat([wide.h]*3), edit), expected, rtol=1e-12, atol=1e-12)


def test_a_block_that_is_called_at_every_depth_and_overwrites_its_input():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 5)
            self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        def forward(self, x):
            h = self.patch(x).flatten(2).mT
            for block in [*self.blocks, *self.blocks]: h = block(h); h.mul_(1.1)
            return self.head(h.mean(1))
    model, x = noisy(Shared()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert len(Rest(model, x).inputs) == 4
    t, = trace(model, x)
    for block in range(4):
        rest = Rest(model, x, block=block)
        h = rest.h.clone().requires_grad_()
        with libra(model): score = rest(h)
        torch.testing.assert_close(score, rest.score, rtol=0, atol=0)
        g, = torch.autograd.grad(score.sum(), h)
        torch.testing.assert_close(rest.tokens(g*h), t.input_x_gradient[block], rtol=1e-9, atol=1e-11)


def test_a_residual_beside_the_block_is_refused():
    "What is put into the block would not reach it; and a silent error is worse than none"
    class Beside(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.last, self.patch, self.head = last, nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 5)
            self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        def forward(self, x):
            h = self.blocks[0](self.patch(x).flatten(2).mT)
            return self.head((h*self.last + self.blocks[1](h)).mean(1))
    model, x = noisy(Beside(1)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert len(trace(model, x)[0].grids) == 2
    with pytest.raises(NotImplementedError, match='block 1 also goes another way'): Rest(model, x, block=1)
    rest = Rest(model, x, block=0)
    with torch.no_grad():
        assert torch.equal(rest(rest.h), model(x).amax(-1))
        with pytest.raises(NotImplementedError, match='block 1 also goes another way'): rest(rest.h, lambda i, h, rows: h)


def test_in_place_blocks():
    class InPlace(nn.Module):
        def forward(self, h): return h.add_(1).mul_(2)
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 5)
            self.blocks = nn.ModuleList(nn.Sequential(InPlace(), nn.Linear(8, 8)) for _ in range(2))
        def forward(self, x):
            h = self.patch(x).flatten(2).mT
            for block in self.blocks: h = block(h)
            return self.head(h.mean(1))
    model, x = noisy(Model()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    rest = Rest(model, x, block=1)
    h = rest.h.clone().requires_grad_()
    score = rest(h)
    assert torch.equal(score, rest.score) and torch.autograd.grad(score.sum(), h)[0].any()


def test_contexts_of_the_caller():
    model, x = noisy(vit(3)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = Rest(model, x).score
    with torch.inference_mode(): assert torch.equal(Rest(model, x.clone()).score, expected)
    with torch.no_grad(): rest = Rest(model, x)
    assert torch.equal(rest.score, expected)
    with libra(model):
        rest = Rest(model, x, of='probability')
        h = rest.h.clone().requires_grad_()
        score = rest(torch.cat([h, h]))
    with libra(model): logits = model(x)
    torch.testing.assert_close(score[:2], logits.softmax(-1).amax(-1), rtol=1e-12, atol=0)
    assert torch.autograd.grad(score.sum(), h)[0].any()  # the softmax of the score is no gate
    assert not model._forward_pre_hooks and not any(b._forward_pre_hooks for b in model.blocks)


def test_low_precision():
    model, x = load('vit_digits'), torch.randn(2, 3, 64, 64)
    with torch.autocast('cpu', torch.bfloat16):
        rest = Rest(model, x, block=2)
        with torch.no_grad(): assert torch.equal(rest(rest.h), rest.score) and rest.together


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpoints_are_refused_where_they_would_be_wrong(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self): super().__init__(); self.vit = vit(3)
        def forward(self, x):
            h = self.vit._pos_embed(self.vit.patch_embed(x))
            for b in self.vit.blocks: h = checkpoint(b, h, use_reentrant=reentrant)
            return self.vit.forward_head(self.vit.norm(h))
    model, x = noisy(Checkpointed()), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with pytest.raises((ValueError, NotImplementedError), match='recomputes its blocks|no token states'):
        rest = Rest(model, x, block=1)
        with torch.no_grad(): assert torch.equal(rest(rest.h), rest.score)
        rest(rest.h.clone().requires_grad_())


def test_errors():
    model, x = noisy(vit(3)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for block, words in ((3, 'blocks 0 to 2'), (-4, 'blocks 0 to 2'), ('plus', 'must be a number'), (True, 'must be a number')):
        with pytest.raises(ValueError, match=words): Rest(model, x, block=block)
    rest = Rest(model, x)
    for h in (rest.h[:1], rest.h[:0], rest.h[:, 1:], rest.h.flatten(1)):
        with pytest.raises(ValueError, match=r'pass \[S\*2, 17, 32\]'): rest(h)
    with pytest.raises(TypeError, match='torch tensor'): rest(None)
    with pytest.raises(NotImplementedError, match='block=None'): Rest(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double().eval(), x[..., :4, :4])
    assert Rest(model, x, block=-1).block == 2
