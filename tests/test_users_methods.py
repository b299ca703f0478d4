"What practitioners met: unusual attention, outputs, threads, dtypes and checkpoints under every kind of method"
import threading
from types import SimpleNamespace

import pytest, torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

from libragrad_nb import explain, methods
from libragrad_nb.gradient_maps import find_method
from libragrad_nb.trace import NoAttention

SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
ATTENTION = [n for n, m in methods.items() if m.attention and not m.runs]


def vit(change=None, **kwargs):
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, **kwargs})
    for p in model.parameters(): p.data = p.data + .2*torch.randn_like(p)
    if change:
        for b in model.blocks: b.attn = WrittenOut(b.attn, change)
    return model.double().eval()


@pytest.fixture(scope='module')
def images(): return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class WrittenOut(nn.Module):
    "Attention whose matrix is formed and used by `how(q, k, v, table)`, all [B, H, N, 8]"
    def __init__(self, attn, how):
        super().__init__()
        self.attn, self.how, self.table = attn, how, nn.Parameter(torch.randn(17, 17, 8)*.3)
    def forward(self, x, **_):
        q, k, v = self.attn.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return self.attn.proj(self.how(q*8**-.5, k, v, self.table).transpose(1, 2).flatten(2))


def plain(q, k, v, table): return (q @ k.mT).softmax(-1) @ v
def by_einsum(q, k, v, table): return torch.einsum('b h i j, b h j c -> b h i c', (q @ k.mT).softmax(-1), v)
def by_keyword(q, k, v, table): return torch.softmax(input=q @ k.mT, dim=3).matmul(v)
def relative_after(q, k, v, table): a = (q @ k.mT).softmax(-1); return a @ v + torch.einsum('bhij,ijc->bhic', a, table)
def relative_before(q, k, v, table): a = (q @ k.mT).softmax(-1); return torch.einsum('bhij,ijc->bhic', a, table) + a @ v
def over_queries(q, k, v, table): return torch.einsum('bhji,bhjc->bhic', (k @ q.mT).softmax(-2), v)
def transposed(q, k, v, table): return torch.einsum('bhji,bhjc->bhic', (k @ q.mT).softmax(-1), v)
def heads_first(q, k, v, table): q, k, v = (t.transpose(0, 1) for t in (q, k, v)); return ((q @ k.mT).softmax(-1) @ v).transpose(0, 1)


def same(a, b, atol=1e-10): torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize('how', [by_einsum, by_keyword])
def test_ways_to_write_the_same_attention(how, images):
    ours, theirs = (explain(vit(h), images, 1, [*ATTENTION, 'legrad']) for h in (how, plain))
    for n in ours: same(ours[n].map, theirs[n].map)


@pytest.mark.parametrize('rules', ['libra', 'plain'])
@pytest.mark.parametrize('how', [relative_after, relative_before, over_queries, transposed, heads_first])
def test_attention_that_cannot_be_read_is_refused(how, rules, images):
    for n in ('gen_att', 'legrad'):
        with pytest.raises(NoAttention): explain(vit(how), images, 1, n, rules)
    assert explain(vit(how), images, 1).completeness_error.abs().max() < 1e-9


def test_heads_first_is_read_where_there_is_one_image(images):
    same(*(explain(vit(h), images[:1], 1, 'gen_att').map for h in (heads_first, plain)))


def test_legrad_refuses_two_attentions_in_a_block(images):
    with pytest.raises(NoAttention, match='one attention matrix in every block'): explain(vit(block_fn=ParallelThingsBlock), images, 1, 'legrad')


class Wrapped(nn.Module):
    def __init__(self, model, wrap): super().__init__(); self.model, self.wrap = model, wrap
    def forward(self, x): return self.wrap(self.model(x))


OUTPUTS = dict(tuple=(lambda y: (y, None), lambda o: o[0]), list=(lambda y: [y], lambda o: o[0]), dict=(lambda y: {'scores': y, 'loss': y.sum()}, lambda o: o['scores']),
               nested=(lambda y: {'heads': (y, y)}, lambda o: o['heads'][1]), object=(lambda y: SimpleNamespace(scores=y, name='x'), lambda o: o.scores))

@pytest.mark.parametrize('kind', OUTPUTS)
@pytest.mark.parametrize('method', ['legrad', 'decompx'])
def test_outputs_that_are_no_tensor(kind, method, images):
    (wrap, unwrap), model = OUTPUTS[kind], vit()
    options = {k: v for k, v in dict(steps=2, progress=False).items() if k in find_method(method)[0].options}
    classes = torch.tensor([1, 3])
    def target(o): y = unwrap(o); return y.gather(1, classes[:len(y), None].expand(-1, 1).repeat(-(-len(y)//2), 1)[:len(y)])[:, 0]
    same(explain(Wrapped(model, wrap).eval(), images, target, method, **options).map, explain(model, images, classes, method, **options).map)


@pytest.mark.parametrize('method', ['legrad', 'integrated_gradients', 'smooth_grad'])
def test_checkpoints_are_named(method, images):
    model = vit()
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match='set_grad_checkpointing'): explain(model, images, 1, method)

@pytest.mark.parametrize('method', ['integrated_gradients_pixels', 'smooth_grad_pixels', 'fullgrad_plus', 'grad_cam', 'gen_att', 'attention_rollout', 'decompx'])
def test_checkpoints_change_nothing(method, images):
    usual, model = vit(), vit()
    model.set_grad_checkpointing(True)
    options = {k: v for k, v in dict(steps=2, progress=False, seed=0).items() if k in find_method(method)[0].options}
    assert torch.equal(explain(model, images, 1, method, **options).map, explain(usual, images, 1, method, **options).map)


@pytest.mark.parametrize('method', ['smooth_grad', 'smooth_grad_norm_pixels'])
def test_noise_does_not_depend_on_the_default_dtype(method, images):
    model = vit()
    ours = explain(model, images, 1, method, samples=2).map
    torch.set_default_dtype(torch.float64)
    try: theirs = explain(model, images, 1, method, samples=2).map
    finally: torch.set_default_dtype(torch.float32)
    same(ours, theirs)


@pytest.mark.parametrize('method, samples', [('shapley_sampling', 2), ('kernel_shap', 20)])
def test_threads_throw_their_own_dice(method, samples, images):
    model, found = vit(), {}
    def one(k): return explain(model, images[k:k+1], 1, method, samples=samples, progress=False).map
    alone, before = [one(0), one(1)], torch.get_rng_state()
    threads = [threading.Thread(target=lambda k=k: found.update({k: one(k)})) for k in (0, 1)]
    for t in threads: t.start()
    for t in threads: t.join()
    for k in (0, 1): same(found[k], alone[k])
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_is_no_token():
    "Terms and readers see a padded text as if it came alone"
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3)
    model = BertForSequenceClassification(config).double().eval()
    ids, mask = torch.randint(1, 30, (2, 7)), torch.ones(2, 7).long()
    mask[1, 5:] = 0
    names = [n for n, m in methods.items() if not m.runs and n != 'token_tm']
    padded = explain(model, dict(input_ids=ids, attention_mask=mask), 1, names)
    alone = explain(model, dict(input_ids=ids[1:, :5], attention_mask=mask[1:, :5]), 1, names)
    for n in names:
        torch.testing.assert_close(padded[n].map[1:, :, :5], alone[n].map, rtol=1e-6, atol=1e-9)
        assert not padded[n].map[1, :, 5:].any()
    with pytest.raises(NotImplementedError, match='without padding'): explain(model, dict(input_ids=ids, attention_mask=mask), 1, 'token_tm')
