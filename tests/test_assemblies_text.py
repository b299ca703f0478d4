"The path from a name to a map on the pages of CLIP and Llama, with models of random weights that are saved and loaded like real ones"
import json

import pytest, torch, torch.nn.functional as F

from libragrad_nb import explain
from libragrad_nb.clip import Pictured, load_towers, read as read_prompts, ready, spelled
from libragrad_nb.core import LIBRA
from libragrad_nb.llama import by_word, load_reader, read, spelled as tokens_spelled, tokens_of
from libragrad_nb.scenes import VOCABULARY, coloured_scenes, recall
from libragrad_nb.trace import trace

PROMPTS = ['a red seven', 'a photo of a cat on a mat']


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    "A folder with a Llama (shared keys and values) and a tokenizer that starts texts and splits words"
    transformers, tokenizers = pytest.importorskip('transformers'), pytest.importorskip('tokenizers')
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    folder = tmp_path_factory.mktemp('hub')
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator([' '.join(VOCABULARY)], trainers.BpeTrainer(vocab_size=300, special_tokens=['<s>'], initial_alphabet=alphabet))
    t.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>').save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=len(t.get_vocab()), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                                      num_key_value_heads=2, max_position_embeddings=128, initializer_range=.2, bos_token_id=0, eos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts():
    return [recall(1, facts, seed=3).words(0) for facts in (2, 4, 3)]


def test_reader_of_the_hub(hub, texts):
    model, tokenizer = load_reader(hub)
    assert not model.training and any(len(tokens_of(w, tokenizer)) > 1 for w in VOCABULARY)
    given, owner = read(texts, tokenizer)
    assert (given['input_ids'][:, 0] == tokenizer.bos_token_id).all() and (owner[:, 0] == -1).all()
    for row, real, text in zip(given['input_ids'], given['attention_mask'], texts):
        assert row[real.bool()].tolist() == tokenizer(' '.join(text))['input_ids']
        assert ''.join(tokens_spelled(row[real.bool()][None, 1:], tokenizer)[0]) == ''.join(text)
    for method in ('input_x_gradient', 'fullgrad_plus'):
        a = explain(model, given, method=method)
        assert (a.completeness_error/a.score).abs().max() < 1e-4
        front = (a.map[:, 0]*(owner == -1)).sum(1)  # what went to the token that starts the text
        assert torch.allclose(by_word(a.map, owner).sum(1) + front, a.map.sum((1, 2)), atol=1e-4)
    plain = explain(model, given, method='input_x_gradient', rules='plain')
    assert (plain.completeness_error/plain.score).abs().min() > .5  # the last norm


def test_padding_changes_nothing(hub, texts):
    model, tokenizer = load_reader(hub)
    model.double()
    together = by_word(explain(model, (batch := read(texts, tokenizer))[0]).map, batch[1])
    for text, found in zip(texts, together):
        given, owner = read([text], tokenizer)
        alone = by_word(explain(model, given).map, owner)[0]
        assert torch.allclose(found[:len(text)], alone, atol=1e-9) and not found[len(text):].any()


def test_reader_in_bfloat16(hub, texts):
    model, tokenizer = load_reader(hub)
    a = explain(model.to(torch.bfloat16), read(texts, tokenizer)[0], method='input_x_gradient')
    assert (a.completeness_error.abs() < .05*(a.map.abs().sum((1, 2)) + a.score.abs())).all()


def test_embedded_reader():
    model, tokenizer = load_reader()
    t = recall(3, 3, seed=5)
    given, owner = read([t.words(i) for i in range(3)])
    assert tokenizer is None and torch.equal(given['input_ids'], t.tokens) and torch.equal(owner, torch.arange(18).expand(3, 18))
    with pytest.raises(ValueError, match='no word of this model'): read([['the', 'submarine', 'is']])


TEXT = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=2)
IMAGE = dict(image_size=64, layers=2, width=32, patch_size=16, head_width=16)
TOWERS = {
    'clip': dict(embed_dim=32, vision_cfg=IMAGE, text_cfg=TEXT),
    'quick_gelu': dict(embed_dim=32, quick_gelu=True, vision_cfg=IMAGE, text_cfg=TEXT),
    'sigmoid': dict(embed_dim=192, init_logit_bias=-10, custom_text=True, text_cfg=TEXT, vision_cfg=dict(
        image_size=224, timm_model_name='vit_tiny_patch16_224', timm_model_pretrained=False, timm_pool='map', timm_proj='none')),
}


@pytest.fixture(scope='module', params=TOWERS)
def towers(request, tmp_path_factory):
    open_clip = pytest.importorskip('open_clip')
    folder, name = tmp_path_factory.mktemp('towers'), f'small-{request.param}'
    (folder/f'{name}.json').write_text(json.dumps(TOWERS[request.param]))
    open_clip.add_model_config(folder)
    torch.manual_seed(2)
    torch.save(open_clip.create_model(name).state_dict(), folder/'weights.pt')
    return load_towers(f'{name}/{folder/"weights.pt"}')


def test_towers_of_open_clip(towers):
    x = ready(towers, (coloured_scenes(2, seed=1).images + 1)/2)
    model = towers.prompted(PROMPTS)
    assert model(x).shape == (2, 2) and not model.training
    with torch.no_grad(): i, t = towers.model.encode_image(x, normalize=True), towers.encode_text(PROMPTS)
    with torch.no_grad(): assert torch.allclose(model(x), towers.scale.exp()*i@t.T + towers.bias, atol=1e-4)
    for a in explain(model, x, [0, 1], 'fullgrad_plus'):
        assert a.map.shape[1] in (4, 14) and a.completeness_error.abs().max() < 1e-4*max(1, a.score.abs().max())
    t, = trace(model, x, 0, LIBRA | {F.normalize: lambda op, *args, **kwargs: op(*args, **kwargs)})
    assert torch.allclose(t.score - t.completeness_error(None), towers.bias.expand(2), atol=1e-3)  # zero-sum


def test_words_of_open_clip(towers):
    x = ready(towers, (coloured_scenes(2, seed=1).images + 1)/2)
    ids, pictured = read_prompts(towers, PROMPTS), Pictured(towers, x)
    with torch.no_grad(): assert torch.allclose(pictured(ids)[:, 0], towers.prompted(PROMPTS)(x).diagonal(), atol=1e-4)
    a = explain(pictured, ids, 0, 'input_x_gradient')
    assert a.map.shape == (2, 1, 16) and a.completeness_error.abs().max() < 1e-4*max(1, a.score.abs().max())
    assert spelled(towers, ids)[0][1:4] == ['a', 'red', 'seven']


def test_words_of_the_embedded_towers():
    towers = load_towers()
    x, ids = ready(towers, (coloured_scenes(2, seed=1).images + 1)/2), read_prompts(towers, PROMPTS[:1] + ['an eight'])
    assert spelled(towers, ids) == [['a', 'red', 'seven'], ['an', 'eight', '']]
    with torch.no_grad(): assert torch.allclose(Pictured(towers, x)(ids)[:, 0], towers(x, [PROMPTS[0], 'an eight']).diagonal(), atol=1e-5)
