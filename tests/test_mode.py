"What is no lesson about the mode: compilation, threads, in-place operations, leaving no trace"
import _thread, threading

import pytest, torch, torch.utils.checkpoint

from libragrad_nb.core import _here, completeness_error, libra
from libragrad_nb.explain import explain
from libragrad_nb.shortcuts import recomputed
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


def checkpointed(reentrant, name='vit_digits'):
    model = load(name)
    forward = model.blocks.forward
    model.blocks.forward = lambda h: torch.utils.checkpoint.checkpoint(forward, h, use_reentrant=reentrant)
    return model

def test_the_older_checkpoints_are_refused(x):
    "Their first forward pass leaves no graph"
    with pytest.raises(ValueError, match='set_grad_checkpointing'): explain(checkpointed(True), x.detach())

@pytest.mark.parametrize('rules', ['libra', 'plain', 'alilrp'])
@pytest.mark.parametrize('name', ['vit_digits', 'vit_reg_digits', 'mixer_digits', 'eva_digits', 'gmixer_digits'])
def test_checkpoints_change_nothing(x, name, rules):
    for model in (checkpointed(False, name), load(name)): # all blocks in one, then each alone
        model.set_grad_checkpointing(model.blocks.forward.__name__ == 'forward')
        for ours, usual in zip(explain(model, x.detach(), [1, 3], rules=rules), explain(load(name), x.detach(), [1, 3], rules=rules)):
            for part in ('map', 'score', 'unplaced', 'additive'): assert torch.equal(getattr(ours, part), getattr(usual, part)), part

def test_other_threads_keep_their_own_gradients_beside_a_recomputation(x):
    "A hook of ours is on the model, and somebody else runs it"
    model, x, found = load('vit_digits'), x.detach(), []
    def plainly(): y = x.clone().requires_grad_(); found.append(torch.autograd.grad(model(y)[:, 3].sum(), y)[0])
    plainly()
    with recomputed(model):
        other = threading.Thread(target=plainly); other.start(); other.join()
    assert torch.equal(*found)

def test_a_thread_of_autograd_itself_has_the_rules(x):
    "As on a GPU, whose backward pass runs in a thread that Python did not start"
    model, x, done, found = checkpointed(False), x.detach().requires_grad_(), threading.Event(), []
    with libra(model): y = model(x)[:, 3].sum()
    def work():
        try: found.append(torch.autograd.grad(y, x)[0])
        except Exception as e: found.append(e)
        done.set()
    with recomputed(model): _thread.start_new_thread(work, ()); assert done.wait(60)
    assert torch.equal(found[0], gradient(load('vit_digits'), x))

def test_rules_leave_when_a_recomputation_breaks_off(x):
    "PyTorch stops computing again when it has enough; whatever happens there, no hook and no mode stays"
    model, x = checkpointed(False), x.detach().requires_grad_()
    def hooks(): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with libra(model): y = model(x)
    with recomputed(model): torch.autograd.grad(y.sum(), x)
    assert not hooks() and _here.mode is None and torch.equal(torch.autograd.grad((x*x).sum(), x)[0], 2*x)  # the plain one
    with libra(model): y = model(x)
    def broken(*a): raise KeyError('in the second forward pass')
    model.blocks[2].mlp.register_forward_hook(broken)
    with pytest.raises(KeyError, match='second'):
        with recomputed(model): torch.autograd.grad(y.sum(), x)
    assert hooks() == 1 and _here.mode is None
    assert torch.equal(torch.autograd.grad((x*x).sum(), x)[0], 2*x)


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
