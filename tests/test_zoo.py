"Inputs with a known answer, and the models that come with the package"
import pytest, sys, timm, torch
from safetensors.torch import save_file
from torch import nn

from libragrad_nb import completeness_error, explain, zoo
from libragrad_nb.scenes import COLOURS, DIGITS, PROMPTS, VOCABULARY, coloured_scenes, digit_bank, prompt, recall, scenes
from libragrad_nb.tokens import layout
from libragrad_nb.zoo import EMBEDDED, TwoTowers, load, record


# Scenes

# pixels, classes and masks of the first version: what pages say of a seed must stay true
GOLDEN = [
    (dict(n=3, digits=2, split='train', seed=7), [[1, 6], [7, 9], [9, 1]], [[176, 156], [185, 200], [284, 208]],
     (slice(None), 1, slice(5, None, 18), 30), [[-.801519, -.227606, -.011493, .165847], [-.526256, -.471943, -.032062, -.739665],
                                               [-.538244, -.616245, .097703, .251087]]),
    (dict(n=2, seed=0, size=48), [[2], [2]], [[227], [331]],
     (slice(None), 0, 20, slice(None, None, 12)), [[-.900227, -.286736, -.21346, -.260448], [-.721042, -.041187, -.531601, -.857864]])]

@pytest.mark.parametrize('args, labels, strokes, where, pixels', GOLDEN)
def test_scenes_stay_what_they_were(args, labels, strokes, where, pixels):
    s = scenes(**args)
    assert s.labels.tolist() == labels and s.masks.sum((-2, -1)).tolist() == strokes
    torch.testing.assert_close(s.images[where], torch.tensor(pixels), atol=1e-6, rtol=0)  # as they are written here: six decimals

def test_train_and_test_share_no_glyph():
    train, test = (digit_bank(k)[0].flatten(1) for k in ('train', 'test'))
    assert (len(train), len(test)) == (1400, 397)
    assert torch.cdist(train, test).min() > 0

@pytest.mark.parametrize('digits', [1, 2, 4])
def test_coloured_scenes(digits):
    s = coloured_scenes(30, digits, seed=3)
    for truth in (s.labels, s.colours): assert all(len(set(row)) == digits for row in truth.tolist())
    assert s.prompts == [[PROMPTS[10*c + d] for c, d in zip(*row)] for row in zip(s.colours.tolist(), s.labels.tolist())]
    assert torch.equal(s.images, coloured_scenes(30, digits, seed=3).images) and s.images.abs().max() <= 1
    assert s.colours.unique().numel() == len(COLOURS) and s.labels.unique().numel() == 10

def test_the_named_colour_is_on_the_mask():
    s = coloured_scenes(100, seed=5)
    seen = (s.images[:, None]*s.masks[:, :, None]).sum((-2, -1)).flatten(0, 1)/s.masks.sum((-2, -1)).flatten()[:, None]
    hue = lambda rgb: nn.functional.normalize(rgb - rgb.mean(-1, keepdim=True), dim=-1)
    nearest = (hue(seen) @ hue(torch.tensor(list(COLOURS.values()))).T).argmax(-1)
    assert torch.equal(nearest, s.colours.flatten())

def test_parts_of_scenes_keep_everything():
    s = coloured_scenes(4)
    assert s[1:3].prompts == s.prompts[1:3] and s[2].prompts == s.prompts[2]
    assert torch.equal(s[1:3].colours, s.colours[1:3]) and torch.equal(s[1:3].masks, s.masks[1:3])
    assert scenes(2, seed=1)[0].colours is None and scenes(3).prompts[2] == [prompt(scenes(3).labels[2, 0].item())]

def test_prompts():
    assert len(set(PROMPTS)) == 60 and PROMPTS[10*list(COLOURS).index('blue') + 2] == 'a blue two'
    assert prompt(8) == 'an eight' and prompt(colour=0) == 'something red' and [p.split()[-1] for p in PROMPTS[:10]] == DIGITS

@pytest.mark.parametrize('make', [scenes, coloured_scenes])
def test_too_many_digits(make):
    for digits in (0, 5):
        with pytest.raises(ValueError, match='1 to 4'): make(1, digits)

def test_pages():
    assert len(coloured_scenes(3).show().axes) == 6
    t = recall(3)
    shown = t.show(said=torch.full((3,), VOCABULARY.index('the')))._repr_html_()
    assert shown.count('#d8b4cc') == 3 and t._repr_html_().count('#8fd3b6') == 3 and t._repr_html_().count('#e69f00') == 3


# Sentences

@pytest.mark.parametrize('facts', [2, 3, 4, 5])
@pytest.mark.parametrize('questions', [1, 2])
def test_recall(facts, questions):
    t = recall(50, facts, seed=1, questions=questions)
    assert t.tokens.shape == t.masks.shape == t.facts.shape == (50, 5*(facts + questions) - 2) and t.tokens.dtype == torch.int64
    assert torch.equal(t.tokens[t.masks], t.answers)
    for i in range(len(t)):
        words = t.words(i)
        told = [words[5*k:5*k+5] for k in range(facts)]
        assert all((a, c, e) == ('the', 'is', '.') for a, _, c, _, e in told) and words[-3] == 'the' and words[-1] == 'is'
        things, shades = ([s[k] for s in told] for k in (1, 3))
        assert len(set(things)) == len(set(shades)) == facts
        k = things.index(words[-2])
        assert shades[k] == VOCABULARY[t.answers[i]] and t.masks[i].nonzero().tolist() == [[5*k + 3]]
        assert t.facts[i].nonzero().flatten().tolist() == list(range(5*k, 5*k + 5))

def test_every_sentence_is_asked_for():
    share = recall(3000, 5).masks.nonzero()[:, 1].bincount(minlength=25)[3::5]/3000
    assert (share - .2).abs().max() < .04  # more than 5 standard deviations

def test_recall_says_what_it_takes():
    for facts in (1, 6):
        with pytest.raises(ValueError, match='2 to 5'): recall(1, facts)
    with pytest.raises(ValueError, match='1 or more'): recall(1, 3, questions=0)


# Models that come with the package

@pytest.mark.parametrize('name', EMBEDDED)
def test_files(name):
    path = zoo._file(name, zoo.WEIGHTS)
    with open(path, 'rb') as f: assert f.seek(0, 2) < 4e6
    r = record(name)
    assert r.get('name', name) == name and {'steps', 'lr', 'seed'} <= set(r) and all(r[k] == v for k, v in EMBEDDED[name].recipe.items())

@pytest.mark.parametrize('name', zoo.DIGIT_MODELS)
def test_digit_models_know_digits(name):
    a = zoo.accuracy(load(name), scenes(300, seed=4321))
    assert a > .9 and abs(a - record(name)['accuracy']) < .06  # 300 scenes: 4 standard deviations at 93 %

def test_loads_the_same_twice_and_for_evaluation():
    a, b = load('mixer_digits'), load('mixer_digits')
    assert not a.training and all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))

def test_save_and_load(tmp_path, monkeypatch):
    tiny = zoo.Embedded(lambda: nn.Linear(3, 2), 'tiny', {}, measure=lambda m: dict(accuracy=m.weight.sum().item()))
    monkeypatch.setitem(EMBEDDED, 'tiny', tiny)
    m = nn.Linear(3, 2)
    said = zoo.save(m, 'tiny', tmp_path, steps=7)
    assert said == record('tiny', tmp_path) and said['steps'] == 7
    assert said['accuracy'] == load('tiny', tmp_path).weight.sum().item()  # measured after the rounding
    assert torch.equal(load('tiny', tmp_path).weight, m.weight) and [f.name for f in tmp_path.iterdir()] == ['tiny.safetensors']

def test_training_can_be_interrupted():
    calls = []
    def loss(m, n, seed):
        calls.append(seed)
        if len(calls) == 4: raise KeyboardInterrupt
        return m(torch.ones(n, 2)).square().mean()
    m = nn.Linear(2, 1)
    assert len(zoo.train(m, 10, .1, seed=1, loss=loss, progress=False)) == 3 and not m.training
    assert calls == [2_000_000 + k for k in range(4)]


# Two towers

@pytest.fixture(scope='module')
def clip(): return load('clip_digits').double()

@pytest.fixture(scope='module')
def pairs(): return coloured_scenes(24, seed=77)

def test_vectors_have_length_one(clip, pairs):
    for v in (clip.encode_image(pairs.images[:3].double()), clip.encode_text(PROMPTS)):
        torch.testing.assert_close(v.norm(dim=-1), torch.ones(len(v)).double())

def test_prompts_of_any_length_stand_alone(clip):
    together = clip.encode_text(['a red seven', 'an eight'])
    torch.testing.assert_close(together[1:], clip.encode_text('an eight'))  # padding says nothing

def test_prompted_is_the_same_model(clip, pairs):
    x, p = pairs.images[:3].double(), clip.prompted(PROMPTS[:4])
    assert torch.equal(p(x), clip(x, PROMPTS[:4])) and not p.training
    assert clip.prompted('a red seven')(x).shape == (3, 1)

def test_two_towers_know_prompts(clip, pairs):
    "One digit, as in training; and two, which it never saw (chance is 2 of 60)"
    for s, least in ((coloured_scenes(60, 1, seed=78), .85), (pairs, .4)):
        with torch.no_grad(): logits = clip(s.images.double(), PROMPTS)
        assert zoo.truth(s).gather(1, logits.argmax(1, keepdim=True)).mean() > least

def test_prompted_is_complete(clip, pairs):
    p, x = clip.prompted(['a red seven', 'something blue']), pairs.images[:2].double()
    assert abs(completeness_error(p, x)) < 1e-12 < 1e-3 < abs(completeness_error(p, x, rules='plain'))
    plan = layout(p, x)
    assert plan.stages == list(clip.visual.blocks) and (plan.grid, plan.prefix) == ((8, 8), 1)

def test_the_map_lies_on_the_digit_of_the_prompt(clip, pairs):
    on = []
    for s, (mine, other) in ((pairs[i:i+1], pairs.prompts[i]) for i in range(len(pairs))):
        heat = explain(clip.prompted([mine, other]), s.images.double(), target=0).map.clamp_min(0)
        area = nn.functional.adaptive_max_pool2d(s.masks.double(), heat.shape[-2:])[0]
        on.append([(heat*a).sum().item()/a.sum().item() for a in area])
    assert sum(a > b for a, b in on) >= .8*len(on)

def test_a_strange_prompt_is_named():
    for bad in ('a purple seven', '', 'a red red seven', 'seven!'):
        with pytest.raises(ValueError, match='a red seven'): TwoTowers().encode_text([bad])


# A reader

def test_the_reader_recalls():
    pytest.importorskip('transformers')
    model = load('llama_recall')
    for facts in (2, 5):
        t = recall(200, facts, seed=555)
        assert (zoo.answered(model, t) == t.answers).float().mean() > .95

def test_the_reader_needs_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match='pip install transformers'): load('llama_recall')


# Other models

@pytest.fixture
def offline(monkeypatch, tmp_path):
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(c, 'HF_HUB_CACHE', str(tmp_path))

def test_no_network_is_said(offline):
    with pytest.raises(RuntimeError, match='could not be fetched') as e: load('vit_tiny_patch16_224')
    assert all(w in str(e.value) for w in ['vit_tiny_patch16_224', 'HF_HUB_OFFLINE=1', *EMBEDDED])

@pytest.mark.parametrize('name, close', [('vit_digit', 'vit_digits'), ('vit_tinny_patch16_224', 'vit_tiny_patch16_224'), ('qqqq', 'clip_digits')])
def test_unknown_names(name, close):
    with pytest.raises(ValueError, match=close): load(name)

def test_unknown_weights_of_a_known_model():
    with pytest.raises(ValueError, match='vit_tiny_patch16_224.augreg_in21k'): load('vit_tiny_patch16_224.augreg_in2k')

def test_no_weights_anywhere():
    name = next(n for n in timm.list_models('vit*') if not timm.models.is_model_pretrained(n))
    with pytest.raises(ValueError, match='checkpoint'): load(name)

def test_a_file_of_ones_own(tmp_path):
    model = timm.create_model('test_vit')
    save_file(model.state_dict(), tmp_path/'mine.safetensors')
    again = load('test_vit', checkpoint=tmp_path/'mine.safetensors')
    assert not again.training and torch.equal(again.head.weight, model.head.weight)

def test_a_file_with_classes_of_its_own(tmp_path):
    save_file(timm.create_model('test_vit', num_classes=7).state_dict(), tmp_path/'mine.safetensors')
    assert load('test_vit', checkpoint=tmp_path/'mine.safetensors').num_classes == 7

def test_a_file_that_might_run_code_or_does_not_fit(tmp_path):
    torch.save({}, tmp_path/'mine.pth')
    with pytest.raises(ValueError, match='(?s)is not opened.*weights_only=True.*mine.safetensors'): load('test_vit', checkpoint=tmp_path/'mine.pth')
    (tmp_path/'cut.safetensors').write_bytes(b'no')
    with pytest.raises(ValueError, match='no safetensors file'): load('test_vit', checkpoint=tmp_path/'cut.safetensors')
    save_file(timm.create_model('test_vit2').state_dict(), tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='do not fit test_vit'): load('test_vit', checkpoint=tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='of its own'): load('vit_digits', checkpoint=tmp_path/'other.safetensors')
