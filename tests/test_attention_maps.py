"Attention maps and what they rest on: matrices from fused and written-out attention, which tokens are read, LeGrad block by block"
import math

import pytest, torch
from timm.models import Beit, ConvNeXt, Eva, MlpMixer, SwinTransformer, VisionTransformer

from libragrad_nb import explain, libra
from libragrad_nb.attention_maps import Read, Rolled, weights, legrad, without_empty
from libragrad_nb.attention_matrix import Matrices, attention_weights
from libragrad_nb.gradient_maps import find_method, methods
from libragrad_nb.tokens import layout
from libragrad_nb.trace import NoAttention, TokenTally, listen, trace

ATTENTION = [n for n, m in methods.items() if m.attention and not m.runs]
TRACED = [n for n, m in methods.items() if not m.runs]
SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5)
HEADS = dict(token={}, registers=dict(reg_tokens=2, init_values=.1), avg=dict(global_pool='avg'), gap=dict(global_pool='avg', class_token=False),
             map=dict(global_pool='map', class_token=False))


def shaken(model):
    "Random weights everywhere, also where models start from zeros"
    torch.manual_seed(1)
    for p in model.parameters(): p.data = p.data + .2*torch.randn_like(p)
    return model.double().eval()


def vit(fused=True, **kwargs):
    torch.manual_seed(0)
    model = shaken(VisionTransformer(**{**SMALL, **kwargs}))
    for b in model.blocks: b.attn.fused_attn = fused
    return model


@pytest.fixture(scope='module')
def images(): return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def same(a, b, atol=1e-12): torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize('head', HEADS)
def test_fused_and_written_out_attention_give_the_same_maps(head, images):
    ours, theirs = (explain(vit(fused, **HEADS[head]), images, 1, [*ATTENTION, 'legrad']) for fused in (True, False))
    for name in ours: same(ours[name].map, theirs[name].map); same(ours[name].prefix, theirs[name].prefix)


@pytest.mark.parametrize('rules', ['plain', 'libra', 'attnlrp'])
@pytest.mark.parametrize('fused', [True, False])
def test_gradient_of_the_matrix(rules, fused, images):
    "The gradient that reaches the output of each attention, times its values; hooks on the model's own parts see both"
    model, found, kept = vit(fused), [], []
    def keep(m, args, out=None): kept.append(args[0] if out is None else out)
    for b in model.blocks: b.attn.qkv.register_forward_hook(keep), b.attn.proj.register_forward_pre_hook(keep)
    with libra(model, rules, Matrices(lambda where, w, g: found.append(g))): y = model(x := images.clone().requires_grad_())
    *gs, _ = torch.autograd.grad(y[:, 1].sum(), [*kept[1::2], x])
    for ours, qkv, g in zip(found[::-1], kept[::2], gs, strict=True):
        value, g = qkv.detach().unflatten(-1, (3, 2, -1))[:, :, 2].transpose(1, 2), g.unflatten(-1, (2, -1)).transpose(1, 2)
        same(ours, g @ value.mT)


def test_gradient_of_the_matrix_is_autograds(images):
    "With plain gradients and attention written out, the matrix is a tensor of the graph"
    model, found, kept = vit(False), [], []
    with libra(model, 'plain', Matrices(lambda where, w, g: found.append(g))): y = model(x := images.clone().requires_grad_())
    torch.autograd.grad(y[:, 1].sum(), x)
    for b in model.blocks: b.attn.attn_drop.register_forward_hook(lambda m, a, out: kept.append(out) or out.retain_grad())
    model(images)[:, 1].sum().backward()
    for g, a in zip(found[::-1], kept, strict=True): same(g, a.grad)


@pytest.mark.parametrize('how', [dict(), dict(is_causal=True), dict(scale=.3), dict(mask=True), dict(mask=torch.float64), dict(groups=2)])
def test_weights_of_a_fused_call(how):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 4, generator=g, dtype=torch.float64) for h in (4, 4//how.get('groups', 1), 4//how.get('groups', 1)))
    mask = {True: torch.rand(5, 5, generator=g) > .4, torch.float64: torch.randn(2, 1, 5, 5, generator=g, dtype=torch.float64)}.get(how.get('mask'))
    if how.get('mask') is True: mask[0] = False  # a token that sees nothing
    kwargs = dict(is_causal=how.get('is_causal', False), scale=how.get('scale'))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa='groups' in how, **kwargs)
    w = attention_weights(q, k, mask, **kwargs)
    seen = w.sum(-1, keepdim=True) > 0
    same(torch.where(seen, w @ v.repeat_interleave(how.get('groups', 1), 1), 0.), torch.where(seen, out, 0.))
    assert seen.all() or how.get('mask') is True


def test_one_forward_and_one_backward_for_all_maps_of_a_trace(images, monkeypatch):
    model, forward, backward, grad = vit(), [], [], torch.autograd.grad
    model.register_forward_hook(lambda *_: forward.append(1))
    monkeypatch.setattr(torch.autograd, 'grad', lambda *a, **k: backward.append(1) or grad(*a, **k))
    found = explain(model, images, 1, TRACED)
    assert len(found) == len(TRACED) > 20 and len(forward) == len(backward) == 1
    forward.clear(), backward.clear()
    explain(model, images, [1, 2, 3], TRACED)
    assert (len(forward), len(backward)) == (1, 3)
    forward.clear(), backward.clear()
    explain(model, images, 1, 'legrad')  # L other scores, so passes of its own: one of each for all blocks
    assert len(forward) == len(backward) == 1


def test_fused_kernels_stay_on(images, monkeypatch):
    model, calls = vit(), []
    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, op, types, args=(), kwargs=None):
            calls.append(op)
            return op(*args, **(kwargs or {}))
    with Count(): explain(model, images, 1, ATTENTION)
    assert calls.count(torch.nn.functional.scaled_dot_product_attention) == 3
    assert all(b.attn.fused_attn for b in model.blocks)


def test_states_are_not_copied(images):
    model, seen = vit(), []
    for b in model.blocks: b.register_forward_pre_hook(lambda m, args: seen.append(args[0].data_ptr()))
    tally = TokenTally(len(images), layout(model, images))
    with listen(tally), libra(model, tally=tally): model(images.clone().requires_grad_())
    assert [h.data_ptr() for h, _ in tally.held] == seen and len(seen) == 3


@pytest.mark.parametrize('inplace', ['h.mul_(2.)', 'h += 1.', 'h[:, 0] = 0.', 'torch.nn.functional.relu(h, inplace=True)'])
def test_states_that_are_overwritten_are_copied_before(inplace, images):
    "Maps of a model that overwrites a block's input are those of one that works on a copy"
    def change(copy):
        model = vit()
        class Overwriting(torch.nn.Module):
            def __init__(self, block): super().__init__(); self.block = block
            def forward(self, h):
                y = self.block(h)
                h = h.clone() if copy else h
                exec(inplace, dict(h=h, torch=torch))
                return y + .1*h
        model.blocks[1] = Overwriting(model.blocks[1]).eval()
        return model
    for name in ('input_x_gradient@1', 'grad_cam@1', 'gradient_norm@1'):
        same(*(explain(change(copy), images, 1, name).map for copy in (True, False)))


@pytest.mark.parametrize('head, expected', [('token', [1] + [0]*16), ('registers', [1] + [0]*18), ('avg', [0] + [1/16]*16), ('gap', [1/16]*16)])
def test_the_row_that_is_read(head, expected, images):
    for rules in ('plain', 'libra'):
        t, = trace(vit(**HEADS[head]), images, 1, rules, terms=[Read(weights)])
        same(t.row, torch.tensor(expected, dtype=torch.float64).expand(3, -1))


def test_the_row_of_attention_pooling_is_the_pooling_layers(images):
    model, kept = vit(**HEADS['map']), []
    model.attn_pool.fused_attn = False
    def keep(m, args, out): kept.append(out)
    model.attn_pool.q.register_forward_hook(keep), model.attn_pool.kv.register_forward_hook(keep)
    t, = trace(model, images, 1, terms=[Read(weights)])
    q, kv = kept
    q, (k, _) = q.view(3, 1, 2, 12).transpose(1, 2), kv.view(3, 16, 2, 2, 12).permute(2, 0, 3, 1, 4)
    same(t.row, (q @ k.mT/math.sqrt(12)).softmax(-1).mean((1, 2)).detach())


def test_rows_by_choice(images):
    model = vit(**HEADS['avg'])
    def row(r): return explain(model, images, 1, 'raw_attention', row=r)
    t, = trace(model, images, 1, terms=[Read(weights, row=i) for i in range(17)])
    rows = torch.stack([t.term(Read(weights, row=i))[-1] for i in range(17)])
    def whole(a): return torch.cat([a.prefix, a.map.flatten(1)], 1)
    same(whole(row('class')), rows[0]); same(whole(row('mean')), rows[1:].mean(0)); same(whole(row(None)), rows[1:].mean(0))
    same(whole(row('all')), rows.mean(0)); same(whole(row(-1)), rows[-1])
    for bad in ('cls', 17, True, 1.5):
        with pytest.raises(ValueError, match='row must be'): row(bad)
    with pytest.raises(ValueError, match='no class token'): explain(vit(**HEADS['gap']), images, 1, 'rollout', row='class')


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('rules', ['plain', 'libra'])
def test_several_targets_and_methods_equal_single_runs(head, rules, images):
    model, second = vit(**HEADS[head]), torch.tensor([0, 1, 2])
    together = explain(model, images, [3, second], TRACED, rules)
    for target, found in zip([3, second], together):
        for name in TRACED:
            alone = explain(model, images, target, name, rules)
            same(found[name].map, alone.map); same(found[name].unplaced, alone.unplaced); same(found[name].prefix, alone.prefix)


@pytest.mark.parametrize('head', HEADS)
def test_batch_order_and_size_do_not_matter(head, images):
    model, names = vit(**HEADS[head]), [*TRACED, 'legrad']
    whole, order = explain(model, images, 1, names), torch.tensor([2, 0, 1])
    shuffled, single = explain(model, images[order], 1, names), [explain(model, x[None], 1, names) for x in images]
    for n in names:
        scale = max(1., whole[n].map.abs().max().item())
        same(shuffled[n].map, whole[n].map[order], 1e-11*scale)
        same(torch.cat([s[n].map for s in single]), whole[n].map, 1e-11*scale)


def test_head_biases_are_unplaced_and_not_on_the_first_patch(images):
    "Where the authors' code adds them to the top left patch"
    for head in ('gap', 'avg', 'map', 'token'):
        model = vit(**HEADS[head])
        before = explain(model, images, 1, ['fullgrad', 'fullgrad_plus', 'fullgrad_plus_once'])
        with torch.no_grad(): model.head.bias += 7
        after = explain(model, images, 1, [*before])
        for n in before: same(after[n].map, before[n].map); same(after[n].unplaced, before[n].unplaced + 7)


def test_the_bias_of_the_pooling_query_is_not_counted_for_every_token(images):
    """The query of an attention pooling head does not depend on the image: it is a weight of the map from keys to logits. Under the rules its
    bias carries nothing (and the account closes); with plain gradients the authors' code counts it once for each of N tokens."""
    model = vit(**HEADS['map'])
    with torch.no_grad(): model.attn_pool.q.bias += 3.
    for i in range(3): assert explain(model, images, 1, f'fullgrad@{i}').completeness_error.abs().max() < 1e-11
    t, = trace(model, images, 1, 'plain')
    constants = sum(part.sum(-1) if part.ndim == 2 else part for part in t.constants_from(None)).sum()
    names = [n for n, _ in model.named_parameters() if n.endswith('bias') or 'pos_embed' in n]
    grads = torch.autograd.grad(model(images)[:, 1].sum(), [model.get_parameter(n) for n in names])
    shares = {n: (model.get_parameter(n)*g).sum() for n, g in zip(names, grads)}
    query = shares.pop('attn_pool.q.bias')
    assert abs(query) > 1e-6
    same(constants, sum(shares.values()), 1e-9)  # all biases, each once, and the query's not at all


@pytest.mark.parametrize('rules', ['plain', 'libra'])
@pytest.mark.parametrize('head', ['token', 'gap', 'registers'])
@pytest.mark.parametrize('shown', ['mean', 'model'])
def test_legrad_is_block_by_block(head, shown, rules, images):
    model = vit(**HEADS[head])
    q, tokens, _ = legrad(model, images, 1, rules, head=shown)
    expected = 0
    for i, block in enumerate(model.blocks):
        with torch.no_grad():
            h = model.norm_pre(model._pos_embed(model.patch_embed(images)))
            for b in model.blocks[:i]: h = b(h)
        h, found = h.requires_grad_(), []
        with libra(model, rules, Matrices(lambda where, w, g: found.append(g))):
            out = block(h)
            if shown == 'mean': out = out.mean(1, keepdim=True).expand_as(out)
            y = model.forward_head(model.norm(out))
        torch.autograd.grad(y[:, 1].sum(), h)
        expected = expected + found[0].relu().mean((1, 2))
    same(tokens, expected); same(q.score, model(images)[:, 1].detach())


def test_legrad_with_attention_pooling_looks_at_the_heads_attention(images):
    model = vit(**HEADS['map'])
    _, tokens, _ = legrad(model, images, 1, 'plain')
    h, expected = model.norm_pre(model._pos_embed(model.patch_embed(images))), 0
    for b in model.blocks:
        h, found = b(h), []
        with libra(model, 'plain', Matrices(lambda where, w, g: found.append(g))):
            own = h.detach().requires_grad_()
            y = model.forward_head(model.norm(own))
        torch.autograd.grad(y[:, 1].sum(), own)
        expected = expected + found[0].relu().mean((1, 2))
    same(tokens, expected)
    last_two = legrad(model, images, 1, 'plain', last=2)[1]
    assert not torch.equal(last_two, tokens) and (tokens >= last_two - 1e-12).all()


def test_legrad_asks_every_block_for_the_class_the_model_predicts(images):
    model = vit()
    q, tokens, _ = legrad(model, images)
    same(q.target, model(images).argmax(-1)); same(tokens, legrad(model, images, q.target)[1])
    same(tokens, legrad(model, images, lambda out: out.gather(1, q.target[:, None])[:, 0])[1])


@pytest.mark.parametrize('make', [
    lambda: MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=24, num_classes=5),
    lambda: SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(2, 1), num_heads=(2, 2), num_classes=5),
    lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5),
], ids=['mixer', 'swin', 'convnext'])
def test_models_without_such_attention_are_told_what_works(make, images):
    model, x = shaken(make()), images
    for name in [*ATTENTION, 'legrad']:
        with pytest.raises(NotImplementedError): explain(model, x, 1, name)
    with pytest.raises(NoAttention, match='gen_att.* cannot be drawn. Without attention there are .*grad_cam'): explain(model, x, 1, ['fullgrad', 'gen_att'])
    assert all(a.map.isfinite().all() for a in explain(model, x, 1, [n for n in TRACED if not methods[n].attention]).values())


@pytest.mark.parametrize('model', [
    Eva(**SMALL, qkv_bias=True, swiglu_mlp=True, use_rot_pos_emb=True, mlp_ratio=2), Beit(**SMALL, use_rel_pos_bias=True, init_values=.1),
    VisionTransformer(**SMALL, init_values=.1, no_embed_class=True, reg_tokens=4), VisionTransformer(**SMALL, pre_norm=True, global_pool='avg', fc_norm=True),
], ids=['eva02', 'beit', 'dinov2', 'clip'])
def test_families(model, images):
    found = explain(shaken(model), images, 1, [*TRACED, 'legrad'])
    assert all(a.map.isfinite().all() and a.map.any() for a in found.values())


@pytest.mark.parametrize('wrong, message', [
    (dict(method='rollout@9'), 'no block 9'), (dict(method='gen_att', keep=2.), 'between 0 and 1'), (dict(method='grad_sam', sign='up'), 'unknown sign'),
    (dict(method='token_tm', steps=3), 'token_tm takes block, row'), (dict(method='legrad', head='tail'), 'unknown head'),
    (dict(method='legrad', last=0), 'has 3 blocks'), (dict(method='legrad', last=4), 'has 3 blocks'), (dict(method='token_tm@plus@2'), "not 'plus@2'"),
    (dict(method='legrad@2'), 'not drawn at one block'), (dict(method='raw attention@x'), "'plus' "), (dict(method='att_cat@1'), 'not drawn at one block'),
])
def test_bad_options(wrong, message, images):
    with pytest.raises((ValueError, TypeError), match=message): explain(vit(), images, 1, **wrong)


@pytest.mark.parametrize('paper, name', [('Grad-CAM++', 'grad_cam_plus_plus'), ('XGradCAM+', 'xgrad_cam_plus'), ('FullGrad+', 'fullgrad_plus'), ('HiResCAM', 'input_x_gradient'),
                                         ('Attention Rollout', 'attention_rollout'), ('AttCAT', 'att_cat'), ('TokenTM', 'token_tm'), ('LeGrad', 'legrad'), ('GradSAM', 'grad_sam'),
                                         ('Input x Gradient', 'input_x_gradient'), ('SkipPLUS', 'skip_plus'), ('AttnCAM', 'attn_cam'), ('Grad-CAM+', 'grad_cam')])
def test_names_of_papers(paper, name): assert find_method(paper)[0].name == name


def test_nothing_is_left_on_the_model(images):
    model = vit(**HEADS['map'])
    explain(model, images, 1, [*TRACED, 'legrad'])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hugging_face_models(images):
    from transformers import ViTConfig, ViTForImageClassification
    def model(kind):
        torch.manual_seed(0)
        config = ViTConfig(image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
                           num_labels=5, attn_implementation=kind)
        return shaken(ViTForImageClassification(config))
    sdpa, eager = (explain(model(kind), images, 1, [*ATTENTION, 'legrad']) for kind in ('sdpa', 'eager'))
    for name in sdpa: same(sdpa[name].map, eager[name].map, 1e-6)  # eager attention takes its softmax in float32


def test_language_models_read_the_last_word():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)).eval()
    t, = trace(model, torch.randint(0, 50, (1, 7)), 3, terms=[Rolled(weights)])
    assert t.row.tolist() == [[0]*6 + [1]]
    same(t.term(Rolled(weights)).sum(-1), torch.ones(2, 1), 1e-6)
    with pytest.raises(NoAttention): explain(model, torch.randint(0, 50, (1, 7)), 3, 'legrad')


def test_without_empty():
    a = torch.arange(8.).view(2, 2, 2)
    assert without_empty(a, a).tolist() == [[[0, 1], [2, 0]], [[4, 5], [6, 0]]]
