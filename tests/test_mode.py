"What is no lesson about the mode: compilation, threads, in-place operations, leaving no trace"
import threading

import pytest, torch, torch.utils.checkpoint

from libragrad_nb.core import completeness_error, libra
from libragrad_nb.explain import explain
from libragrad_nb.zoo import load, scenes


@pytest.fixture(scope='module')
def vit(): return load('vit_digits')


@pytest.fixture
def x(): return scenes(2, digits=2).images.requires_grad_()


def gradient(model, x):
    with libra(model): y = model(x)
    return torch.autograd.grad(y[:, 3].sum(), x)[0]


def test_compiles_without_a_graph_break(vit, x):
    "The graph is captured by dynamo and run eagerly, so no compiler is needed"
    compiled = torch.compile(vit, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(gradient(compiled.eval(), x), gradient(vit, x), atol=1e-6, rtol=1e-4)


def test_many_threads_do_not_meet(vit, x):
    expected, images = {}, x.detach()
    for rules in ('libra', 'plain'): expected[rules] = explain(vit, images, rules=rules).map
    wrong, start = [], threading.Barrier(6)

    def work(rules):
        start.wait()
        for _ in range(5):
            if not torch.allclose(explain(vit, images, rules=rules).map, expected[rules], atol=1e-5): wrong.append(rules)

    threads = [threading.Thread(target=work, args=(r,)) for r in ['libra', 'plain']*3]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong and not torch.allclose(expected['libra'], expected['plain'], atol=1e-2)


def test_flags_and_hooks_are_as_before(vit, x):
    flags = [p.requires_grad for p in vit.parameters()]
    before, = torch.autograd.grad(vit(x)[:, 3].sum(), x)
    explain(vit, x.detach())
    with pytest.raises(ValueError): explain(vit, x.detach(), target=99)
    assert [p.requires_grad for p in vit.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    assert torch.equal(torch.autograd.grad(vit(x)[:, 3].sum(), x)[0], before)
    assert not torch.allclose(gradient(vit, x), before)


def test_backward_after_the_block_and_twice(vit, x):
    with libra(vit): y = vit(x)
    a, = torch.autograd.grad(y[:, 3].sum(), x, retain_graph=True)
    b, = torch.autograd.grad(y[:, 3].sum(), x)
    assert torch.equal(a, b) and torch.equal(a, gradient(vit, x))


def test_frozen_and_trainable_models_agree(x):
    frozen = load('vit_digits').requires_grad_(False)
    assert torch.equal(gradient(frozen, x), gradient(load('vit_digits'), x))


def test_unfused_attention_agrees(x):
    explicit = load('vit_digits')
    for block in explicit.blocks: block.attn.fused_attn = False
    torch.testing.assert_close(gradient(explicit, x), gradient(load('vit_digits'), x), atol=1e-5, rtol=1e-4)


def test_constants_of_in_place_operations():
    "The constant is noted before the operation writes into it"
    x, base = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def f(x):
        buffer = base.clone()
        buffer += 2*x
        return buffer
    assert abs(completeness_error(f, x)) < 1e-12


def test_a_mask_of_minus_infinity_is_no_constant():
    "Under plain gradients softmax needs its input, and the gradient at a masked place is 0"
    x, mask = torch.randn(4, 4, dtype=torch.float64), torch.full((4, 4), -torch.inf, dtype=torch.float64).triu(1)
    error = completeness_error(lambda x: (x@x.T + mask).softmax(-1)@x, x, rules='plain')
    assert error == error and abs(error) < 10


def test_module_rules_take_keyword_inputs():
    class Double(torch.nn.Module):
        def forward(self, input): return 2*input
    seen, x = [], torch.randn(2, 3)
    m = Double().eval()
    with libra(m, rules={Double: lambda out, module, input: seen.append(input) or out}): m(input=x)
    assert len(seen) == 1 and seen[0] is x


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointed_blocks_are_refused(x, reentrant):
    "Their second forward pass would run without the rules"
    model = load('vit_digits')
    forward = model.blocks.forward
    model.blocks.forward = lambda h: torch.utils.checkpoint.checkpoint(forward, h, use_reentrant=reentrant)
    with pytest.raises(ValueError, match='set_grad_checkpointing'): explain(model, x.detach())


def test_a_part_in_training_mode_is_refused(vit, x):
    model = load('vit_digits')
    model.blocks[2].mlp.train()
    with pytest.raises(ValueError, match='blocks.2.mlp'): explain(model, x.detach())


def test_an_account_inside_the_callers_own_libra(vit, x):
    def product(o): return o[:, 3]*o[:, 2]
    outside = explain(vit, x.detach(), target=product).map
    with libra(vit): inside = explain(vit, x.detach(), target=product).map
    assert torch.equal(inside, outside)


def test_wrong_number_of_scores(vit, x):
    with pytest.raises(ValueError, match='1 scores for 2 images'): explain(vit, x.detach(), target=lambda o: o[:, 3].sum()[None])


def test_as_many_channels_as_tokens_places_nothing():
    from timm.models.mlp_mixer import MlpMixer
    torch.manual_seed(0)
    model = MlpMixer(img_size=64, patch_size=8, embed_dim=64, num_blocks=2, num_classes=10).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=.1)
    a = explain(model, scenes(2).images, method='fullgrad')
    b = explain(model, scenes(2).images, method='input_x_gradient')
    torch.testing.assert_close(a.map, b.map)
    assert (a.completeness_error.abs() < 1e-4*a.score.abs()).all()
