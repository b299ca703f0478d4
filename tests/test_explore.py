"The explorers without a browser: what they compute, what they keep, and what they say to bad input"
import io, struct, warnings, zlib
from datetime import datetime
import pytest, timm, torch
from PIL import Image
from torch import nn
from libragrad_nb import explain, methods, without
from libragrad_nb.explore import (OPS, Explainer, Explorer, PromptExplorer, RuleLab, TextExplorer, View, balance, find_class,
                                  first_class, leaks_of, mean_of, prepared, probabilities, question_controls, sentence, split_prompts, top_classes,
                                  usual_blocks, verdict)
from libragrad_nb.presets import families
from libragrad_nb.removal import remaining
from libragrad_nb.scenes import VOCABULARY, coloured_scenes, recall, scenes
from libragrad_nb.zoo import load

SCENE = scenes(3, digits=2, seed=1)

@pytest.fixture(scope='module')
def vit(): return load('vit_digits')
@pytest.fixture(scope='module')
def mixer(): return load('mixer_digits')
@pytest.fixture(scope='module')
def explorer(vit): return Explorer(vit, SCENE.images, SCENE.labels[:, 0])
@pytest.fixture(scope='module')
def towers(): return load('clip_digits')
@pytest.fixture(scope='module')
def llama(): return load('llama_recall')

def status(panel): return panel.said.value
def works(panel, **values):
    "Set controls; the panel answers without complaint"
    for k, v in values.items(): panel.controls[k].value = v
    assert '✗' not in status(panel) and 'working' not in status(panel), status(panel)
    return panel.answer

def refuses(panel, words, **values):
    "Set controls; the panel says so in words, and what it shows stays"
    before = panel.picture.value, panel.numbers.value
    for k, v in values.items(): panel.controls[k].value = v
    assert '✗' in status(panel) and words in status(panel), status(panel)
    assert (panel.picture.value, panel.numbers.value) == before


def test_answers_are_those_of_explain(vit):
    e = Explainer(vit, SCENE.images)
    for name, off in (('fullgrad_plus', ()), ('gen_att', ('layernorm',)), ('decompx', ()), ('grad_cam', ('attention', 'gating'))):
        a = e.attribution(View(1, 5, name, off))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            b = explain(vit, SCENE.images[1:2], 5, name, without(*off) if off else 'libra')
        torch.testing.assert_close(a.map, b.map); torch.testing.assert_close(a.completeness_error, b.completeness_error, atol=1e-5, rtol=0, equal_nan=True)

def test_blocks_are_averaged(vit):
    e = Explainer(vit, SCENE.images)
    a = e.attribution(View(method='fullgrad', blocks=(2, 4)))
    one = [explain(vit, SCENE.images[:1], method=f'fullgrad@{b}') for b in (2, 3, 4)]
    torch.testing.assert_close(a.map, sum(o.map for o in one)/3)
    torch.testing.assert_close(mean_of(one).unplaced, a.unplaced)
    assert usual_blocks('fullgrad', 6) == (0, 0) and usual_blocks('grad_cam', 6) == (5, 5) and usual_blocks('grad_sam', 6) == (0, 5)
    assert usual_blocks('occlusion', 6) is None and usual_blocks('att_cat', 6) is None and usual_blocks('fullgrad_plus', 6) == (0, 5) and usual_blocks('grad_cam', 0) == (0, 0)

@pytest.mark.parametrize('name', ['fullgrad_plus', 'skip_plus'])
def test_means_over_blocks_as_they_come(vit, name):
    a, b = Explainer(vit, SCENE.images).attribution(View(method=name, blocks=usual_blocks(name, 6))), explain(vit, SCENE.images[:1], method=name)
    torch.testing.assert_close(a.map, b.map); torch.testing.assert_close(a.unplaced, b.unplaced)
    torch.testing.assert_close(a.completeness_error, b.completeness_error, atol=1e-5, rtol=0)

def test_kept_and_bounded(vit):
    e = Explainer(vit, SCENE.images, most=3)
    passes = []
    stop = vit.register_forward_hook(lambda *_: passes.append(1))
    view = View(1, 5)
    try:
        e.answer(view); first = len(passes)
        for other in (View(1, 5, 'grad_cam'), View(1, 5, 'token_tm'), View(1, 5, scale=.3, opacity=.2), View(1, 5, 'fullgrad', blocks=(1, 3))): e.answer(other)
        assert first and len(passes) == first
        e.answer(View(1, 5, off=('gating',))); assert len(passes) > first
        for i in range(3): e.trace(i, None, None, ())
        assert e.trace.cache_info().currsize == 3
    finally: stop.remove()

def test_removal_is_that_of_the_metrics(vit, mixer):
    for model in (vit, mixer):
        e = Explainer(model, SCENE.images)
        for view in (View(gone=.3), View(method='pixel_x_gradient', gone=.5)):
            a = e.answer(view)
            grid = nn.functional.adaptive_avg_pool2d(a.found.map[:, None], (8, 8))[:, 0]
            p, gone = remaining(e.ask(0, None), grid, view.gone)
            torch.testing.assert_close(a.after, p[0]); assert torch.equal(a.gone, gone[0]) and a.gone.sum() == int(64*view.gone)

def test_probability_of_a_single_prompt():
    assert probabilities(torch.tensor([0.])) == .5 and probabilities(torch.tensor([0., 0.])).tolist() == [.5, .5]


SLOW = 'lime', 'kernel_shap', 'shapley_sampling', 'occlusion' # they run the model hundreds of times

def test_every_method(vit):
    e = Explainer(vit, SCENE.images)
    for name in (n for n in methods if n not in SLOW):
        a = e.attribution(View(method=name, blocks=usual_blocks(name, e.L)))
        assert a.method == name and a.map.isfinite().all() and a.map.any()

@pytest.mark.parametrize('name', ['gradient_norm', 'pixel_x_gradient', 'integrated_gradients', 'gen_att'])
def test_methods_show(explorer, name):
    a = works(explorer, method=name)
    assert a.found.method == name and name in explorer.picture.value
    assert explorer.controls['blocks'].disabled == (usual_blocks(name, 6) is None)
    assert ('usually runs with plain' in explorer.numbers.value) == (methods[name].rules == 'plain')
    works(explorer, method='fullgrad_plus')

def test_switches_break_and_mend_the_account(explorer):
    assert works(explorer, method='fullgrad_plus', which=0).adds_up
    picture, numbers = explorer.picture.value, explorer.numbers.value
    for f in families():
        a = works(explorer, **{f'rule_{f}': False})
        assert a.adds_up == (f == 'gating')  # this ViT multiplies no two branches
        assert bool(leaks_of(a.sheet)) == (f != 'gating') and verdict(a) in explorer.picture.value
        works(explorer, **{f'rule_{f}': True})
    assert (explorer.picture.value, explorer.numbers.value) == (picture, numbers)

def test_ledger_and_map_tell_the_same(explorer):
    a = works(explorer, method='fullgrad', rule_layernorm=False, rule_attention=False)
    net = sum(n for _, n, _ in leaks_of(a.sheet, 99))*abs(a.sheet.score)
    works(explorer, method='fullgrad_plus', rule_layernorm=True, rule_attention=True)
    assert abs(net - a.found.completeness_error.item()) < 2e-3*abs(a.sheet.score)*len(a.sheet.rows)**.5

def test_deletion_and_look(explorer):
    clean = works(explorer, gone=0)
    a = works(explorer, gone=.3)
    assert a.gone.sum() == 19 and a.after[a.target] < clean.after[a.target] and 'without 19 of 64 patches' in explorer.numbers.value
    picture = explorer.picture.value
    works(explorer, opacity=.3); assert explorer.picture.value != picture
    picture = explorer.picture.value
    works(explorer, scale=.3); assert explorer.picture.value != picture
    works(explorer, opacity=1., scale=1., gone=0.)

def test_images_and_classes(explorer):
    works(explorer, which=1)
    assert explorer.answer.target == SCENE.labels[1, 0]  # as it was given
    works(explorer, which=0, target=8)
    assert explorer.answer.target == 8
    works(explorer, which=0, other='9')
    assert explorer.controls['target'].value == 9
    works(explorer, target=8); assert explorer.controls['other'].value == ''

def test_first_class():
    logits = torch.tensor([1., 3., 2.])
    assert first_class(None, 0, logits) == 1 and first_class(0, 5, logits) == 0 and first_class(torch.tensor(2), 0, logits) == 2
    assert first_class([2, 0], 1, logits) == 0 and first_class(torch.tensor([2, 0]), 7, logits) == 1
    with pytest.raises(ValueError, match='no class'): first_class(3, 0, logits)

def test_find_class():
    assert find_class(' 2 ', 3) == 2 and find_class('CAT', 2, ['dog', 'cat']) == 1 and find_class('7', 9, ['7', 'x']) == 0
    for text in ('3', '-1', 'x', '', '1.5', '²'):
        with pytest.raises(ValueError, match='numbers from 0 to 2'): find_class(text, 3)
    assert [c for _, c in top_classes(torch.tensor([1., 3., 2.]), k=2, also=0)] == [1, 2, 0]


def png(size=(40, 30), mode='RGB'):
    f = io.BytesIO(); Image.new(mode, size).save(f, 'PNG'); return f.getvalue()

def bomb(side):
    "A small file that claims to be a huge picture"
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes(100))) + chunk(b'IEND', b'')

def given(content, name='mine.png'): return ({'name': name, 'type': 'image/png', 'size': len(content), 'content': memoryview(content), 'last_modified': datetime.now()},)

def test_upload(explorer):
    n = len(explorer.explainer.inputs)
    for content, words in ((b'', 'is no image'), (b'hello', 'is no image'), (png()[:60], 'damaged'), (bomb(8_000), 'at most 50000000 are decoded'), (bomb(60_000), 'pixels: make it smaller')):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            refuses(explorer, words, upload=given(content))
        assert len(explorer.explainer.inputs) == n and explorer.controls['upload'].value == ()
    for mode in ('RGBA', 'I;16', 'LA'): works(explorer, upload=given(png(mode=mode), f'{mode}.png'))
    assert explorer.controls['which'].value == n + 2 and explorer.controls['which'].label == 'LA.png'
    works(explorer, which=0)

def test_prepared_as_timm_would(vit):
    g = torch.Generator().manual_seed(0)
    picture = Image.fromarray(torch.randint(255, (50, 90, 3), generator=g, dtype=torch.uint8).numpy())
    f = io.BytesIO(); picture.save(f, 'PNG')
    model = timm.create_model('vit_tiny_patch16_224')
    want = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(picture)
    torch.testing.assert_close(prepared(f.getvalue(), model, torch.zeros(1, 3, 224, 224))[0], want)
    assert prepared(f.getvalue(), vit, SCENE.images.double()).dtype == torch.float64
    with pytest.raises(ValueError, match='pretrained_cfg'): prepared(f.getvalue(), nn.Linear(1, 1), SCENE.images)


def test_mixer_says_that_it_has_no_attention(mixer):
    p = Explorer(mixer, SCENE.images)
    refuses(p, 'The method gen_att reads attention matrices', method='gen_att')
    refuses(p, 'gen_att', opacity=.5)  # still chosen
    assert works(p, method='fullgrad_plus').adds_up
    assert [label for label, name in p.controls['method'].options if methods[name].attention] == [f'{n} (needs attention)' for n in methods if methods[n].attention]

def test_a_model_without_tokens():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4*15*15, 10)).eval()
    p = Explorer(net, SCENE.images)
    assert p.answer.found.method == 'pixel_x_gradient' and p.answer.adds_up
    refuses(p, 'No token states', gone=.3)
    works(p, gone=0.)

def test_what_cannot_work_is_said_at_once(vit):
    for args in ((vit, SCENE.images[0]), (vit, SCENE.images, 12), (load('vit_digits').train(), SCENE.images), (vit, SCENE.images[:, :, :32])):
        with pytest.raises(ValueError): Explorer(*args)
    with pytest.raises(ValueError, match='unknown|no class'): find_class('x', 2)

def test_bad_classes(explorer):
    for text in ('10', '-1', 'cat', '3.5'): refuses(explorer, 'There is no class', other=text)
    works(explorer, other='3')
    assert explorer.answer.target == 3

def test_surprises_are_not_swallowed(explorer, monkeypatch):
    def broken(view): raise KeyError('gone')
    monkeypatch.setattr(explorer.explainer, 'answer', broken)
    refuses(explorer, 'KeyError', opacity=.35)
    monkeypatch.undo()
    works(explorer, opacity=1.)
    assert sentence(ValueError('a b')) == 'A b.' and sentence(ValueError()) == 'ValueError: .' and sentence(ZeroDivisionError('x')) == 'ZeroDivisionError: x.'

def test_warnings_are_said(explorer, monkeypatch):
    real = explorer.explainer.answer
    def worried(view): warnings.warn('mind <this>'); return real(view)
    monkeypatch.setattr(explorer.explainer, 'answer', worried)
    works(explorer, opacity=.6)
    assert 'mind &lt;this&gt;' in status(explorer)
    monkeypatch.undo(); works(explorer, opacity=1.)
    assert 'mind' not in status(explorer)


def test_prompts(towers):
    s = coloured_scenes(2, seed=0)
    p = PromptExplorer(towers, s.images, ', '.join(s.prompts[0]))
    assert labels(p) and p.answer.adds_up and s.prompts[0][p.answer.target] in p.numbers.value
    assert works(p, prompts='something blue').before.shape == (1,)
    works(p, gone=.2)
    refuses(p, 'no prompt of these models', prompts='a purple seven')
    refuses(p, 'prompt is empty', prompts=' , ')
    works(p, prompts='a blue three, <b>'.split(',')[0], gone=0.)
    works(p, upload=given(png())); works(p, prompts='a six')
    assert p.view.which == 2 and len(p.explainer.inputs) == 3
    assert split_prompts('a, b ,,c') == ['a', 'b', 'c']

def test_texts(llama):
    t = recall(2, facts=3, seed=2)
    p = TextExplorer(llama, t.tokens, [t.words(i) for i in range(2)], VOCABULARY)
    assert labels(p) and p.answer.adds_up and p.answer.target == t.answers[0] and p.answer.found.map[0, 0].argmax() == t.masks[0].nonzero()[0]
    assert works(p, which=1).target == t.answers[1]
    a = works(p, last=7)
    torch.testing.assert_close(a.found.map, explain(llama, t.tokens[1:2, :8]).map)
    assert works(p, last=0).found.map.shape == (1, 1, 1)
    assert '1 of ' not in works(p, last=17, gone=.3).__repr__() and '5 of 18 words' in p.numbers.value
    refuses(p, 'There is no class', other='xylophone')
    assert works(p, other='grey', gone=0.).target == VOCABULARY.index('grey')
    assert not works(p, rule_layernorm=False).adds_up
    with pytest.raises(ValueError, match='lists of 18 strings'): TextExplorer(llama, t.tokens, [['a']])

def test_a_text_of_one_word_cannot_lose_it(llama):
    t = recall(1, seed=0)
    p = TextExplorer(llama, t.tokens, [t.words(0)])
    works(p, last=0)
    refuses(p, 'no token that could be taken away', gone=.5)


@pytest.mark.parametrize('op', OPS)
def test_one_rule(op):
    for first in torch.linspace(-4, 4, 17).tolist(): assert abs(balance(op, first).missing) < 1e-10
    assert abs(balance(op, 1.3, 'plain').missing) > .01 and balance(op, 1.3).output == balance(op, 1.3, 'plain').output

def test_rule_lab():
    p = RuleLab()
    assert labels(p)
    for op in ('softplus (has a constant)', 'SwiGLU product'):
        p.controls['op'].value = op
        assert '✗' not in status(p) and op in p.picture.value and p.numbers.value.count('✓') == 1 and p.numbers.value.count('✗') == 1
    p.controls['first'].value = 0.
    with pytest.raises(ValueError, match='no operation'): balance('sqrt', 1.)


def test_pages_without_a_kernel_get_a_picture(explorer):
    bundle = explorer._repr_mimebundle_()
    assert bundle['image/png'].startswith('iVBOR') and len(bundle['text/plain']) < 80 and 'application/vnd.jupyter.widget-view+json' in bundle

def labels(p): return all(c.description.strip() and c.tooltip for c in p.controls.values())

def test_a_rule_family_of_ones_own_gets_a_switch(vit):
    from libragrad_nb.core import LIBRA, rule
    class Odd(nn.Module): pass
    rule('my_own', Odd)(lambda out, module, x: out)
    try: assert 'rule_my_own' in question_controls(Explainer(vit, SCENE.images[:1]))
    finally: del LIBRA[Odd]
